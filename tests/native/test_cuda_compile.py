"""The CUDA library builds with nvcc for every chip, without a spill, on a machine with no GPU and a
torch without CUDA; its kernels know no torch, and its bindings none that is newer than the oldest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
ARCHITECTURES = ("80", "90a", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "torch").iterdir())
MACROS_OF_2_11 = {
    "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK",
}  # fmt: skip


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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CUDA library as it is installed, and what its compilers said."""
    folder = tmp_path_factory.mktemp("cuda")
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=tools)
    if nvcc() is None or cmake is None:
        pytest.skip("nvcc or cmake is not installed")
    settings = {
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(),
        "TORCH_DIR": TORCH, "FLOWKERNELS_OUTPUT_DIR": folder / "flowkernels",
        "FLOWKERNELS_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc(),
    }  # fmt: skip
    configure = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    build = [cmake, "--build", folder, "--target", "flowkernels_cuda", "--verbose"]
    said = ""
    for command in (configure, build):
        run = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=900,
            env={**os.environ, "PATH": tools},
        )  # fmt: skip
        said += run.stdout + run.stderr
        assert run.returncode == 0, said[-4000:]
    return folder / "flowkernels" / "_lib" / "libflowkernels_cuda.so", said


def test_compiles_for_every_chip_without_spills(built: tuple[Path, str]):
    _, said = built
    assert set(re.findall(r"for 'sm_(\w+)'", said)) == set(ARCHITECTURES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= len(ARCHITECTURES) * len(SOURCES), f"ptxas was silent:\n{said[-2000:]}"
    assert all(pair == ("0", "0") for pair in spills), said[-4000:]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_finds_what_torch_has_and_needs_nothing_else(built: tuple[Path, str]):
    """libtorch leads to libtorch_cuda, which alone has the current stream. It is not there to be
    asked where torch has no CUDA; all else must be in libtorch_cpu.
    """
    library, _ = built
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", _readelf("--dynamic", library))
    assert "libtorch.so" in needed
    undefined = {name for name, defined in _symbols(library) if not defined}
    of_torch = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    exported = {name for name, defined in _symbols(TORCH / "lib" / "libtorch_cpu.so") if defined}
    assert of_torch - exported == {"aoti_torch_get_current_cuda_stream"}


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.name)
def test_bindings_use_macros_of_the_oldest_torch(source: Path):
    """TORCH_TARGET_VERSION hides functions that came after 2.11, but no macros."""
    macros = set(re.findall(r"\b(?:STABLE_TORCH|STD_TORCH|TORCH)_[A-Z_]+\b", source.read_text()))
    assert macros <= MACROS_OF_2_11


def _readelf(what: str, library: Path) -> str:
    command = ["readelf", "--wide", what, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def _symbols(library: Path) -> list[tuple[str, bool]]:
    """The dynamic symbols, and whether they are defined there."""
    rows = (line.split() for line in _readelf("--dyn-syms", library).splitlines())
    return [(row[7].split("@")[0], row[6] != "UND") for row in rows if len(row) >= 8]
