"""Recipes of the siblings: contrastive and Consistency-FM teachers, SiD, and a run begun with
another's weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowkernels.cli import main
from flowkernels.distill import ConsistencyFM, FlowMatching
from flowkernels.train.checkpoint import list_checkpoints, load_checkpoint
from flowkernels.train.config import DataConfig, OptimConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.export import load_model
from flowkernels.train.recipe_file import load_recipe
from flowkernels.train.recipes import (
    ConsistencyOptions,
    FGMRecipe,
    FlowMatchingOptions,
    ModelConfig,
    TeacherRecipe,
)
from flowkernels.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CONTRASTIVE: dict[str, Any] = {"method": FlowMatchingOptions(contrastive=0.05)}
CONSISTENCY: dict[str, Any] = {
    "kind": "consistency-fm",
    "consistency": ConsistencyOptions(delta=0.1, target_decay=0.5),
}


def recipe(output: Path, **changes: Any) -> TeacherRecipe:
    settings: dict[str, Any] = {
        "steps": 4,
        "batch_size": 8,
        "device": "cpu",
        "tensorboard": False,
        "grid_rows": 1,
        "grid_steps": 2,
        "save_every": 1,
        "optim": OptimConfig(lr=1e-2, ema_decays=(0.5,)),
        "model": ModelConfig(dim=16, depth=1, heads=2),
    }
    return TeacherRecipe(output=str(output), **{**settings, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher")
    assert recipe(output).build().run() == "finished"
    return output


def broken_off(trainer: Trainer, steps: int) -> None:
    """Run it, and fail as it begins the step after that many."""
    step = trainer._train_step

    def watched() -> None:
        if trainer.step == steps:
            raise KeyboardInterrupt
        step()

    trainer._train_step = watched  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


@pytest.mark.parametrize("options", [CONTRASTIVE, CONSISTENCY], ids=["contrastive", "consistency"])
def test_resume_is_bitwise(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe(tmp_path / "whole", **options).build().run()
    broken_off(recipe(tmp_path / "broken", **options).build(), 2)
    recipe(tmp_path / "broken", **options).build().run()
    ours, theirs = (
        (tmp_path / name / f"checkpoint-{4:08d}" / "tensors.safetensors").read_bytes()
        for name in ("broken", "whole")
    )
    assert ours == theirs
    weights = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("broken", "whole")]
    assert weights[0] == weights[1]


def test_the_trainer_moves_the_target_after_each_step_and_saves_it(tmp_path: Path) -> None:
    trainer = recipe(tmp_path, **CONSISTENCY).build()
    method = trainer.method
    assert isinstance(method, ConsistencyFM)
    expected = {name: value.clone() for name, value in method.model.named_parameters()}
    for _ in range(3):
        trainer._train_step()
        for name, now in method.model.named_parameters():
            expected[name].lerp_(now.detach(), 0.5)
    for name, kept in method.target.named_parameters():
        torch.testing.assert_close(kept, expected[name])
    trainer.save()
    _, state = load_checkpoint(list_checkpoints(tmp_path)[-1][1])
    for name, kept in method.target.named_parameters():
        assert torch.equal(state["method"][f"target.{name}"], kept)


@pytest.mark.parametrize("options", [{}, CONSISTENCY], ids=["plain", "consistency"])
def test_a_run_may_start_from_another(
    tmp_path: Path, teacher: Path, options: dict[str, Any]
) -> None:
    """With its weights and its size; at a learning rate of 0 nothing else comes of it."""
    still, other_size = OptimConfig(lr=0.0), ModelConfig(dim=32, depth=2, heads=2)
    settings = {**options, "start": str(teacher), "optim": still, "model": other_size}
    recipe(tmp_path, **settings).build().run()
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (tmp_path, teacher))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_started_run_learns_and_goes_on_without_what_it_started_from(
    tmp_path: Path, teacher: Path
) -> None:
    options = {**CONSISTENCY, "start": str(teacher)}
    recipe(tmp_path / "whole", **options).build().run()
    broken_off(recipe(tmp_path / "broken", **options).build(), 2)
    other = tmp_path / "other"
    recipe(other, seed=5).build().run()
    recipe(tmp_path / "broken", **{**options, "start": str(other)}).build().run()
    ours, theirs = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("broken", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = load_file(teacher / "weights.safetensors")
    assert any(not torch.equal(ours[name], before[name]) for name in before)


def test_what_comes_out_is_a_flow_of_any_number_of_steps(tmp_path: Path) -> None:
    recipe(tmp_path, **CONSISTENCY).build().run()
    model = load_model(tmp_path)
    assert model.is_flow
    assert model.info["method"] == "ConsistencyFM"
    for steps in (1, 2, 3):
        images = model.generate(torch.randn(2, 1, 8, 8), steps, torch.arange(2))
        assert bool(images.isfinite().all())


def test_bf16_trains_float32_weights_and_target(tmp_path: Path) -> None:
    trainer = recipe(tmp_path, precision="bf16", **CONSISTENCY).build()
    before = [p.detach().clone() for p in trainer.method.model.parameters()]
    trainer.run()
    now = list(trainer.method.model.parameters())
    assert {p.dtype for p in trainer.method.parameters()} == {torch.float32}
    # Every weight that float32 training moves: none lost its gradient to autocast's cache.
    plain = recipe(tmp_path / "plain", **CONSISTENCY).build()
    plain.run()
    moved = [not torch.equal(*pair) for pair in zip(before, now, strict=True)]
    expected = [
        not torch.equal(*pair)
        for pair in zip(before, list(plain.method.model.parameters()), strict=True)
    ]
    assert moved == expected
    assert any(moved)


def test_bad_settings_are_named(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"method\.contrastive: got 0\.05, needs 0\.0 with kind"):
        recipe(tmp_path, **CONSISTENCY, **CONTRASTIVE).build()
    for options, message in (
        ({"consistency": ConsistencyOptions(segments=0)}, "segments is 0"),
        ({"method": FlowMatchingOptions(drop_condition=2.0)}, r"drop_condition is 2\.0"),
        ({"start": str(tmp_path / "none")}, "is .*none the folder of a finished run"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe(tmp_path, **{**CONSISTENCY, **options}).build()
    with pytest.raises(UsageError, match=r"contrastive is 1\.5"):
        recipe(tmp_path, method=FlowMatchingOptions(contrastive=1.5)).build()
    with pytest.raises(UsageError, match=r"but the model in .* makes .* of 10"):
        recipe(tmp_path, start=str(teacher), data=DataConfig(labels=False)).build()


def test_a_one_step_student_is_no_start(tmp_path: Path, teacher: Path) -> None:
    student = FGMRecipe(
        output=str(tmp_path / "student"), teacher=str(teacher), steps=1, batch_size=4,
        device="cpu", tensorboard=False, grid_rows=1,
    )  # fmt: skip
    student.build().run()
    with pytest.raises(UsageError, match=r"start: .*student holds a student of few steps"):
        recipe(tmp_path / "run", start=str(tmp_path / "student")).build()


def test_consistency_fm_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "kind: consistency-fm\nsteps: 1\nbatch_size: 4\ndevice: cpu\ntensorboard: false\n"
        "grid_rows: 1\ngrid_steps: 2\nmodel: {dim: 16, depth: 1, heads: 2}\n"
        "consistency: {segments: 4, delta: 0.1}\n"
    )
    output = tmp_path / "out"
    command = ["train", "--recipe", str(path), "--output", str(output)]
    assert main([*command, "--consistency.segments", "3"]) == 0
    assert (output / "weights.safetensors").exists()
    assert main([*command, "--fresh", "--consistency.delta", "0"]) == 2
    assert main([*command, "--kind", "consistency"]) == 2


def test_recipes_differ_from_their_parents_in_what_they_are_about() -> None:
    """What they are compared by in docs/siblings.md."""

    def load(kind: type, name: str) -> dict[str, Any]:
        return dataclasses.asdict(load_recipe(kind, ROOT / "recipes" / f"{name}.yaml"))

    sid, fgm = load(FGMRecipe, "digits-sid"), load(FGMRecipe, "digits-fgm")
    assert sid["method"].pop("lam") == pytest.approx(2 * (1 - 1.2))
    assert fgm["method"].pop("lam") == 0
    contrastive, plain = (
        load(TeacherRecipe, "digits-contrastive"),
        load(TeacherRecipe, "digits-teacher"),
    )
    assert (contrastive["method"].pop("contrastive"), plain["method"].pop("contrastive")) == (
        0.05,
        0,
    )
    for ours, theirs in ((sid, fgm), (contrastive, plain)):
        assert {k for k in ours if ours[k] != theirs[k]} == {"output"}
    consistency = load_recipe(TeacherRecipe, ROOT / "recipes" / "digits-consistency-fm.yaml")
    assert consistency.kind == "consistency-fm"
    assert consistency.start == plain["output"]
    assert consistency.grid_steps == consistency.consistency.segments


def test_kinds_build_their_methods(tmp_path: Path) -> None:
    assert type(recipe(tmp_path, **CONTRASTIVE).build().method) is FlowMatching
    assert recipe(tmp_path, **CONTRASTIVE).build().method.contrastive == 0.05
    assert type(recipe(tmp_path, **CONSISTENCY).build().method) is ConsistencyFM
