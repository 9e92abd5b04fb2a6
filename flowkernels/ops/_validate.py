"""Checks shared by the public functions: one-line errors that name the argument."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor

_KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def check_tensor(value: Any, name: str, like: Tensor | None = None) -> None:
    """``value`` is a floating-point tensor, on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, need a floating-point dtype")
    if like is not None and value.device != like.device:
        raise ValueError(
            f"{name}: is on {value.device}, need {like.device} like the first argument"
        )


def check_shape(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """``value`` has exactly ``shape``."""
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, need {tuple(shape)}")


def kernels_read(*tensors: Tensor | None) -> bool:
    """Whether the kernels read all operands in place: a dtype that they know (float64 goes to the
    reference) and a unit stride in the last dimension.
    """
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype not in _KERNEL_DTYPES:
                return False
            if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                return False
    return True


_LARGEST = torch.finfo(torch.float32).max


def as_number(value: Any, name: str) -> float:
    """``value`` as a float: a number, or what holds one (a numpy scalar, a 0-d tensor)."""
    if isinstance(value, (int, float)):
        return float(value)
    held = value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")
    if not held:
        raise TypeError(f"{name}: got {type(value).__name__}, need a number")
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, need a number: none flows to it"
        )
    return float(value)


def is_finite(value: Any) -> bool:
    """Whether :func:`as_finite` has nothing to do."""
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST


def as_finite(value: Any, name: str) -> float:
    """:func:`as_number`, and neither NaN nor infinite in float32, which kernels compute in."""
    number = as_number(value, name)
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{name}: got {number}, need a finite number")
    return number


def check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(choices)}")
