"""Which attention core serves a call."""

from __future__ import annotations

import importlib.util

import torch

from flowkernels.ops import _library

PUBLIC = ("auto", "sdpa", "cudnn", "flash", "xformers", "triton", "reference")

# Looked up once: torch.compile does not trace the search.
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "xformers")}
_HALF = (torch.bfloat16, torch.float16)

# What "auto" tries, in order, by dtype and by whether there are key lengths. Not measured on a GPU
# yet: FlashAttention leads as the one that is fast and deterministic on every chip, Triton where
# PyTorch has no kernel that takes lengths.
_AUTO_CUDA = {
    ("half", False): ("flash", "triton", "efficient"),
    ("half", True): ("triton", "flash", "efficient"),
    ("float", False): ("efficient", "triton"),
    ("float", True): ("triton", "efficient"),
}
_DETERMINISTIC = ("flash", "triton", "reference")


def select(
    core: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    lengths: bool,
) -> str:
    """The key of ``cores.CORES`` for a call, or "reference".

    Raises:
        ValueError: ``core`` cannot serve the call; says why.
    """
    if core == "auto":
        return _auto(backend, device, dtype, head_dim, lengths)
    if core == "reference":
        return core
    if core == "sdpa":
        core = "cpu" if device.type == "cpu" else "flash"
        if why_not(core, device, dtype, head_dim, lengths) is not None and core == "flash":
            core = "efficient"
        reason = why_not(core, device, dtype, head_dim, lengths)
        if reason is not None:
            raise ValueError(f"core: 'sdpa' {reason}")
        return core
    reason = why_not(core, device, dtype, head_dim, lengths)
    if reason is not None:
        raise ValueError(f"core: {core!r} {reason}")
    return core


def _auto(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, lengths: bool
) -> str:
    if backend == "reference" or dtype == torch.float64:
        return "reference"
    if device.type != "cuda":
        if backend == "triton":
            return "triton"
        return "cpu" if device.type == "cpu" else "reference"
    order = _AUTO_CUDA["half" if dtype in _HALF else "float", lengths]
    if torch.are_deterministic_algorithms_enabled():
        order = tuple(each for each in order if each in _DETERMINISTIC)
    return next(
        (each for each in order if why_not(each, device, dtype, head_dim, lengths) is None),
        "reference",
    )


def why_not(
    core: str, device: torch.device, dtype: torch.dtype, head_dim: int, lengths: bool
) -> str | None:
    """The reason that a core cannot serve a call; None where it can."""
    if dtype not in _library.KERNEL_DTYPES:
        return f"serves float32, bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    if core == "cpu":
        return None if device.type == "cpu" else f"needs CPU tensors, got {device.type}"
    if core == "triton":
        return _why_not_triton(device, head_dim)
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if core == "xformers" and not _INSTALLED["xformers"]:
        return "needs xformers, which is not installed"
    if core in ("flash", "cudnn") and dtype not in _HALF:
        return f"serves bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    if core == "cudnn" and lengths:
        return "takes no key_lengths; 'triton', 'flash' and 'xformers' do"
    limit = {"flash": 256, "cudnn": 128, "xformers": 256}.get(core)
    if head_dim % 8 or (limit is not None and head_dim > limit):
        most = "" if limit is None else f" up to {limit}"
        return f"serves head dims that are multiples of 8{most}, got {head_dim}"
    return None


def _why_not_triton(device: torch.device, head_dim: int) -> str | None:
    if not _INSTALLED["triton"]:
        return "needs Triton, which is not installed"
    if device.type == "cpu" and not _library.INTERPRETED:
        return "needs CUDA tensors, got cpu (Triton's interpreter serves it: TRITON_INTERPRET=1)"
    if head_dim > 256:
        return f"serves head dims up to 256, got {head_dim}"
    return None
