"""SCFlow in the trainer: its phases, resumes, exports and tables; at a size of milliseconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowkernels.cli import main
from flowkernels.distill import SCFlow
from flowkernels.nn import LatentDiscriminator, LatentDiscriminatorConfig
from flowkernels.train.checkpoint import list_checkpoints, load_checkpoint
from flowkernels.train.config import DataConfig, OptimConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.evaluate import EvaluateConfig, evaluate
from flowkernels.train.export import load_model
from flowkernels.train.recipe_file import load_recipe
from flowkernels.train.recipes import FGMRecipe, ModelConfig, TeacherRecipe
from flowkernels.train.scflow import DiscriminatorOptions, SCFlowOptions, SCFlowRecipe
from flowkernels.train.trainer import Trainer
from tests.train.toy import ToyNetwork, toy_config

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "device": "cpu",
    "tensorboard": False,
    "grid_rows": 1,
    "save_every": 1,
    "data": DataConfig(split="test"),  # the smaller part
}
AVERAGED = OptimConfig(lr=1e-2, ema_decays=(0.5,))
# Every term begins on the way, the penalty comes every other step.
METHOD = SCFlowOptions(bidirectional_warmup=1, reflow_warmup=2, gan_warmup=1, r1_every=2)
LATENT = DiscriminatorOptions(width=4, depth=1)
FEATURE = DiscriminatorOptions(kind="feature", width=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def make_teacher(output: Path, seed: int = 0) -> Path:
    model = ModelConfig(dim=16, depth=2, heads=2)
    settings = {**SMALL, "grid_steps": 2, "optim": AVERAGED, "model": model, "seed": seed}
    assert TeacherRecipe(output=str(output), **settings).build().run() == "finished"
    return output


def recipe(output: Path, teacher: Path, **changes: Any) -> SCFlowRecipe:
    settings = {
        **SMALL, "optim": AVERAGED, "discriminator_optim": OptimConfig(lr=1e-2),
        "method": METHOD, "discriminator": LATENT, **changes,
    }  # fmt: skip
    return SCFlowRecipe(output=str(output), teacher=str(teacher), **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    output = tmp_path_factory.mktemp("scflow")
    assert recipe(output, teacher).build().run() == "finished"
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


# ---- the runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stop"), [("latent", 1), ("latent", 3), ("feature", 2)])
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, teacher: Path, kind: str, stop: int
) -> None:
    changes: dict[str, Any] = {"precision": "bf16"}
    if kind == "feature":
        options = copy.copy(METHOD)
        options.discriminator_input = "noised"
        changes = {"method": options, "discriminator": FEATURE}
    recipe(tmp_path / "whole", teacher, **changes).build().run()
    broken = recipe(tmp_path / "broken", teacher, **changes).build()
    break_after(broken, stop)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    # The teacher is trained anew in the meantime: the run goes on with the one it began with.
    other = make_teacher(tmp_path / "other", seed=7)
    recipe(tmp_path / "broken", other, **changes).build().run()
    states = []
    for folder in ("whole", "broken"):
        step, state = load_checkpoint(list_checkpoints(tmp_path / folder)[-1][1])
        assert step == state["method"]["_extra_state"]["step"] == 4
        states.append(state)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    for name, value in states[0]["method"].items():
        same = states[1]["method"][name]
        assert torch.equal(value, same) if isinstance(value, Tensor) else value == same
    for name, value in load_file(teacher / "weights.safetensors").items():
        assert torch.equal(states[1]["method"][f"teacher.{name}"], value)


def test_discriminator_updates_see_the_students_batch(tmp_path: Path, teacher: Path) -> None:
    """One batch a step (two, accumulated), and the student is called in its own phase alone."""
    for accumulate in (1, 2):
        run = recipe(tmp_path / str(accumulate), teacher, accumulate=accumulate).build()
        assert [(p.name, p.same_batch) for p in run.phases] == [
            ("student", False),
            ("discriminator", True),
        ]
        seen: list[tuple[str | None, int, int]] = []
        losses = run.method.losses
        calls: list[int] = []
        run.method.student.register_forward_hook(lambda *_, calls=calls: calls.append(1))

        def watched(
            batch: dict[str, Tensor], phase: str | None = None, seen: Any = seen,
            losses: Any = losses, calls: Any = calls,
        ) -> dict[str, Tensor]:  # fmt: skip
            before = len(calls)
            found: dict[str, Tensor] = losses(batch, phase)
            seen.append((phase, id(batch["x0"]), len(calls) - before))
            return found

        run.method.losses = watched  # type: ignore[method-assign]
        run.method.step = 3  # past every warm-up
        run._train_step()
        phases = [phase for phase, _, _ in seen]
        assert phases == ["student"] * accumulate + ["discriminator"] * accumulate
        batches = [batch for _, batch, _ in seen]
        assert batches[:accumulate] == batches[accumulate:]
        assert len(set(batches)) == accumulate
        assert [count for _, _, count in seen] == [2] * accumulate + [0] * accumulate


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    """No value is read on the host: no `.item()`, no `bool(tensor)`, no `.tolist()`."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert "_local_scalar_dense" not in str(func), "a step read a value from the device"
            return func(*args, **(kwargs or {}))

    # (The MM-DiT's attention on a CPU asks for itself whether a row had no key.)
    torch.manual_seed(0)
    judge = LatentDiscriminator(LatentDiscriminatorConfig(1, width=4, depth=1, num_classes=10))
    warmups = {"bidirectional_warmup": 1, "gan_warmup": 1, "reflow_warmup": 2, "r1_every": 2}
    run = Trainer(SCFlow(ToyNetwork(), judge, **warmups), toy_config(tmp_path))
    run.loader.next_batch()
    with NoReads():
        for _ in range(4):
            run._train_step()


def test_target_moves_once_a_step_and_the_average_starts_from_the_teacher(
    tmp_path: Path, teacher: Path
) -> None:
    slow = OptimConfig(lr=1e-2, ema_decays=(0.9999,))
    run = recipe(tmp_path, teacher, optim=slow, accumulate=2).build()
    before = load_file(teacher / "weights.safetensors")
    run._train_step()
    student, target = run.method.student.state_dict(), run.method.target.state_dict()
    average = run.optimizers["student"].ema_state_dict(run.method.student, 0)
    for name, weight in before.items():
        expected = torch.lerp(weight, student[name], 0.1)
        torch.testing.assert_close(target[name], expected, rtol=1e-5, atol=1e-7)
        expected = torch.lerp(weight, student[name], 1e-4)
        torch.testing.assert_close(average[name], expected, rtol=1e-5, atol=1e-7)


def test_phases_have_their_own_settings(tmp_path: Path, teacher: Path) -> None:
    run = recipe(
        tmp_path,
        teacher,
        optim=OptimConfig(lr=1e-3, max_grad_norm=1e-3),
        discriminator_optim=OptimConfig(lr=2e-3, betas=(0.0, 0.99)),
    ).build()
    student, discriminator = (run.optimizers[name] for name in ("student", "discriminator"))
    assert float(student.param_groups[0]["lr"]) == pytest.approx(1e-3)
    assert float(discriminator.param_groups[0]["lr"]) == pytest.approx(2e-3)
    assert (student.max_grad_norm, discriminator.max_grad_norm) == (1e-3, None)
    for _ in range(2):
        run._train_step()
        assert float(student.grad_norm) > 1e-3  # there was something to clip, every time
    trained = {id(p) for group in discriminator.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.method.discriminator.parameters()}


def test_what_is_differentiated_twice_is_not_compiled(tmp_path: Path, teacher: Path) -> None:
    """R1 goes through the discriminator's gradient, and compiled code has no second backward."""
    for r1, compiled in ((1.0, False), (0.0, True)):
        method = copy.copy(METHOD)
        method.r1 = r1
        run = recipe(tmp_path, teacher, method=method, compile=True).build().method
        for network in (run.teacher, run.student, run.target):
            assert all(block._compiled_call_impl is not None for block in network.blocks)
        for block in run.discriminator.blocks:
            assert (block._compiled_call_impl is not None) == compiled
    with pytest.raises(UsageError, match=r"compile: got True, needs False or method\.r1 0"):
        recipe(tmp_path, teacher, discriminator=FEATURE, compile=True).build()


def test_a_weight_of_0_trains_without_its_networks(tmp_path: Path, teacher: Path) -> None:
    alone = SCFlowOptions(bidirectional=0.0, gan=0.0, reflow=0.0)
    run = recipe(tmp_path, teacher, method=alone).build()
    assert [phase.name for phase in run.phases] == ["student"]
    assert run.method.discriminator is None
    assert run.run() == "finished"
    assert (
        load_model(tmp_path).generate(torch.randn(2, 1, 8, 8), 2, torch.arange(2)).isfinite().all()
    )


def test_student_starts_as_its_teacher(tmp_path: Path, teacher: Path) -> None:
    recipe(tmp_path, teacher, steps=1, optim=OptimConfig(lr=0.0)).build().run()
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for steps in (1, 3):
        ours, theirs = (
            load_model(folder).generate(noise, steps, labels) for folder in (tmp_path, teacher)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # one rounding of fp32


def test_unconditional_and_guided(tmp_path: Path, teacher: Path) -> None:
    guided = copy.copy(METHOD)
    guided.guidance = 2.0
    recipe(tmp_path / "guided", teacher, method=guided).build().run()
    data = DataConfig(split="test", labels=False)
    plain = TeacherRecipe(
        output=str(tmp_path / "teacher"), model=ModelConfig(dim=8, depth=1, heads=1),
        **{**SMALL, "data": data, "steps": 1},
    )  # fmt: skip
    plain.method.drop_condition = 0.0
    plain.build().run()
    recipe(tmp_path / "x", tmp_path / "teacher", data=data).build().run()
    assert load_model(tmp_path / "x").generate(torch.randn(2, 1, 8, 8), 2).isfinite().all()
    with pytest.raises(UsageError, match=r"method.guidance: got 2\.0, needs 1\.0"):
        recipe(tmp_path / "y", tmp_path / "teacher", data=data, method=guided).build()


# ---- settings, commands, tables -----------------------------------------------------------------


def test_settings_that_do_not_fit(tmp_path: Path, teacher: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=message):
            recipe(tmp_path, teacher, **changes).build()

    refused("data: images .* of 0 classes, but the model", data=DataConfig(labels=False))
    refused(r"delta is 2\.0; it must lie in", method=SCFlowOptions(delta=2.0))
    refused("discriminator: depth is 0", discriminator=DiscriminatorOptions(depth=0))
    feature = DiscriminatorOptions(kind="feature", layers=(9,))
    refused("discriminator: layers is", discriminator=feature)
    refused("discriminator_optim.lr: got -1", discriminator_optim=OptimConfig(lr=-1))
    FGMRecipe(output=str(tmp_path / "fgm"), teacher=str(teacher), **SMALL).build().run()
    with pytest.raises(UsageError, match="holds a student of few steps, not a flow"):
        recipe(tmp_path / "x", tmp_path / "fgm").build()


def test_command_trains_and_samples(tmp_path: Path, teacher: Path) -> None:
    arguments = ["--teacher", str(teacher), "--output", str(tmp_path), "--device", "cpu"]
    arguments += ["--data.split", "test"]
    small = ["--steps", "2", "--batch-size", "4", "--no-tensorboard", "--discriminator.width", "4"]
    assert main(["distill", "scflow", *arguments, *small]) == 0
    drawn = ["--run", str(tmp_path), "--steps", "2", "--rows", "1", "--device", "cpu"]
    assert main(["sample", *drawn]) == 0
    assert (tmp_path / "samples.png").exists()


def test_evaluate_tables_students_of_every_method(
    tmp_path: Path, teacher: Path, finished: Path
) -> None:
    generator = tmp_path / "fgm"
    FGMRecipe(output=str(generator), teacher=str(teacher), **SMALL).build().run()
    config = EvaluateConfig(
        teacher=str(teacher), student=None, output=str(tmp_path / "judged"), steps=(1, 2),
        students=(str(generator), str(tmp_path / "boss"), str(finished)), student_steps=(1, 2, 4),
        samples=20, device="cpu",
    )  # fmt: skip
    with pytest.raises(UsageError, match="boss holds no finished student"):
        evaluate(config)
    config.missing = "skip"
    console = Console(record=True, width=100)
    rows = evaluate(config, console)
    assert [(row.name, row.steps) for row in rows[1:]] == [
        ("teacher", 1),
        ("teacher", 2),
        ("FGM", 1),
        ("SCFlow", 1),
        ("SCFlow", 2),
        ("SCFlow", 4),
    ]
    text = console.export_text()
    again = tmp_path / "again"  # two of one method are told apart by their folders
    again.symlink_to(finished)
    config.students, config.steps, config.student_steps = (str(finished), str(again)), (1,), (2,)
    names = [row.name for row in evaluate(config, Console(quiet=True))]
    assert names[2:] == [f"SCFlow, {finished.name}", "SCFlow, again"]
    assert "boss holds no finished student (model.json): left out" in " ".join(text.split())
    config.student_steps = (0,)
    with pytest.raises(UsageError, match=r"student_steps: got \(0,\)"):
        evaluate(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("digits-scflow", SCFlowRecipe),
        ("digits-scflow-evaluate", EvaluateConfig),
        ("cifar10-scflow", SCFlowRecipe),
        ("folder-scflow", SCFlowRecipe),
    ],
)
def test_recipes_are_valid(name: str, kind: type) -> None:
    load_recipe(kind, ROOT / "recipes" / f"{name}.yaml").validate()
