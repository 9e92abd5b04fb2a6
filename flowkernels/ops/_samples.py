"""What the operators over samples, [B, ...] with one time or weight a sample, have in common."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._autograd import refuse_transforms
from flowkernels.ops._library import KERNEL_DTYPES
from flowkernels.ops._validate import check_shape, check_tensor

Tensor = torch.Tensor

REDUCTIONS = ("none", "mean", "sum")


def code_of(reduction: str) -> int | None:
    """The place of a reduction in :data:`REDUCTIONS`, by which operators know it; None: no such."""
    return REDUCTIONS.index(reduction) if reduction in REDUCTIONS else None


def check_samples(x: Any, name: str) -> None:
    """``x`` is a floating-point tensor [B, ...]."""
    check_tensor(x, name)
    if x.dim() == 0:
        raise ValueError(f"{name}: got a tensor with no dimension, need [B, ...]")


def check_like(value: Any, name: str, like: Tensor) -> None:
    """``value`` is a floating-point tensor of the shape of ``like``, on its device."""
    check_tensor(value, name, like)
    if value.shape != like.shape:
        check_shape(value, name, tuple(like.shape))


def check_batch_vector(value: Any, name: str, like: Tensor) -> None:
    """``value`` is a floating-point tensor [B] with the B of ``like``, on its device."""
    check_tensor(value, name, like)
    if value.dim() != 1 or value.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, need [B] with B = {like.shape[0]}"
        )


def kernels_read_samples(*tensors: Tensor | None) -> bool:
    """Whether the kernels read all operands in place: a dtype that they know (float64 goes to the
    reference) and contiguous samples, at any stride between samples.
    """
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype not in KERNEL_DTYPES:
                return False
            if not tensor.is_contiguous() and not (
                tensor.shape[0] > 0 and tensor[0].is_contiguous()
            ):
                return False
    return True


def alike(x: Any, *others: Any) -> bool:
    """All are tensors of one kernel dtype, shape and device, contiguous (None aside).

    What is true of most calls, told in half the time of the checks that find out what is wrong.
    """
    if not (isinstance(x, Tensor) and x.dtype in KERNEL_DTYPES and x.dim() and x.is_contiguous()):
        return False
    dtype, shape, device = x.dtype, x.shape, x.device
    for other in others:
        if other is not None and not (
            isinstance(other, Tensor)
            and other.dtype is dtype
            and other.shape == shape
            and other.device == device
            and other.is_contiguous()
        ):
            return False
    return True


def readable_samples(grad: Tensor) -> Tensor:
    """A gradient that the kernels can read in place (``sum()`` hands out one of stride 0)."""
    return grad if kernels_read_samples(grad) else grad.contiguous()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """A gradient to one of the tensors is asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def tracked(*tensors: Tensor | None, constants: tuple[Any, ...] = ()) -> bool:
    """A gradient is asked for: the call has to go through its ``autograd.Function``.

    Where it is False the operator is called outright, at half the host time, after a look at
    whether a transform that kernels do not serve is active. ``constants`` are the operands that
    kernels have no gradient for (times, weights): forward mode must not lose their tangents.
    """
    if torch.is_grad_enabled() and wants_gradient(*tensors):
        return True
    if not torch.compiler.is_compiling():
        refuse_transforms((*tensors, *constants))
    return False


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """A vector [B] as a tensor that broadcasts against ``like``, [B, ...]."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
