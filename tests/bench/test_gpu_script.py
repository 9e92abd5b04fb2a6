"""The script behind ``make gpu``: stages stand alone, and a limit is a limit."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_run import LAST_WORDS_SECONDS, Run, StageFailed


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


def test_it_is_interrupted_first_to_write_down_what_it_has(run: Run, tmp_path: Path):
    tests = "import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(60)\n"
    (tmp_path / "test_two.py").write_text(tests)
    report = tmp_path / "tests.xml"
    command = [
        sys.executable, "-m", "pytest", str(tmp_path), f"--junitxml={report}",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    with pytest.raises(StageFailed, match="ran past its"):
        run.command("tests", command, 10, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert 'name="test_quick"' in report.read_text()


def test_a_report_of_some_tests_is_told_with_what_ended_them(run: Run, monkeypatch):
    def command(self: Run, stage: str, arguments: list[str], seconds: float, **_: str) -> int:
        (run.work / "tests.xml").write_text(
            '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>'
        )
        raise StageFailed("ran past its 1 s")

    monkeypatch.setattr(Run, "command", command)
    with pytest.raises(StageFailed, match=r"2 passed, 1 failed, 2 skipped \(ran past its 1 s\)"):
        gpu.tests(run, 1)


def test_output_goes_to_the_stages_log(run: Run):
    code = run.command("talk", [sys.executable, "-c", "print('hello'); raise SystemExit(3)"], 30)
    assert code == 3
    assert "hello" in run.log("talk").read_text()


def test_logs_are_kept_from_stage_to_stage(tmp_path: Path, monkeypatch):
    """A run that is ended from outside has left those of the stages before."""
    kept: list[str] = []

    def first(run: Run, seconds: float) -> str:
        run.log("first").write_text("what the first one said")
        return ""

    def second(run: Run, seconds: float) -> str:
        kept.append((tmp_path / "gpu.log").read_text())
        return ""

    stages = (gpu.Stage("first", first, 1), gpu.Stage("second", second, 1))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--dry"]) == 0
    assert "what the first one said" in kept[0]


def test_all_stages_fit_in_ten_minutes():
    assert gpu.TOTAL_SECONDS + LAST_WORDS_SECONDS < 600
    assert [stage.name for stage in gpu.STAGES] == [
        "environment", "build", "tests", "benchmarks", "report",
    ]  # fmt: skip


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(gpu, "_gpu_present", lambda: False)
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
