"""The script behind ``make gpu``: stages stand alone, and a limit is a limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_run import Run, StageFailed


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(True, tmp_path, tmp_path / "results", time.monotonic() + 60)


def test_a_stage_that_fails_is_an_outcome(run: Run, capsys: pytest.CaptureFixture[str]):
    def broken(run: Run, seconds: float) -> str:
        raise StageFailed("no such kernel")

    outcome = gpu.attempt(gpu.Stage("broken", broken, 1), run)
    assert (outcome.passed, outcome.text) == (False, "no such kernel")
    assert "broken failed: no such kernel" in capsys.readouterr().out


def test_any_other_error_is_one_too(run: Run):
    def broken(run: Run, seconds: float) -> str:
        raise KeyError("rows")

    outcome = gpu.attempt(gpu.Stage("broken", broken, 1), run)
    assert not outcome.passed
    assert outcome.text.startswith("KeyError")


def test_a_process_past_its_limit_is_ended(run: Run):
    start = time.monotonic()
    with pytest.raises(StageFailed, match="ran past its 1 s"):
        run.command("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert time.monotonic() - start < 10


def test_output_goes_to_the_stages_log(run: Run):
    code = run.command("talk", [sys.executable, "-c", "print('hello'); raise SystemExit(3)"], 30)
    assert code == 3
    assert "hello" in run.log("talk").read_text()


def test_all_stages_fit_in_ten_minutes():
    assert gpu.TOTAL_SECONDS < 600
    assert [stage.name for stage in gpu.STAGES] == [
        "environment", "build", "tests", "benchmarks", "report",
    ]  # fmt: skip


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(gpu, "_gpu_present", lambda: False)
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
