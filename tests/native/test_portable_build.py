"""The library that `pip install` builds serves every x86-64 CPU: each kernel in three levels.

Tests run on a library built for this machine alone, which is the same code at one level.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
OPTIONS = ("-std=c++20", "-fopenmp-simd", "-fPIC", "-fno-math-errno", "-fno-trapping-math")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)


def gpp(*arguments: object) -> str:
    command = ["g++", *OPTIONS, "-Wno-psabi", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_is_well_formed_with_clones(source: Path):
    assert gpp("-fsyntax-only", "-Wall", "-Wextra", "-Werror", source) == ""


def test_a_kernel_has_three_levels(tmp_path: Path):
    """And a resolver that picks among them when the library is loaded."""
    built = tmp_path / "step.so"
    gpp("-O3", "-shared", ROOT / "csrc" / "cpu" / "step.cpp", "-o", built)
    symbols = subprocess.run(["nm", "-C", built], capture_output=True, text=True).stdout
    for level in ("arch_x86_64_v4", "arch_x86_64_v3", "default", "resolver"):
        assert level in symbols.replace("-", "_"), symbols[-2000:]
