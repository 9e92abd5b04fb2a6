"""Runs that are killed, stopped and resumed, in processes of their own."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowkernels.train.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def run_toy(output: Path, *plan: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.train.run_toy", str(output), str(STEPS)]
    command += [str(word) for word in plan]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    done = run_toy(output)
    assert done.returncode == 0, done.stderr
    return output


def assert_same_result(output: Path, expected: Path) -> None:
    """The exported weights, and every tensor and number of the final state, bit for bit."""
    weights = "weights.safetensors"
    assert (output / weights).read_bytes() == (expected / weights).read_bytes()
    tensors = f"checkpoint-{STEPS:08d}/tensors.safetensors"
    assert (output / tensors).read_bytes() == (expected / tensors).read_bytes()
    ours, theirs = (
        load_checkpoint(folder / f"checkpoint-{STEPS:08d}")[1] for folder in (output, expected)
    )
    for name in ("loader", "meter"):
        assert ours[name] == theirs[name]
    assert ours["random"]["python"] == theirs["random"]["python"]


def test_resume_is_bitwise_after_kill(tmp_path: Path, uninterrupted: Path) -> None:
    # Seeded: a failure can be repeated. Checkpoints are at steps 4, 8 and 12; writing one takes
    # five fsyncs and a rename, so 1 to 6 is within the first checkpoint written by that process.
    draw = random.Random(20).randint
    plans = [
        ("step", draw(0, 3)),  # before any checkpoint
        ("write", draw(1, 3)),  # in the middle of the first checkpoint
        ("step", draw(4, 7)),
        ("write", draw(6, 9)),  # at the rename or after it
        ("step", draw(8, STEPS - 1)),
    ]
    for plan in plans:
        killed = run_toy(tmp_path, *plan)
        assert killed.returncode == -signal.SIGKILL, (plan, killed.stdout, killed.stderr)
    assert run_toy(tmp_path).returncode == 0
    assert_same_result(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".tmp-*"))  # what the killed runs left behind is gone


def test_sigterm_saves_and_exits_zero(tmp_path: Path, uninterrupted: Path) -> None:
    stopped = run_toy(tmp_path, "term", 5)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.strip() == "interrupted"
    assert list_checkpoints(tmp_path)[-1][0] == 6  # the step in which it came was completed
    assert not (tmp_path / "weights.safetensors").exists()
    assert run_toy(tmp_path).stdout.strip() == "finished"
    assert_same_result(tmp_path, uninterrupted)


def test_finished_run_is_not_trained_again(tmp_path: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "weights.safetensors").read_bytes()
    again = run_toy(uninterrupted, "step", 0)  # would be killed in its first step
    assert again.returncode == 0
    assert (uninterrupted / "weights.safetensors").read_bytes() == before
