"""What the operators over samples, [B, ...] with one time or weight a sample, have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from flowkernels.ops._validate import check_shape, check_tensor

Tensor = torch.Tensor

REDUCTIONS = ("none", "mean", "sum")


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


def contiguous_samples(*tensors: Tensor | None) -> bool:
    """Every sample of every tensor is contiguous: kernels then read it in place at any stride."""
    return all(
        tensor is None
        or tensor.is_contiguous()
        or (tensor.shape[0] > 0 and tensor[0].is_contiguous())
        for tensor in tensors
    )


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself where kernels can read it in place (gradients of ``sum()`` cannot be)."""
    return tensor if contiguous_samples(tensor) else tensor.contiguous()


def tracked(*tensors: Tensor | None) -> bool:
    """Autograd has to see this call: a gradient is asked for, or a transform is active.

    Where it is False the operator is called without an ``autograd.Function`` around it, which
    saves half of the host time of a call. Transforms have to reach the Function, whose errors
    say that kernels do not serve them.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """A vector [B] as a tensor that broadcasts against ``like``, [B, ...]."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))
