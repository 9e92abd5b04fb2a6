"""``python -m bench.gpu``: on a machine with an NVIDIA GPU, build, test, benchmark and report.

Needs no network: the machine's own Python, torch, Triton, nvcc, CMake and pybind11 are used. Each
stage is a process of its own with a time limit and a log; one that fails is reported, and the rest
goes on. The whole ends within ten minutes. Results go to ``bench/results/<gpu>.{json,md}``, and to
the folder named by the environment variable ``OUT`` where that is set.

``--dry`` runs the same stages on the CPU at tiny shapes, with results in a temporary folder: that
everything is in order before a GPU is at hand. Exits 1 where a stage failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_run import ROOT, Run, StageFailed

TOTAL_SECONDS = 550.0  # and the last words of a stage that is cut off
# A dry run's limits stop what hangs, no more: a busy machine takes many times as long.
DRY_STAGE_SECONDS = 900.0
DRY_BENCHMARK_SECONDS = 60.0
MOST_WORKERS = 16  # each has half a GiB of the GPU for its context


def environment(run: Run, seconds: float) -> str:
    """What this machine is: GPU, driver, clocks, versions."""
    path = run.work / "environment.json"
    code = (
        "import json, sys; from bench import machine as m; "
        f"found = m.describe({run.device!r}) | {{'nvcc': m.nvcc_version(), "
        "'interpreter': m.interpreter()}; "
        "open(sys.argv[1], 'w').write(json.dumps(found, indent=1) + '\\n'); print(found)"
    )
    if run.command("environment", [sys.executable, "-c", code, str(path)], seconds):
        raise StageFailed("this machine cannot be described")
    found = json.loads(path.read_text())
    versions = f"torch {found['torch']}, Triton {found['triton'] or 'none'}, nvcc {found['nvcc']}"
    return f"{found.get('gpu') or found['cpu']}, {versions}"


def build(run: Run, seconds: float) -> str:
    """The native libraries for the chip present; in a dry run, that they could be built."""
    from bench import gpu_build

    return gpu_build.check(run, seconds) if run.dry else gpu_build.build(run, seconds)


def tests(run: Run, seconds: float) -> str:
    """``pytest tests/gpu -m gpu``; a dry run has the same tests on the CPU.

    Nearly all of their time on a GPU is Triton compiling: a process for each core. Where there is
    not enough of it, the report is of the tests that were run.
    """
    report = run.work / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q",
        "-p", "no:cacheprovider", f"--junitxml={report}",
    ]  # fmt: skip
    if not run.dry and importlib.util.find_spec("xdist"):
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        command += ["-n", str(workers), "--dist", "worksteal"]
    problem = ""
    try:
        code = run.command(
            "tests", command, seconds, FLOWKERNELS_GPU_DRY="1" if run.dry else "0",
            TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1",
        )  # fmt: skip
        problem = f"exit code {code}" if code else ""
    except StageFailed as error:
        problem = str(error)
    if not report.is_file():
        raise StageFailed(f"pytest gave no report ({problem})")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {} if suite is None else suite.attrib
    bad = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    skipped = int(counts.get("skipped", 0))
    good = int(counts.get("tests", 0)) - bad - skipped
    text = f"{good} passed, {bad} failed, {skipped} skipped"
    if problem:
        raise StageFailed(f"{text} ({problem})")
    return text


def benchmarks(run: Run, seconds: float) -> str:
    """The benchmark suites against their peers."""
    from bench import report

    command = [sys.executable, "-m", "bench.run", "--device", run.device, "--out", str(run.work),
               "--no-plots"]  # fmt: skip
    if run.dry:
        # The peers are traced as a whole, forward and backward, but compiled to no machine code.
        command += ["--quick", "--compiler", "aot_eager", "--seconds", "0.01"]
    else:
        command += ["--seconds", "0.5"]  # some sixty rounds; compiling the peers takes the time
    # The last case begun may compile for half a minute.
    budget = max(5.0, min(seconds, run.deadline - time.monotonic()) - 45)
    budget = DRY_BENCHMARK_SECONDS if run.dry else budget
    command += ["--budget", f"{budget:.0f}", *run.options]
    code = run.command("benchmarks", command, seconds)
    if code or not run.bench_json.is_file():
        raise StageFailed(f"a variant failed (exit code {code}): see the log")
    return report.verdict(report.load(run.bench_json))


def write_report(run: Run, seconds: float) -> str:
    """Results, plots and the short table, also of a benchmark stage that was cut off."""
    from bench import report

    source = run.bench_json
    if not source.is_file() or not source.stat().st_size:
        source = source.with_suffix(".jsonl")
    if not source.is_file():
        raise StageFailed("there are no benchmark results")
    result = report.load(source)
    if not result.rows:
        raise StageFailed("the benchmarks measured nothing")
    written = report.save(result, run.results) + report.plot(result, run.work)
    if folder := os.environ.get("OUT"):
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for path in [*written, run.work / "environment.json"]:
            if path.is_file():
                shutil.copy(path, target / path.name)
    print(report.compact(result))
    return f"{run.results}/{result.name}.json"


@dataclass(frozen=True)
class Stage:
    """A stage and its limit on a GPU, in seconds."""

    name: str
    action: Callable[[Run, float], str]
    seconds: float


STAGES = (
    Stage("environment", environment, 30),
    Stage("build", build, 120),
    Stage("tests", tests, 240),
    Stage("benchmarks", benchmarks, 300),
    Stage("report", write_report, 30),
)


@dataclass
class Outcome:
    name: str
    passed: bool
    seconds: float
    text: str


def attempt(stage: Stage, run: Run) -> Outcome:
    """Run one stage; whatever it raises is its outcome."""
    limit = DRY_STAGE_SECONDS if run.dry else stage.seconds
    print(f"{stage.name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    try:
        text, passed = stage.action(run, limit), True
    except StageFailed as error:
        text, passed = str(error), False
    except Exception as error:  # the next stages stand on their own
        text, passed = f"{type(error).__name__}: {error}".splitlines()[0], False
    if not passed:
        print(f"{stage.name} failed: {text}\n{tail(run.log(stage.name))}", flush=True)
    return Outcome(stage.name, passed, time.monotonic() - start, text)


def tail(path: Path, lines: int = 25) -> str:
    return (
        "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else ""
    )


def keep_logs(run: Run) -> None:
    """All logs as one file, where results are asked for."""
    if folder := os.environ.get("OUT"):
        logs = sorted(run.work.glob("*.log"))
        text = "".join(f"==== {path.stem}\n{path.read_text(errors='replace')}\n" for path in logs)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "gpu.log").write_text(text)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="the same stages on CPU, tiny")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE",
                        help=f"some of: {', '.join(names)}")  # fmt: skip
    parser.add_argument("-k", default="", help="only benchmarks whose name matches")
    options = parser.parse_args(list(arguments) if arguments is not None else None)

    if not options.dry and not _gpu_present():
        print("bench.gpu: torch sees no NVIDIA GPU here (--dry runs on CPU)", file=sys.stderr)
        return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flowkernels-gpu-") as temporary:
        work = Path(temporary) if options.dry else ROOT / "runs" / "gpu"
        work.mkdir(parents=True, exist_ok=True)
        for old in [*work.glob("*.log"), *work.glob("latest-*")]:
            old.unlink()
        results = work / "results" if options.dry else ROOT / "bench" / "results"
        extra = ["-k", options.k] if options.k else []
        total = len(STAGES) * DRY_STAGE_SECONDS if options.dry else TOTAL_SECONDS
        run = Run(options.dry, work, results, start + total, extra)
        outcomes = []
        for stage in STAGES:
            if stage.name in options.stages:
                outcomes.append(attempt(stage, run))
                keep_logs(run)  # now: what ends the whole run from outside leaves no time for it
    print()
    for outcome in outcomes:
        mark = "ok" if outcome.passed else "FAILED"
        print(f"{outcome.name:<12} {mark:<6} {outcome.seconds:6.1f} s  {outcome.text}")
    print(f"{'total':<12} {'':<6} {time.monotonic() - start:6.1f} s")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _gpu_present() -> bool:
    import torch

    return bool(torch.version.cuda) and torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
