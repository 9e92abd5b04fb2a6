"""The build stage of :mod:`bench.gpu`: native libraries for the chip present, without pip."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu_run import ROOT, Run, StageFailed

LIBRARIES = Path("flowkernels/_lib")


def architecture(capability: tuple[int, int]) -> str:
    """The chip in TORCH_CUDA_ARCH_LIST's spelling: 9.0a for Hopper, whose own features need it."""
    major, minor = capability
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def build(run: Run, seconds: float) -> str:
    """Build into the source tree; libraries that were carried along serve where that fails.

    Raises:
        StageFailed: A library is neither built nor loadable.
    """
    import torch

    chip = architecture(torch.cuda.get_device_capability(0))
    settings = {
        "FLOWKERNELS_CUDA": "1",
        "FLOWKERNELS_NATIVE": "1",
        "TORCH_CUDA_ARCH_LIST": chip,
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    start = time.monotonic()
    problem = ""
    try:
        code = run.command(
            "build", [sys.executable, "setup.py", "build_ext", "--inplace"], seconds, **settings
        )
        problem = f"setup.py ended with {code}" if code else ""
    except StageFailed as error:
        problem = str(error)
    left = seconds - (time.monotonic() - start)
    loaded = _loaded(run, max(15.0, left))
    off = {name: reason for name, reason in loaded.items() if reason}
    if off:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in off.items())
        raise StageFailed(f"{problem + '; ' if problem else ''}{reasons}")
    if problem:
        return f"{problem}; the libraries that were there already load and are used"
    return f"CPU and CUDA ({chip}) libraries built and loaded"


def _loaded(run: Run, seconds: float) -> dict[str, str | None]:
    """Which native libraries a fresh process can load, and why not."""
    path = run.work / "libraries.json"
    code = (
        "import json, sys; from flowkernels.ops import _native; "
        "open(sys.argv[1], 'w').write(json.dumps(_native.OFF))"
    )
    if run.command("build", [sys.executable, "-c", code, str(path)], seconds):
        raise StageFailed("flowkernels cannot be imported")
    found: dict[str, str | None] = json.loads(path.read_text())
    return found


def check(run: Run, seconds: float) -> str:
    """Dry: CMake configures in a folder of its own, and the library here is newer than its sources.

    Raises:
        StageFailed: It does not configure, or sources changed since the build.
    """
    reason = _off_on_purpose(ROOT)
    if reason:
        return f"no native build here: {reason}"
    _configure(run, seconds)
    library = ROOT / LIBRARIES / "libflowkernels_cpu.so"
    if not library.is_file():
        raise StageFailed(f"{library.relative_to(ROOT)} is missing: build it first")
    newer = [p for p in _cpu_sources(ROOT) if p.stat().st_mtime > library.stat().st_mtime]
    if newer:
        raise StageFailed(f"{newer[0].relative_to(ROOT)} is newer than the library: build it first")
    off = _loaded(run, seconds)["cpu"]
    if off:
        raise StageFailed(off)
    return "configures; the library is up to date and loads"


def _off_on_purpose(root: Path) -> str:
    """Why this installation has no native library, where its build says so."""
    try:
        state = str(json.loads((root / LIBRARIES / "build.json").read_text())["cpu"])
    except (OSError, ValueError, KeyError):
        return ""
    return "" if state in ("built", "") else state


def _configure(run: Run, seconds: float) -> None:
    tools = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        raise StageFailed("cmake is not installed")
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        raise StageFailed("torch is not installed")
    import pybind11

    with tempfile.TemporaryDirectory(dir=run.work) as folder:
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools) else []
        code = run.command(
            "build",
            [
                cmake, "-S", str(ROOT), "-B", folder, *generator,
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DTORCH_DIR={Path(torch_spec.origin).parent}",
                f"-DFLOWKERNELS_OUTPUT_DIR={folder}/flowkernels",
            ],
            seconds,
        )  # fmt: skip
    if code:
        raise StageFailed(f"cmake does not configure (exit code {code})")


def _cpu_sources(root: Path) -> list[Path]:
    found = [*root.glob("csrc/cpu/*"), *root.glob("csrc/torch/*")]
    return [path for path in found if not path.name.startswith("cuda_")]
