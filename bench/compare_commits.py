"""``python -m bench.compare_commits A B [-k ...]``: is one commit faster than another?

Each commit is checked out into a temporary worktree and built there; the benchmarks of *this* tree
then run over both packages, taking turns (A B, B A, ...). Two processes cannot be interleaved round
by round, so what is compared is each commit's ratio to the eager peer of its own run: the machine's
drift between runs cancels in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Key = tuple[str, ...]


def key(row: dict[str, Any]) -> Key:
    return tuple(row[name] for name in ("op", "shape", "dtype", "direction", "kind"))


def check_out(commit: str, folder: Path) -> None:
    """A worktree of ``commit`` in ``folder``, built, with this tree's benchmarks in it."""
    subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", str(folder), commit],
        cwd=ROOT,
        check=True,
    )
    shutil.rmtree(folder / "bench", ignore_errors=True)
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("__pycache__"))
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder, env=os.environ | {"PATH": tools}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def measure(folder: Path, arguments: list[str], device: str) -> dict[Key, float]:
    """One run of the benchmarks over the package in ``folder``: ratio to eager, by case."""
    out = folder / "runs" / "compare"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # A case that one of the two does not have is left out, not an error.
    subprocess.run(
        [sys.executable, "-m", "bench.run", "--no-plots", "--out", str(out), "--device", device,
         *arguments],
        cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    lines = (out / f"latest-{device}.jsonl").read_text().splitlines()[1:]
    return {key(row): row["ratio"]["eager"] for row in map(json.loads, lines)}


def table(first: dict[Key, list[float]], second: dict[Key, list[float]]) -> list[str]:
    """Lines: the case, each commit's median ratio to eager, and B's speed over A's."""
    lines = [f"{'case':<62} {'A':>7} {'B':>7} {'B over A':>9}"]
    for case in [case for case in first if case in second]:
        a, b = statistics.median(first[case]), statistics.median(second[case])
        lines.append(f"{' '.join(case):<62} {a:7.2f} {b:7.2f} {b / a:9.3f}")
    return lines


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare_commits", description=__doc__)
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--turns", type=int, default=2, help="runs of each commit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options, passed = parser.parse_known_args(list(arguments) if arguments is not None else None)
    found: dict[str, dict[Key, list[float]]] = {"A": {}, "B": {}}
    with tempfile.TemporaryDirectory(prefix="flowkernels-commits-") as temporary:
        folders = {"A": Path(temporary) / "a", "B": Path(temporary) / "b"}
        try:
            for name, commit in (("A", options.first), ("B", options.second)):
                check_out(commit, folders[name])
            for turn in range(options.turns):
                for name in ("AB", "BA")[turn % 2]:
                    for case, ratio in measure(folders[name], passed, options.device).items():
                        found[name].setdefault(case, []).append(ratio)
        finally:
            for folder in folders.values():
                subprocess.run(
                    ["git", "worktree", "remove", "--force", str(folder)],
                    cwd=ROOT, check=False, capture_output=True,
                )  # fmt: skip
    print("\n".join(table(found["A"], found["B"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
