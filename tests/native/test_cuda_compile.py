"""Every CUDA source compiles with nvcc for every chip, without a spill, and knows no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "90a", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(home) / "bin" / "nvcc"
    return str(beside) if beside.is_file() else shutil.which("nvcc")


def test_there_is_cuda_code():
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_includes_no_torch_header(source: Path):
    """So that nvcc compiles it on a machine with no GPU and no CUDA build of torch."""
    for path in (source, *source.parent.glob("*.cuh")):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source: Path, tmp_path: Path):
    chips = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in ARCHITECTURES]
    command = [
        str(nvcc()), "-std=c++20", "-O3", *chips, "--expt-relaxed-constexpr",
        "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-c", str(source), "-o", str(tmp_path / "out.o"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert spills, f"ptxas reported no kernel:\n{run.stderr[-2000:]}"
    assert all(pair == ("0", "0") for pair in spills), run.stderr[-4000:]
