"""Checks shared by the public functions: one-line errors that name the argument."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(value: Any, name: str, like: Tensor | None = None) -> None:
    """``value`` is a floating-point tensor, on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, need a floating-point dtype")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, need {like.device} like the first argument")


def check_shape(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """``value`` has exactly ``shape``."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, need {tuple(shape)}")


def served_dtypes(*tensors: Tensor | None) -> bool:
    """All operands have a dtype that the kernels read (float64 goes to the reference)."""
    return all(tensor is None or tensor.dtype in _KERNEL_DTYPES for tensor in tensors)


def unit_last_stride(*tensors: Tensor | None) -> bool:
    """All operands can be read in place: a unit stride in the last dimension."""
    return all(
        tensor is None or tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
        for tensor in tensors
    )


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(choices)}")
