"""flowkernels schedule: its options reach the search, and what they are for is in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from flowkernels.cli import main
from flowkernels.ode import bellman_path, bellman_schedule
from flowkernels.ode.bellman import BellmanSchedules
from flowkernels.train.checkpoint import save_weights
from flowkernels.train.config import OptimConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.export import load_model
from flowkernels.train.recipe_file import load_recipe
from flowkernels.train.recipes import ModelConfig, TeacherRecipe
from flowkernels.train.scheduling import ScheduleConfig, schedule

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--grid",
    "10",
    "--noises",
    "6",
    "--bootstrap",
    "0",
    "--budgets",
    "2",
    "3",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that bends: a fresh network's output is all but zero."""
    output = tmp_path_factory.mktemp("teacher")
    settings: dict[str, Any] = {
        "steps": 1, "batch_size": 4, "device": "cpu", "tensorboard": False, "grid_rows": 1,
        "save_every": 1, "grid_steps": 2, "optim": OptimConfig(ema_decays=(0.5,)),
        "model": ModelConfig(dim=16, depth=1, heads=2),
    }  # fmt: skip
    assert TeacherRecipe(output=str(output), **settings).build().run() == "finished"
    weights = load_file(output / "weights.safetensors")
    generator = torch.Generator().manual_seed(0)
    bent = {n: w + 0.2 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_weights(output / "weights.safetensors", bent)
    return output


def _run(teacher: Path, output: Path, *options: str) -> BellmanSchedules:
    places = ["--teacher", str(teacher), "--output", str(output)]
    assert main(["schedule", *places, *SMALL, *options]) == 0
    return BellmanSchedules.load(output / "schedules.json")


def test_power_and_discount_are_those_of_the_search(teacher: Path, tmp_path: Path) -> None:
    found = _run(teacher, tmp_path, "--power", "1", "--discount", "1.15")
    assert found.settings["power"] == 1.0
    assert found.settings["discount"] == 1.15
    model = load_model(teacher, "cpu")
    noise = torch.randn((6, *model.shape), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % model.num_classes
    expected = bellman_schedule(
        model.network, noise, grid=10, budgets=(2, 3), conditions={"labels": labels}, power=1,
        discount=1.15, bootstrap=0,
    )  # fmt: skip
    assert found.schedules == expected.schedules
    torch.testing.assert_close(found.cost, expected.cost, rtol=1e-12, atol=0)
    by_hand = bellman_path(expected.cost, expected.grid, (2, 3), discount=1.15)
    assert found.schedules == dict(by_hand)


def test_endpoints_are_printed_and_saved(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = _run(teacher, tmp_path / "plain")
    assert not plain.endpoints
    assert "endpoint  even steps" not in capsys.readouterr().out
    found = _run(teacher, tmp_path / "compared", "--endpoints")
    printed = capsys.readouterr().out
    assert "endpoint  even steps" in printed
    assert set(found.endpoints) == {2, 3}
    for each in found.endpoints.values():
        assert each.error > 0
        assert f"{each.error:.4g}" in printed
    assert found.schedules == plain.schedules


def test_a_search_that_makes_no_sense_is_a_usage_error(teacher: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    for change, message in (
        ({"discount": -0.5}, "discount: got -0.5"),
        ({"power": -1.0}, "power: got -1"),
        ({"budgets": (11,)}, "11"),
    ):
        config = ScheduleConfig(
            teacher=str(teacher), output=str(tmp_path), grid=10, noises=2, device="cpu", **change
        )
        with pytest.raises(UsageError, match=message):
            schedule(config, quiet)


def test_the_recipe_reads() -> None:
    config = load_recipe(ScheduleConfig, ROOT / "recipes" / "digits-schedule.yaml")
    assert (config.power, config.discount, config.endpoints) == (2.0, 1.0, False)
