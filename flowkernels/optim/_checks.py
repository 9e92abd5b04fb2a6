"""Checks of hyper-parameters: one line that names the argument, what it got and what it needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

Tensor = torch.Tensor


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_decays(decays: Any, name: str) -> tuple[float, ...]:
    """``decays`` as a tuple of numbers in [0, 1); a single number is one decay."""
    listed = (decays,) if _number(decays) else decays
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise TypeError(f"{name}: got {decays!r}, need numbers in [0, 1)")
    listed = tuple(listed)
    for decay in listed:
        if not _number(decay) or not 0.0 <= decay < 1.0:
            raise ValueError(f"{name}: got {decay!r}, need numbers in [0, 1)")
    return tuple(float(decay) for decay in listed)


def check_max_grad_norm(value: Any) -> float | None:
    if value is None:
        return None
    if not _number(value) or not value > 0.0:
        raise ValueError(f"max_grad_norm: got {value!r}, need a number > 0 or None")
    return float(value)


def check_grad_scale(value: Any) -> float | Tensor | None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"grad_scale: got a {value.dtype} tensor of shape {tuple(value.shape)}, "
                "need one floating-point element"
            )
        return value
    if value is None:
        return None
    if not _number(value) or not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"grad_scale: got {value!r}, need a number > 0, a 0-d tensor or None")
    return float(value)


def check_group(group: Mapping[str, Any]) -> None:
    """The hyper-parameters of a parameter group."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"lr: got a {lr.dtype} tensor of shape {tuple(lr.shape)}, "
                "need one floating-point element"
            )
    elif not _number(lr):
        raise TypeError(f"lr: got {lr!r}, need a number >= 0 or a tensor of one element")
    # A learning rate on a device is not read: that would wait for the device.
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu") and not float(lr) >= 0.0:
        raise ValueError(f"lr: got {lr}, need a number >= 0")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_number, betas)):
        raise TypeError(f"betas: got {betas!r}, need two numbers in [0, 1)")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas: got {beta} at index {index}, need a number in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not _number(group[name]) or not group[name] >= 0.0:
            raise ValueError(f"{name}: got {group[name]!r}, need a number >= 0")


def check_parameters(params: list[Tensor]) -> None:
    """What the optimiser can update: real floating-point tensors, each once."""
    if len({id(param) for param in params}) != len(params):
        raise ValueError("params: the same parameter appears twice in a group, need each once")
    for index, param in enumerate(params):
        if not param.is_floating_point():
            raise TypeError(
                f"params: got dtype {param.dtype} at index {index}, need real floating point"
            )
        if param.layout is not torch.strided:
            raise TypeError(f"params: got layout {param.layout} at index {index}, need strided")


def check_copies(copies: Any, params: list[Tensor]) -> list[Tensor | None]:
    """The low-precision copies of ``params``, in their order; an entry may be None."""
    listed = list(copies)
    if len(listed) != len(params):
        raise ValueError(
            f"low_precision_copies: got {len(listed)}, need one for each of {len(params)} params"
        )
    for index, (copy, param) in enumerate(zip(listed, params, strict=True)):
        if copy is None:
            continue
        if not isinstance(copy, Tensor) or not copy.is_floating_point():
            raise TypeError(
                f"low_precision_copies: got {type(copy).__name__} at index {index}, "
                "need floating-point tensors"
            )
        if copy.shape != param.shape or copy.device != param.device:
            raise ValueError(
                f"low_precision_copies: got {tuple(copy.shape)} on {copy.device} at index {index}, "
                f"need {tuple(param.shape)} on {param.device} like its parameter"
            )
    return listed


def scalar_on(value: float | Tensor | None, device: torch.device, name: str) -> Tensor | None:
    """A 0-d float32 or float64 tensor on ``device``; never read by the host."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=device)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)
    if value.device == device:
        return value.detach()
    if value.device.type != "cpu":
        raise ValueError(f"{name}: is on {value.device}, need {device} like the parameters")
    return value.detach().to(device, non_blocking=True)
