"""The real methods in the real trainer, at a size of milliseconds."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowkernels.train.checkpoint import list_checkpoints, load_checkpoint
from flowkernels.train.config import DataConfig, OptimConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.export import load_model
from flowkernels.train.recipes import FGMOptions, FGMRecipe, ModelConfig, TeacherRecipe
from flowkernels.train.trainer import Trainer

SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "device": "cpu",
    "tensorboard": False,
    "grid_rows": 1,
    "save_every": 1,
}
AVERAGED = OptimConfig(lr=1e-2, ema_decays=(0.5,))


def teacher_recipe(output: Path, **changes: Any) -> TeacherRecipe:
    model = ModelConfig(dim=16, depth=2, heads=2)
    settings = {**SMALL, "grid_steps": 2, "optim": AVERAGED, "model": model, **changes}
    return TeacherRecipe(output=str(output), **settings)


def fgm_recipe(output: Path, teacher: Path, **changes: Any) -> FGMRecipe:
    return FGMRecipe(output=str(output), teacher=str(teacher), **{**SMALL, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher")
    assert teacher_recipe(output).build().run() == "finished"
    return output


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def break_after(trainer: Trainer, steps: int) -> None:
    """Make the trainer fail as it begins the step after that many."""
    step = trainer._train_step

    def watched() -> None:
        if trainer.step == steps:
            raise KeyboardInterrupt
        step()

    trainer._train_step = watched  # type: ignore[method-assign]


def test_fgm_resume_is_bitwise_and_keeps_its_teacher(tmp_path: Path, teacher: Path) -> None:
    options = FGMOptions(fake_steps=2)
    fgm_recipe(tmp_path / "whole", teacher, method=options).build().run()
    broken = fgm_recipe(tmp_path / "broken", teacher, method=options).build()
    break_after(broken, 2)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert list_checkpoints(tmp_path / "broken")[-1][0] == 2
    # The teacher is trained anew in the meantime: the run goes on with the one it began with.
    other = tmp_path / "other"
    teacher_recipe(other, seed=7).build().run()
    fgm_recipe(tmp_path / "broken", other, method=options).build().run()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    _, state = load_checkpoint(list_checkpoints(tmp_path / "broken")[-1][1])
    for name, value in load_file(teacher / "weights.safetensors").items():
        assert torch.equal(state["method"][f"teacher.{name}"], value)


def test_fgm_phases_have_their_own_settings(tmp_path: Path, teacher: Path) -> None:
    recipe = fgm_recipe(
        tmp_path,
        teacher,
        optim=OptimConfig(lr=1e-3, betas=(0.0, 0.9), ema_decays=(0.9,)),
        fake_optim=OptimConfig(lr=2e-3, betas=(0.5, 0.99)),
        method=FGMOptions(fake_steps=3),
    )
    trainer = recipe.build()
    assert [(p.name, p.repeats) for p in trainer.phases] == [("fake", 3), ("generator", 1)]
    generator, fake = (trainer.optimizers[name] for name in ("generator", "fake"))
    assert float(generator.param_groups[0]["lr"]) == pytest.approx(1e-3)
    assert float(fake.param_groups[0]["lr"]) == pytest.approx(2e-3)
    assert (generator.ema_decays, fake.ema_decays) == ((0.9,), ())
    trainer._train_step()
    states = list(generator.state.values())
    assert states
    assert all("exp_avg" not in state for state in states)  # β1 = 0: no first moment kept
    steps = {float(state["step"]) for state in fake.state.values()}
    assert steps == {3.0}


def test_student_starts_as_its_teacher(tmp_path: Path, teacher: Path) -> None:
    """Before any update (lr 0), one step of the student is one Euler step of the teacher."""
    still = OptimConfig(lr=0.0)
    fgm_recipe(tmp_path, teacher, steps=1, optim=still, fake_optim=still).build().run()
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    ours, theirs = (load_model(folder).generate(noise, 1, labels) for folder in (tmp_path, teacher))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # one rounding of fp32


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    results = []
    for flag in (False, True):
        trainer = teacher_recipe(tmp_path / str(flag), gradient_checkpointing=flag).build()
        assert trainer.method.model.config.gradient_checkpointing is flag
        trainer.run()
        results.append(weights(tmp_path / str(flag)))
    assert results[0] == results[1]
    assert load_model(tmp_path / "True").network.config.gradient_checkpointing is False


def test_bf16_recipe_trains_and_resumes_bitwise(tmp_path: Path, teacher: Path) -> None:
    for folder, stop in (("whole", None), ("broken", 2)):
        trainer = fgm_recipe(tmp_path / folder, teacher, precision="bf16").build()
        if stop is not None:
            break_after(trainer, stop)
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
            trainer = fgm_recipe(tmp_path / folder, teacher, precision="bf16").build()
        trainer.run()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    before = load_file(teacher / "weights.safetensors")
    after = load_file(tmp_path / "whole" / "weights.safetensors")
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_unconditional_training(tmp_path: Path) -> None:
    data = DataConfig(labels=False)
    recipe = teacher_recipe(tmp_path / "teacher", data=data)
    recipe.method = dataclasses.replace(recipe.method, drop_condition=0.0)
    recipe.build().run()
    model = load_model(tmp_path / "teacher")
    assert model.num_classes == 0
    assert model.generate(torch.randn(2, 1, 8, 8), 2).shape == (2, 1, 8, 8)
    fgm_recipe(tmp_path / "student", tmp_path / "teacher", data=data).build().run()
    assert load_model(tmp_path / "student").one_step


def test_folder_and_cifar_recipes_train(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    content = {b"data": random.integers(0, 256, (6, 3072), dtype=np.uint8), b"labels": [0] * 6}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    for data, shape, classes in (
        (DataConfig("folder", str(tmp_path / "pictures"), image_size=8, flip=True), (3, 8, 8), 2),
        (DataConfig("cifar10", str(tmp_path), split="test", flip=True), (3, 32, 32), 10),
    ):
        output = tmp_path / f"run-{data.kind}"
        teacher_recipe(output, data=data, steps=2).build().run()
        model = load_model(output)
        assert (model.shape, model.num_classes) == (shape, classes)
        assert model.data == data
        assert (output / "samples" / "step-00000002.png").exists()


def test_teacher_and_data_must_fit(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"data: images \(1, 8, 8\) of 0 classes, but the model"):
        fgm_recipe(tmp_path, teacher, data=DataConfig(labels=False)).build()
    with pytest.raises(UsageError, match="grid_steps: got 4, needs 1"):
        fgm_recipe(tmp_path, teacher, grid_steps=4).build()
    with pytest.raises(UsageError, match=r"t_star is 2\.0"):
        fgm_recipe(tmp_path, teacher, method=FGMOptions(t_star=2.0)).build()


def test_compiled_blocks_train_and_export_plain_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wiring, with the compiler that stops before code is generated: seconds, not minutes."""
    compiled_blocks = []

    def compile_quickly(self: torch.nn.Module, **options: Any) -> None:
        compiled_blocks.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(
            self._call_impl, backend="aot_eager", fullgraph=True, **options
        )

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    for flag in (True, False):
        teacher_recipe(tmp_path / str(flag), compile=flag, steps=2).build().run()
    assert compiled_blocks == ["JointBlock", "JointBlock"]
    compiled, plain = (load_file(tmp_path / f / "weights.safetensors") for f in ("True", "False"))
    assert compiled.keys() == plain.keys()
    # The same arithmetic, decomposed; Adam's first steps are ±lr (1e-2) whatever the gradient's
    # size, so where a gradient is all but zero its sign, and with it the step, may differ.
    differences = torch.cat([(compiled[n] - plain[n]).abs().flatten() for n in plain])
    assert (differences < 1e-4).double().mean() > 0.98
    assert differences.max() <= 4.1e-2
