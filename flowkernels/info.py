"""``python -m flowkernels.info``: versions, the native build, and which backend serves what."""

from __future__ import annotations

import platform

import torch

import flowkernels
from flowkernels.ops import _native


def report() -> str:
    """Versions, machine and build, then the table of :func:`flowkernels.describe`."""
    lines = [
        f"flowkernels {flowkernels.__version__}  torch {torch.__version__}  "
        f"triton {_version('triton')}  Python {platform.python_version()}",
        f"CPU: {torch.get_num_threads()} threads, {_instruction_set()}",
        f"GPU: {_gpu()}",
        f"native CPU library: {_native.OFF['cpu'] or 'loaded'}",
        f"native CUDA library: {_native.OFF['cuda'] or 'loaded'}",
        f"autograd nodes of losses: {_native.NODES_OFF or 'loaded'}",
        "",
        flowkernels.describe(),
    ]
    return "\n".join(lines)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    try:
        from flowkernels import _C
    except ImportError:
        return "native module not built"
    return f"kernels for {_C.instruction_set()}"


def _gpu() -> str:
    if not torch.version.cuda:
        return "none (torch was built without CUDA)"
    if not torch.cuda.is_available():
        return "none found"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    print(report())
