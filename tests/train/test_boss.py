"""BOSS in the trainer: schedules, stored trajectories, students; at a size of milliseconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from flowkernels.cli import main
from flowkernels.distill import trajectory_plan
from flowkernels.ode import sample, uniform
from flowkernels.ode.bellman import BellmanSchedules
from flowkernels.train.boss import BOSSOptions, BOSSRecipe, StepsOptions, TrajectoryOptions
from flowkernels.train.checkpoint import save_weights
from flowkernels.train.config import DataConfig, OptimConfig
from flowkernels.train.data import Loader, TrajectoryDataset, store_trajectories
from flowkernels.train.errors import DataError, UsageError
from flowkernels.train.evaluate import EvaluateConfig, evaluate
from flowkernels.train.export import load_model
from flowkernels.train.recipe_file import load_recipe
from flowkernels.train.recipes import FGMRecipe, FlowMatchingOptions, ModelConfig, TeacherRecipe
from flowkernels.train.scheduling import ScheduleConfig, schedule

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "device": "cpu",
    "tensorboard": False,
    "grid_rows": 1,
    "save_every": 1,
}
AVERAGED = OptimConfig(lr=1e-2, ema_decays=(0.5,))
QUIET = Console(quiet=True)
STORED = TrajectoryOptions(count=20, shard_size=8)
STEPS = StepsOptions(grid=10, noises=6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher")
    model = ModelConfig(dim=16, depth=1, heads=2)
    settings = {**SMALL, "grid_steps": 2, "optim": AVERAGED, "model": model}
    assert TeacherRecipe(output=str(output), **settings).build().run() == "finished"
    # Wide enough to bend: a fresh network's output is all but zero.
    weights = load_file(output / "weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    bent = {n: w + 0.2 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_weights(output / "weights.safetensors", bent)
    return output


def recipe(output: Path, teacher: Path, **changes: Any) -> BOSSRecipe:
    settings = {
        **SMALL, "budgets": (2, 3), "optim": AVERAGED, "steps_of": STEPS, "trajectories": STORED,
        **changes,
    }  # fmt: skip
    return BOSSRecipe(output=str(output), teacher=str(teacher), **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    output = tmp_path_factory.mktemp("boss")
    assert recipe(output, teacher).run(QUIET) == "finished"
    return output


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


# ---- the runs -----------------------------------------------------------------------------------


def test_a_student_for_each_budget(finished: Path, teacher: Path) -> None:
    found = BellmanSchedules.load(finished / "schedules.json")
    assert (finished / "schedules.png").exists()
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for K in (2, 3):
        model = load_model(finished / f"k{K}")
        assert model.schedules == {K: found.schedules[K]}
        assert not model.is_flow
        images = model.generate(noise, K, labels)
        walked = sample(model.network, noise, found.schedules[K], conditions={"labels": labels})
        assert torch.equal(images, walked)
        assert not torch.equal(images, load_model(teacher).generate(noise, K, labels))
        with pytest.raises(UsageError, match=rf"got 5, 1\.0; this student walks in {K} steps"):
            model.generate(noise, 5, labels)
        with pytest.raises(UsageError, match="its own is trained in"):
            model.generate(noise, K, labels, guidance=2.0)
    assert (finished / "k2" / "samples" / "step-00000004.png").exists()


def test_students_start_as_their_teacher(tmp_path: Path, teacher: Path) -> None:
    still = OptimConfig(lr=0.0)
    for options in (BOSSOptions(), BOSSOptions(lora_rank=2)):
        output = tmp_path / str(options.lora_rank)
        recipe(output, teacher, steps=1, budgets=(3,), optim=still, method=options).run(QUIET)
        student = load_model(output / "k3")
        noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
        theirs = load_model(teacher).generate(noise, 3, labels, schedule=student.schedules[3])
        assert torch.equal(student.generate(noise, 3, labels), theirs)


def test_low_rank_students_are_shipped_merged(tmp_path: Path, teacher: Path) -> None:
    recipe(tmp_path, teacher, budgets=(2,), method=BOSSOptions(lora_rank=2)).run(QUIET)
    before, after = (
        load_file(folder / "weights.safetensors") for folder in (teacher, tmp_path / "k2")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:  # by a matrix of rank 2; biases and embeddings are as they were
        values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert values[2:].max() < 1e-6 * values[0]


def test_one_student_for_several_budgets(tmp_path: Path, teacher: Path) -> None:
    recipe(tmp_path, teacher, together=True).run(QUIET)
    model = load_model(tmp_path / "k2-3")
    assert sorted(model.schedules) == [2, 3]


@pytest.mark.parametrize("kind", ["stored", "online"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, teacher: Path, kind: str) -> None:
    trajectories = TrajectoryOptions(kind, count=20, shard_size=8, refresh=3, pool=2)  # type: ignore[arg-type]
    changes: dict[str, Any] = {"trajectories": trajectories, "budgets": (2,)}
    recipe(tmp_path / "whole", teacher, **changes).run(QUIET)
    trainer = next(recipe(tmp_path / "broken", teacher, **changes).trainers(QUIET))
    step = trainer._train_step

    def watched() -> None:
        if trainer.step == 2:
            raise KeyboardInterrupt
        step()

    trainer._train_step = watched  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    recipe(tmp_path / "broken", teacher, **changes).run(QUIET)
    assert weights(tmp_path / "broken" / "k2") == weights(tmp_path / "whole" / "k2")


def test_guidance_reaches_schedules_trajectories_and_the_file(
    tmp_path: Path, teacher: Path
) -> None:
    recipe(tmp_path, teacher, budgets=(2,), method=BOSSOptions(guidance=3.0)).run(QUIET)
    assert BellmanSchedules.load(tmp_path / "schedules.json").settings["guidance"] == 3.0
    dataset = TrajectoryDataset(tmp_path / "trajectories")
    states = dataset.images(torch.arange(3))
    expected = load_model(teacher).generate(states[:, 0], 10, dataset.labels[:3], guidance=3.0)
    torch.testing.assert_close(states[:, -1], expected, rtol=1e-5, atol=1e-5)  # another batch size
    info = json.loads((tmp_path / "k2" / "model.json").read_text())
    assert info["schedules"]["guidance"] == 3.0


def test_reflow_shares_the_trajectories(finished: Path, tmp_path: Path, teacher: Path) -> None:
    folder = finished / "trajectories"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shared = TrajectoryOptions(count=20, shard_size=8, path=str(folder))
    even = StepsOptions(kind="uniform", grid=10)
    for path in ("reflow", "reflow-steps"):
        changes: dict[str, Any] = {"steps_of": even, "trajectories": shared, "budgets": (3,)}
        output = tmp_path / path
        recipe(output, teacher, method=BOSSOptions(path=path), **changes).run(QUIET)
        model = load_model(output / "k3")
        assert model.schedules == {3: uniform(3)}
        assert not (output / "trajectories").exists()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- trajectories on disk -----------------------------------------------------------------------


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "teacher": "t", "times": [1.0, 0.5, 0.0], "shape": [1, 2, 2], "classes": ["a", "b", "c"],
        "count": 10, "shard_size": 4, "seed": 0, **changes,
    }  # fmt: skip


def halved(noise: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    shifted = noise + conditions["labels"].view(-1, 1, 1, 1)
    return torch.stack([noise, shifted / 2, shifted / 4], 1)


def store(folder: Path, roll: Any = halved, **changes: Any) -> TrajectoryDataset:
    labels = torch.tensor([0, 1, 1, 2])
    return store_trajectories(folder, roll, settings(**changes), labels, torch.device("cpu"))


def test_generation_goes_on_with_the_missing_shard(tmp_path: Path) -> None:
    whole = store(tmp_path / "whole")
    calls = []

    def killed(noise: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(len(noise))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return halved(noise, conditions)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "broken", killed)
    with pytest.raises(DataError, match=r"states-00001.safetensors: missing; the trajectories"):
        TrajectoryDataset(tmp_path / "broken")
    # A shard cut short counts as missing.
    path = tmp_path / "broken" / "states-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    calls.clear()
    again = store(tmp_path / "broken", lambda n, c: (calls.append(len(n)), halved(n, c))[1])
    assert calls == [4, 4, 2]
    everything = torch.arange(10)
    assert torch.equal(again.images(everything), whole.images(everything))
    assert torch.equal(again.labels, whole.labels)
    assert set(whole.labels.tolist()) == {0, 1, 2}
    for name in ("states-00000", "states-00002"):
        file = f"{name}.safetensors"
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_loader_deals_trajectories(tmp_path: Path) -> None:
    dataset = store(tmp_path)
    assert (len(dataset), dataset.shape, dataset.classes) == (10, (1, 2, 2), ("a", "b", "c"))
    batch = Loader(dataset, 5, flip=True).next_batch()
    assert sorted(batch) == ["labels", "trajectory"]
    assert batch["trajectory"].shape == (5, 3, 1, 2, 2)
    noise, middle, _ = batch["trajectory"].unbind(1)
    # Not mirrored: a trajectory belongs to its noise.
    torch.testing.assert_close(middle, (noise + batch["labels"].view(-1, 1, 1, 1)) / 2)
    everything = {tuple(x.flatten().tolist()) for x in dataset.images(torch.arange(10))}
    assert all(tuple(x.flatten().tolist()) in everything for x in batch["trajectory"])


def test_stored_states_are_the_teachers(finished: Path, teacher: Path) -> None:
    dataset = TrajectoryDataset(finished / "trajectories")
    found = BellmanSchedules.load(finished / "schedules.json")
    plan = trajectory_plan(10, 1.0, [each.times for each in found.schedules.values()])
    assert torch.equal(dataset.times, plan.times)
    states, labels = dataset.images(torch.arange(8)), dataset.labels[:8]
    walked = sample(
        load_model(teacher).network, states[:, 0], plan.schedule,
        conditions={"labels": labels}, return_trajectory=True,
    )  # fmt: skip
    assert torch.equal(states, walked[list(plan.kept)].transpose(0, 1))


def test_trajectories_of_other_settings_are_refused(tmp_path: Path) -> None:
    store(tmp_path)
    with pytest.raises(UsageError, match="holds those of another teacher, count; remove"):
        store(tmp_path, teacher="u", count=11)
    (tmp_path / "trajectories.json").write_text("{")
    with pytest.raises(DataError, match=r"trajectories\.json: damaged"):
        store(tmp_path)
    with pytest.raises(DataError, match=r"trajectories\.json: cannot be read"):
        TrajectoryDataset(tmp_path / "nowhere")


# ---- settings that do not fit -------------------------------------------------------------------


def test_settings_that_do_not_fit(tmp_path: Path, teacher: Path, finished: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=message):
            recipe(tmp_path / "x", teacher, **changes).run(QUIET)

    refused(r"budgets: got \(2, 2\), needs different numbers", budgets=(2, 2))
    refused(r"budgets: got \(\), needs", budgets=())
    refused(r"budgets: got 11, need", budgets=(11,))
    refused(r"trajectories.count: got 0", trajectories=TrajectoryOptions(count=0))
    refused("data: images .* of 0 classes, but the model", data=DataConfig(labels=False))
    uniform_file = StepsOptions(kind="uniform", path="there.json")
    refused("steps_of.path: got 'there.json', needs no value", steps_of=uniform_file)
    refused("steps_of.path: nowhere.json: ", steps_of=StepsOptions(path="nowhere.json"))
    other = StepsOptions(path=str(finished / "schedules.json"), grid=20)
    refused("schedules.json is of another grid", steps_of=other)
    refused("weighting is 'dt2', but reflow", method=BOSSOptions(path="reflow", weighting="dt2"))
    student = str(finished / "k2")
    with pytest.raises(UsageError, match="holds a student of few steps, not a flow"):
        BOSSRecipe(output=str(tmp_path / "x"), teacher=student, **SMALL).run(QUIET)
    with pytest.raises(UsageError, match="holds a student of few steps, not a flow"):
        FGMRecipe(output=str(tmp_path / "x"), teacher=student, **SMALL).build()


def test_guidance_needs_classes(tmp_path: Path) -> None:
    unconditional = {**SMALL, "data": DataConfig(labels=False), "steps": 1}
    output = str(tmp_path / "teacher")
    TeacherRecipe(
        output=output, model=ModelConfig(dim=8, depth=1, heads=1),
        method=FlowMatchingOptions(drop_condition=0.0), grid_steps=1, **unconditional,
    ).build().run()  # fmt: skip
    changes = {"data": DataConfig(labels=False), "budgets": (2,)}
    with pytest.raises(UsageError, match=r"method.guidance: got 2\.0, needs 1\.0"):
        recipe(tmp_path / "x", output, method=BOSSOptions(guidance=2.0), **changes).run(QUIET)
    recipe(tmp_path / "x", output, **changes).run(QUIET)
    assert load_model(tmp_path / "x" / "k2").generate(torch.randn(2, 1, 8, 8), 2).isfinite().all()


# ---- commands and tables ------------------------------------------------------------------------


def test_schedule_reports_and_saves(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--teacher", str(teacher), "--output", str(tmp_path), "--device", "cpu"]
    small = ["--grid", "10", "--noises", "6", "--bootstrap", "5", "--budgets", "2", "3"]
    assert main(["schedule", *arguments, *small]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"K\s+cost\s+even steps\s+gain", printed)
    assert str(tmp_path / "schedules.png") in printed
    found = BellmanSchedules.load(tmp_path / "schedules.json")
    for steps, each in found.schedules.items():
        times = " ".join(f"{time:.2f}" for time in each.times.tolist())
        assert f"{steps} steps: {times}" in printed
    # What it writes is what a recipe of the same settings takes.
    steps_of = StepsOptions(path=str(tmp_path / "schedules.json"), grid=10)
    output = tmp_path / "boss"
    recipe(output, teacher, budgets=(3,), steps_of=steps_of).run(QUIET)
    assert load_model(output / "k3").schedules == {3: found.schedules[3]}
    with pytest.raises(UsageError, match="noises: got 0"):
        schedule(ScheduleConfig(teacher=str(teacher), noises=0), QUIET)
    with pytest.raises(UsageError, match="budgets: got none"):
        schedule(ScheduleConfig(teacher=str(teacher), budgets=()), QUIET)


def test_distill_boss_from_the_command_line(tmp_path: Path, teacher: Path) -> None:
    path = tmp_path / "boss.yaml"
    path.write_text(
        f"teacher: {teacher}\nsteps: 1\nbatch_size: 4\ndevice: cpu\ntensorboard: false\n"
        "grid_rows: 1\nsteps_of: {grid: 5, noises: 4}\ntrajectories: {count: 6, shard_size: 3}\n"
    )
    output = tmp_path / "out"
    command = ["distill", "boss", "--recipe", str(path), "--output", str(output)]
    assert main([*command, "--budgets", "2", "--method.lora-rank", "1"]) == 0
    assert (output / "k2" / "weights.safetensors").exists()
    assert main([*command, "--budgets", "0"]) == 2


def test_students_are_evaluated_beside_their_teacher(
    finished: Path, teacher: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        teacher=str(teacher), student=None, students=(str(finished), str(finished / "k2")),
        schedules=str(finished / "schedules.json"), output=str(tmp_path), steps=(2, 3),
        reference_steps=10, samples=60, device="cpu",
    )  # fmt: skip
    rows = evaluate(config, QUIET)
    assert [(row.name, row.steps) for row in rows[1:]] == [
        ("teacher", 10), ("teacher", 2), ("teacher", 3),
        ("teacher, Bellman steps", 2), ("teacher, Bellman steps", 3),
        ("BOSS", 2), ("BOSS", 3), ("BOSS", 2),
    ]  # fmt: skip
    assert rows[1].paired_error is None
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn((60, 1, 8, 8), generator=generator), torch.arange(60) % 10
    reference = load_model(teacher).generate(noise, 10, labels)
    images = load_model(finished / "k3").generate(noise, 3, labels)
    expected = (images - reference).square().mean().sqrt()
    assert rows[7].paired_error == pytest.approx(float(expected), rel=1e-5)
    saved = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert saved[7]["paired_error"] == rows[7].paired_error
    with pytest.raises(UsageError, match=r"students: .* holds no finished student"):
        evaluate(EvaluateConfig(teacher=str(teacher), student=None, students=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("digits-schedule", ScheduleConfig),
        ("digits-boss", BOSSRecipe),
        ("digits-reflow", BOSSRecipe),
        ("digits-boss-evaluate", EvaluateConfig),
    ],
)
def test_recipes_are_valid(name: str, kind: type) -> None:
    load_recipe(kind, ROOT / "recipes" / f"{name}.yaml").validate()
