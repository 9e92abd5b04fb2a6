"""What a result was measured on, and what that machine's cache holds."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
)


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions: GPU, driver and clocks, or processor and threads."""
    found: dict[str, Any] = {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "malloc": "memory kept" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "system's",
        "torch": torch.__version__,
        "triton": version("triton"),
        "flowkernels": version("flowkernels") or "source tree",
    }
    if device == "cuda":
        found |= describe_gpu()
    return found


def describe_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": cache_bytes("cuda"),
        "cuda": torch.version.cuda,
    }
    return found | nvidia_smi()


def nvidia_smi() -> dict[str, str]:
    """Driver and clocks as ``nvidia-smi`` reads them; empty where it does not answer."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout.splitlines()[0]  # fmt: skip
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(_GPU_FIELDS[1:], (x.strip() for x in answer.split(",")[1:]), strict=False))


def name(device: str) -> str:
    """A file name for this machine's results: "nvidia-h200", "amd-epyc-2-cores"."""
    called = (
        torch.cuda.get_device_properties(0).name
        if device == "cuda"
        else f"{cpu_name()} {os.cpu_count()} cores"
    )
    return re.sub(r"[^a-z0-9]+", "-", called.lower()).strip("-")


@cache
def cpu_name() -> str:
    """The processor's own name, without trademarks and clock."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        called = found.group(1) if found else platform.machine()
    except OSError:
        called = platform.processor() or platform.machine()
    called = re.sub(r"\((?:R|TM)\)|\bCPU\b|\bProcessor\b|@.*$", " ", called)
    return re.sub(r"\s+", " ", called).strip()


@cache
def cache_bytes(device: str) -> int:
    """The last-level cache: the L2 of a GPU, the L3 of a processor (32 MB where unknown)."""
    if device == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 64 << 20
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = re.match(r"(\d+)([KMG]?)", path.read_text().strip())
        if number:
            sizes.append(
                int(number.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[number.group(2)]
            )
    return max(sizes, default=32 << 20)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def nvcc_version() -> str:
    """The CUDA compiler's release, or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or str(Path(home) / "bin/nvcc")
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"none ({type(error).__name__})"
    found = re.search(r"release ([\d.]+)", text)
    return found.group(1) if found else "unknown"


def interpreter() -> str:
    return f"{sys.implementation.cache_tag} on {platform.system()} {platform.machine()}"
