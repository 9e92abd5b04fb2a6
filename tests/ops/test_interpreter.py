"""The Triton kernels, interpreted on the CPU: the checks of every op, in a process of their own.

Triton decides at import whether it interprets, so this process cannot do both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def modules() -> list[str]:
    """Every test module whose classes are made of OpChecks."""
    found = sorted((ROOT / "tests").glob("*/test_*.py"))
    here = [path for path in found if "(OpChecks)" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in here]


@pytest.mark.parametrize("module", modules())
def test_kernels_interpreted(module: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", module],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, f"{module}, interpreted:\n{run.stdout[-6000:]}{run.stderr[-2000:]}"
    summary = run.stdout.strip().splitlines()[-1]
    assert " passed" in summary and "skipped" not in summary, summary
