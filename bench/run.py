"""``python -m bench.run``: measure, print the table, keep the results.

Runs pytest-benchmark over this folder. Results go to ``runs/bench`` (which git ignores); with
``--save`` also to ``bench/results``, named by the machine. Exits 1 where a variant computes
something else than the reference; a missed target is told in the table and is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


# glibc gives large blocks back when they are freed and faults their pages in again at the next
# call (docs/measuring.md). That is what people have, so it is what is measured. With this, memory
# is kept, as GPU allocators and the malloc libraries used for training keep it.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Effort:
    """How thorough: which shapes, seconds for a case, seconds for the whole run (0: no limit)."""

    level: str
    seconds: float
    budget: float


EFFORTS = {
    "quick": Effort("tiny", 0.05, 120),
    # Eight minutes, of which torch.compile takes the most; what the targets name comes first.
    "normal": Effort("default", 2.0, 450),
    "full": Effort("full", 3.0, 0),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    made.add_argument("-k", default="", help="only cases whose name matches, as in pytest -k")
    made.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    made.add_argument("--full", action="store_true", help="every shape; an hour or more")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    made.add_argument("--seconds", type=float, help="time for one case")
    made.add_argument("--budget", type=float, help="seconds after which no case is begun; 0: none")
    made.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    made.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder to write")
    made.add_argument("--save", action="store_true", help="also write bench/results")
    made.add_argument("--no-plots", action="store_true")
    made.add_argument("--keep-memory", action="store_true", help="malloc gives no memory back")
    made.add_argument("--verbose", action="store_true", help="pytest-benchmark's own tables too")
    return made


# Measured in a process of its own, before the others: what glibc has learnt from other cases'
# blocks moves the Bellman cost's ratio from 50 to 11.
ALONE = ROOT / "bench" / "test_bellman.py"
NOTHING_SELECTED = 5  # pytest's exit code


def pytest_command(
    options: argparse.Namespace, paths: list[str], json_path: Path, budget: float
) -> list[str]:
    effort = effort_of(options)
    seconds = effort.seconds if options.seconds is None else options.seconds
    command = [
        sys.executable, "-m", "pytest", *paths, "-q",
        "-p", "no:cacheprovider", "--benchmark-only", "--continue-on-collection-errors",
        f"--benchmark-json={json_path}", f"--rootdir={ROOT}",
        f"--bench-device={options.device}", f"--bench-level={effort.level}",
        f"--bench-seconds={seconds}", f"--bench-budget={budget}",
        f"--bench-threads={options.threads}", f"--bench-compiler={options.compiler}",
        f"--bench-rows={json_path.with_suffix('.jsonl')}",
    ]  # fmt: skip
    if not options.verbose:
        command.append("--benchmark-quiet")
    if options.k:
        command += ["-k", options.k]
    return command


def effort_of(options: argparse.Namespace) -> Effort:
    return EFFORTS["quick" if options.quick else "full" if options.full else "normal"]


def measure(options: argparse.Namespace, json_path: Path, environment: dict[str, str]) -> int:
    """Run the cases, on CPU in two processes; pytest-benchmark's JSON of both is one file."""
    budget = effort_of(options).budget if options.budget is None else options.budget
    ends = time.monotonic() + budget
    parts = {json_path: [str(ROOT / "bench")]}
    if options.device == "cpu":
        alone = json_path.with_stem(f"{json_path.stem}-alone")
        parts = {alone: [str(ALONE)], json_path: [*parts[json_path], f"--ignore={ALONE}"]}
    codes = set()
    for path, paths in parts.items():
        path.unlink(missing_ok=True)
        left = max(1.0, ends - time.monotonic()) if budget else 0.0
        command = pytest_command(options, paths, path, left)
        codes.add(subprocess.run(command, cwd=ROOT, env=environment).returncode)
    written = [path for path in parts if path.is_file() and path.stat().st_size]
    if written:
        merged, *others = (json.loads(path.read_text()) for path in reversed(written))
        for other in others:
            merged["benchmarks"] += other["benchmarks"]
            merged["flowkernels"]["skipped"] += other["flowkernels"]["skipped"]
        json_path.write_text(json.dumps(merged))
    return max(codes - {NOTHING_SELECTED}, default=NOTHING_SELECTED)


def main(arguments: Iterable[str] | None = None) -> int:
    options = parser().parse_args(list(arguments) if arguments is not None else None)
    from bench import report

    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    json_path = options.out / f"latest-{options.device}.json"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if options.keep_memory:
        environment |= KEEP_MEMORY
    print(f"Measuring on {options.device}; results go to {json_path}", flush=True)
    code = measure(options, json_path, environment)
    if not json_path.is_file() or not json_path.stat().st_size:
        print("bench: nothing was measured (see above)", file=sys.stderr)
        return code or 1
    result = report.load(json_path)
    report.print_table(result)
    written = report.save(result, options.out)
    if options.save:
        written += report.save(result, RESULTS)
    if not options.no_plots:
        written += report.plot(result, options.out)
    for path in written:
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return code


if __name__ == "__main__":
    sys.exit(main())
