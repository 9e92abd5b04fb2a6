"""What bellman_schedule found: its table, its file and its picture."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from flowkernels.ode import bellman_schedule, shifted, uniform
from flowkernels.ode.bellman import BellmanSchedules, Stability
from tests.ode.bellman_oracles import mixture

QUICK = {"grid": 20, "bootstrap": 0}


@pytest.fixture
def noise():
    torch.manual_seed(0)
    return torch.randn(12, 3, dtype=torch.float64)


def test_the_report_is_a_table(noise):
    found = bellman_schedule(mixture(3), noise, grid=20, budgets=[2, 4], bootstrap=20)
    lines = str(found.report()).splitlines()
    assert lines[0] == (
        "Bellman schedules from 12 trajectories of 20 euler steps (uniform(20), guidance 1)"
    )
    assert lines[2].split()[:2] == ["K", "cost"]
    assert [line.split()[0] for line in lines[3:5]] == ["2", "4"]


def test_file_restores_everything(tmp_path, noise):
    found = bellman_schedule(mixture(3), noise, grid=shifted(20, 3.0), bootstrap=20, endpoints=True)
    path = tmp_path / "schedules.json"
    path.write_text("what was there before")
    found.save(path)
    assert os.listdir(tmp_path) == ["schedules.json"]  # nothing is left beside it
    restored = BellmanSchedules.load(path)
    assert restored.schedules == found.schedules
    assert [s.origin for s in restored.schedules.values()] == [
        f"bellman({K} of 20)" for K in (2, 4, 6, 8)
    ]
    assert torch.equal(restored.cost, found.cost)
    assert str(restored.report()) == str(found.report())
    for name in ("grid", "stops", "samples", "rises", "stability", "endpoints", "settings"):
        assert getattr(restored, name) == getattr(found, name)


def test_infinite_gains_survive_a_file(tmp_path):
    found = BellmanSchedules(
        grid=uniform(2),
        schedules={1: uniform(1)},
        stops={1: [0, 2]},
        cost=torch.zeros(3, 3, dtype=torch.float64),
        samples=3,
        stability={1: Stability(1.0, 0.0, 2.0, math.inf)},
    )
    found.save(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    assert BellmanSchedules.load(tmp_path / "a.json").stability == found.stability


def test_a_write_that_fails_leaves_the_old_file(tmp_path, noise, monkeypatch):
    found = bellman_schedule(mixture(3), noise, budgets=[2], **QUICK)
    path = tmp_path / "schedules.json"
    found.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        found.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["schedules.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schedules": 3}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"^path: .*a\.json holds no Bellman schedules"):
        BellmanSchedules.load(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_a_file(tmp_path, noise, suffix):
    pytest.importorskip("matplotlib")
    found = bellman_schedule(mixture(3), noise, grid=20, bootstrap=0)
    found.plot(tmp_path / f"cost.{suffix}")
    assert (tmp_path / f"cost.{suffix}").stat().st_size > 5000
