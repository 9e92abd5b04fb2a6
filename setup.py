"""Hands the native build to CMake. A build that cannot be done leaves a reason, not an error.

Environment: FLOWKERNELS_NATIVE=0|1|auto, FLOWKERNELS_CUDA=0|1|auto (1: a failed build is an
error), FLOWKERNELS_CPU=portable|host, TORCH_CUDA_ARCH_LIST, MAX_JOBS. What was built, and why
something was not, is written to flowkernels/_lib/build.json, which `python -m flowkernels.info`
prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)


def choice(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{name}={value!r}: need 0, 1 or auto")
    return value


def cpu_target() -> str:
    """portable: kernels for every CPU in one library; host: for this machine's, built faster."""
    value = os.environ.get("FLOWKERNELS_CPU", "portable").lower()
    if value not in ("portable", "host"):
        raise SystemExit(f"FLOWKERNELS_CPU={value!r}: need portable or host")
    return value


def find_torch() -> Path:
    """The torch package on disk. Not imported: an isolated build environment holds no torch."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for place in dict.fromkeys(filter(None, places)):
        package = Path(place) / "torch"
        if (package / "include/torch/csrc/stable/library.h").is_file():
            version = re.search(r"'(\d+)\.(\d+)", (package / "version.py").read_text())
            if version and tuple(map(int, version.groups())) >= MINIMUM_TORCH:
                return package
            raise RuntimeError(f"torch at {package} is older than 2.11")
    raise RuntimeError("no torch >= 2.11 in this environment (install torch first)")


def torch_version() -> str:
    """``torch.__version__`` of the torch on disk."""
    text = (find_torch() / "version.py").read_text()
    found = re.search(r"^__version__ *= *'([^']+)'", text, re.M)
    return found[1] if found else "unknown"


def torch_has_cuda() -> bool:
    """Whether the torch on disk could load a CUDA library."""
    return re.search(r"^cuda\b.*= *'", (find_torch() / "version.py").read_text(), re.M) is not None


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ('8.0;9.0a+PTX') as CMake spells it ('80-real;90a-real;90a-virtual')."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    out: list[str] = []
    for item in filter(None, wanted.split(";")):
        number = item.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {item!r}, need e.g. 9.0a or 8.0+PTX")
        out.append(f"{number}-real")
        if item.endswith("+PTX"):
            out.append(f"{number}-virtual")
    return ";".join(out)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin/nvcc").is_file():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc") or next(
        (str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.is_file()), None
    )


class NativeBuild(build_ext):
    def run(self) -> None:
        package = ROOT / "flowkernels" if self.inplace else Path(self.build_lib) / "flowkernels"
        library_dir = package.resolve() / "_lib"
        library_dir.mkdir(parents=True, exist_ok=True)
        report = {"cpu": "", "cuda": "", "nodes": ""}
        if choice("FLOWKERNELS_NATIVE") == "0":
            report = dict.fromkeys(report, "FLOWKERNELS_NATIVE=0 when installed")
        else:
            self.build_all(package.resolve(), report)
        for name in ("cpu", "cuda"):
            if report[name] != "built":  # an older build's would be loaded under newer Python
                (library_dir / f"libflowkernels_{name}.so").unlink(missing_ok=True)
        if report["cpu"] != "built":
            for routines in (*package.glob("_C.*"), *package.glob("_nodes.*")):
                routines.unlink()
        (library_dir / "build.json").write_text(json.dumps(report, indent=1) + "\n")

    def build_all(self, package: Path, report: dict[str, str]) -> None:
        try:
            build_dir = self.configure(package)
            self.cmake("--build", str(build_dir), *self.jobs())
            report["cpu"] = "built"
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            report.update(dict.fromkeys(report, f"native build failed: {error}"))
            if choice("FLOWKERNELS_NATIVE") == "1":
                raise SystemExit(report["cpu"]) from error
            print(f"flowkernels: installing without native kernels: {error}", file=sys.stderr)
            return
        try:
            self.cmake("--build", str(build_dir), "--target", "_nodes")
            report["nodes"] = f"built for torch {torch_version()}"
        except (OSError, subprocess.CalledProcessError) as error:  # it costs speed, nothing else
            report["nodes"] = str(error)
            print(f"flowkernels: installing without autograd nodes: {error}", file=sys.stderr)
        self.build_cuda(package, report)

    def build_cuda(self, package: Path, report: dict[str, str]) -> None:
        wanted = choice("FLOWKERNELS_CUDA")
        if wanted == "0":
            report["cuda"] = "FLOWKERNELS_CUDA=0 when installed"
            return
        if wanted == "auto" and not torch_has_cuda():
            report["cuda"] = "torch had no CUDA when installed (FLOWKERNELS_CUDA=1 builds anyway)"
            return
        nvcc = find_nvcc()
        try:
            if nvcc is None:
                raise RuntimeError("no nvcc found when installed")
            options = ["-DFLOWKERNELS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            if architectures := cuda_architectures():
                options.append(f"-DFLOWKERNELS_CUDA_ARCHITECTURES={architectures}")
            build_dir = self.configure(package, *options)
            self.cmake("--build", str(build_dir), "--target", "flowkernels_cuda", *self.jobs())
            report["cuda"] = "built"
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            report["cuda"] = str(error)
            if wanted == "1":
                raise SystemExit(f"CUDA build failed: {error}") from error
            print(f"flowkernels: installing without CUDA C++ kernels: {error}", file=sys.stderr)

    def configure(self, package: Path, *options: str) -> Path:
        import pybind11

        suffix = "-cuda" if options else ""
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}{suffix}"
        build_dir.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self.cmake(
            "-S", str(ROOT), "-B", str(build_dir), *generator,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_DIR={find_torch()}",
            f"-DTORCH_VERSION={torch_version()}",
            f"-DFLOWKERNELS_OUTPUT_DIR={package}",
            f"-DFLOWKERNELS_CPU={cpu_target()}",
            *options,
        )  # fmt: skip
        return build_dir

    def cmake(self, *arguments: str) -> None:
        subprocess.run(["cmake", *arguments], check=True)

    def jobs(self) -> list[str]:
        return ["--parallel", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("flowkernels._C", [])], cmdclass={"build_ext": NativeBuild})
