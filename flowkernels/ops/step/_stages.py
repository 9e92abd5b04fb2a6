"""Checks of what rk_combine and rk_error share: a state, its stages, their weights, the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowkernels.ops._library import KERNEL_DTYPES
from flowkernels.ops._validate import as_number
from flowkernels.ops.step._euler import partly_shared
from flowkernels.ops.step.reference import promoted

Tensor = torch.Tensor


def check_state(value: Any, name: str) -> None:
    """``value`` is a floating-point or complex tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, need a torch.Tensor")
    if not (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name}: got dtype {value.dtype}, need a floating-point or complex dtype")


def check_operand(value: Any, name: str, like: Tensor) -> None:
    """``value`` is a state of the shape of ``like``, on its device."""
    check_state(value, name)
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, need {tuple(like.shape)}")
    _check_device(value, name, like)


def _check_device(value: Tensor, name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: is on {value.device}, need {like.device} like the state")


def check_stages(ks: Any, y: Tensor) -> list[Tensor]:
    """The stages as the operators take them: one tensor each, or all stacked in the only one."""
    if isinstance(ks, Tensor):
        check_state(ks, "ks")
        if ks.shape[1:] != y.shape or ks.dim() != y.dim() + 1:
            raise ValueError(
                f"ks: got shape {tuple(ks.shape)}, need [n, ...] with y's {tuple(y.shape)}"
            )
        _check_device(ks, "ks", y)
        stages = [ks]
    elif isinstance(ks, Sequence):
        stages = list(ks)
        shape, dtype, device = y.shape, y.dtype, y.device
        for index, k in enumerate(stages):
            if type(k) is not Tensor or k.shape != shape or k.dtype != dtype or k.device != device:
                check_operand(k, f"ks[{index}]", y)  # says what is wrong, if anything is
    else:
        raise TypeError(f"ks: got {type(ks).__name__}, need a sequence of tensors or one tensor")
    if not len(ks):
        raise ValueError("ks: got no stage, need at least one")
    return stages


def is_stacked(stages: Sequence[Tensor], y: Tensor) -> bool:
    """Whether the only tensor holds all stages."""
    return len(stages) == 1 and stages[0].dim() == y.dim() + 1


def check_weights(
    weights: Any, ks: Sequence[Tensor] | Tensor, y: Tensor
) -> tuple[list[float], Tensor | None]:
    """(numbers, None), or ([], tensor [n]) where only the device knows them."""
    if isinstance(weights, Tensor):
        if not weights.is_floating_point():
            raise TypeError(f"weights: got dtype {weights.dtype}, need a floating-point dtype")
        if weights.shape != (len(ks),):
            raise ValueError(f"weights: got shape {tuple(weights.shape)}, need ({len(ks)},)")
        on_host = weights.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not (weights.requires_grad and torch.is_grad_enabled()):
            return weights.tolist(), None
        _check_device(weights, "weights", y)
        return [], weights if weights.dtype == torch.float64 else weights.float()
    if not isinstance(weights, Sequence) and not hasattr(weights, "__len__"):
        raise TypeError(f"weights: got {type(weights).__name__}, need a sequence of numbers")
    numbers = [w if type(w) is float else as_number(w, "weights") for w in weights]
    if len(numbers) != len(ks):
        raise ValueError(f"weights: got {len(numbers)}, need one for each of {len(ks)} stages")
    return numbers, None


def check_dt(dt: Any, y: Tensor) -> float | Tensor:
    """dt as a number or a tensor, 0-d or [B], on the device of ``y``."""
    if type(dt) is float:
        return dt
    if not isinstance(dt, Tensor):
        if isinstance(dt, bool) or not hasattr(dt, "__float__"):
            raise TypeError(f"dt: got {type(dt).__name__}, need a number or a tensor, 0-d or [B]")
        return float(dt)
    if not dt.is_floating_point():
        raise TypeError(f"dt: got dtype {dt.dtype}, need a floating-point dtype")
    if dt.dim() == 0 and dt.device.type == "cpu" != y.device.type:
        # A number of the host's, as torch's own operators take it: no sync.
        return dt if dt.requires_grad and torch.is_grad_enabled() else float(dt)
    if dt.dim() > 1 or (dt.dim() == 1 and (y.dim() == 0 or dt.shape[0] != y.shape[0])):
        batch = f"[B] with B = {y.shape[0]}" if y.dim() else "0-d for a 0-d state"
        raise ValueError(f"dt: got shape {tuple(dt.shape)}, need {batch}")
    _check_device(dt, "dt", y)
    return dt


def step_arguments(dt: float | Tensor, y: Tensor) -> tuple[Tensor | None, float]:
    """dt as the operators take it: a tensor, or else a number."""
    if isinstance(dt, Tensor):
        return dt, 0.0
    if torch.compiler.is_compiling():
        # A number would be a constant of the graph, and each step of a solver a recompile.
        return y.new_zeros((), dtype=torch.float64) + dt, 0.0
    return None, dt


def check_tolerance(value: Any, name: str, y0: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return value if type(value) is float else as_number(value, name)
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, need a floating-point dtype")
    if value.dim() == 0 and value.device.type == "cpu" and not torch.compiler.is_compiling():
        return value if value.requires_grad else float(value)
    try:
        fits = torch.broadcast_shapes(value.shape, y0.shape) == y0.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, need one that broadcasts to {tuple(y0.shape)}"
        )
    _check_device(value, name, y0)
    return value


def kernels_read_tolerance(value: float | Tensor, y0: Tensor) -> bool:
    """A number, or one for each element in the dtype that the kernels compute in."""
    if not isinstance(value, Tensor):
        return True
    compute = torch.promote_types(y0.dtype, torch.float32)
    return value.dtype == compute and value.shape == y0.shape and value.is_contiguous()


def tolerance_arguments(
    rtol: float | Tensor, atol: float | Tensor
) -> tuple[Tensor | None, Tensor | None, float, float]:
    tensors = [each if isinstance(each, Tensor) else None for each in (rtol, atol)]
    values = [0.0 if isinstance(each, Tensor) else each for each in (rtol, atol)]
    return tensors[0], tensors[1], values[0], values[1]


def kernels_read(y: Tensor, stages: Sequence[Tensor], other: Tensor | None) -> bool:
    """Whether the kernels read all operands in place: float64 throughout, or none of it, and
    contiguous samples at any stride between samples.
    """
    dtype = y.dtype
    if dtype not in _SERVED or not (y.is_contiguous() or _strided_samples(y)):
        return False
    if is_stacked(stages, y):
        stages = (stages[0][0],)
    for operand in stages if other is None else (*stages, other):
        if operand.dtype != dtype and not _mixes(operand.dtype, dtype):
            return False
        if not (operand.is_contiguous() or _strided_samples(operand)):
            return False
    return True


_SERVED = (*KERNEL_DTYPES, torch.float64)


def _mixes(one: torch.dtype, other: torch.dtype) -> bool:
    return one in KERNEL_DTYPES and other in KERNEL_DTYPES


def _strided_samples(tensor: Tensor) -> bool:
    return tensor.shape[0] > 0 and tensor[0].is_contiguous()


def check_out(out: Any, y: Tensor, stages: Sequence[Tensor], differentiate: bool) -> None:
    check_operand(out, "out", y)
    dtype = promoted(y, *stages)
    if out.dtype != dtype:
        raise ValueError(f"out: got dtype {out.dtype}, need {dtype}")
    if out.dim() and out.shape[0] > 1 and out.stride(0) == 0:
        raise ValueError("out: its samples share memory, need a tensor of its own elements")
    if type(out) is Tensor and not torch.compiler.is_compiling():  # not a tracer's
        unstacked = stages[0].unbind(0) if is_stacked(stages, y) else stages
        for operand in (y, *unstacked):
            if operand is not out and partly_shared(out, operand):
                raise ValueError("out: overlaps an operand in part, need none of its memory or all")
    if differentiate or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "out: is given while a gradient is asked for, need out=None or torch.no_grad()"
        )
