"""The Triton kernels, interpreted on the CPU: the checks of every op, in a process of their own.

Triton decides at import whether it interprets, so this process cannot do both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def modules() -> list[str]:
    """Every test module whose classes are made of OpChecks."""
    found = sorted((ROOT / "tests").glob("*/test_*.py"))
    made = [path for path in found if re.search(r"^class .*\(OpChecks\)", path.read_text(), re.M)]
    return [str(path.relative_to(ROOT)) for path in made]


def interpret(module: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", module],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Two modules at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {module: pool.submit(interpret, module) for module in modules()}


@pytest.mark.parametrize("module", modules())
def test_kernels_interpreted(runs, module: str) -> None:
    run = runs[module].result()
    assert run.returncode == 0, f"{module}, interpreted:\n{run.stdout[-6000:]}{run.stderr[-2000:]}"
    summary = run.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary)
    assert not re.search(r"skipped|failed", summary)
