"""The CPU loops for machines without AVX-512, in a process that PyTorch is told to take for one.

Where the machine has it, rows of one dtype go through loops in its own instructions, and all other
tests are of those.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")
VALUES = (
    "agrees or strided or edge or nan_stays or every_element or repeats or alone or caches "
    "or rounding or far_from or any_size or any_number or error_and or finite or wherever"
)


@pytest.mark.parametrize(
    "module",
    [
        "test_activation",
        "test_bellman",
        "test_losses",
        "test_modulate",
        "test_runge_kutta",
        "test_step",
    ],
)
def test_portable_loops(module: str):
    run = subprocess.run(
        [*PYTEST, f"tests/ops/{module}.py", "-k", VALUES],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}{run.stderr[-2000:]}"
    assert re.search(r"\d+ passed", run.stdout)
