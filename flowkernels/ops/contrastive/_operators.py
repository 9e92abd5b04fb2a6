"""Schemas and fakes of contrastive flow matching's operators.

    forward    the loss, and with ``wanted`` the gradient of v that grad_output = 1 gives
    rescale_   writes into that gradient what grad_output gives instead; where grad_output is 1,
               which it reads on the device, it touches nothing
    backward   the gradient of v anew, from the operands and grad_output

grad_output is 0-d, or [B] under reduction "none". negatives is int64.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops._losses import gradients_like, loss_like

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.contrastive.kernels:"
_OPERANDS = (
    "Tensor v, Tensor x0, Tensor noise, Tensor negatives, Tensor? weight, float lam, int reduction"
)


def _forward_fake(v, x0, noise, negatives, weight, lam, reduction, wanted):  # type: ignore[no-untyped-def]
    return [loss_like(v, reduction), *gradients_like(wanted, v)]


def _rescale_fake(gradient, grad_output, *operands):  # type: ignore[no-untyped-def]
    return None


def _backward_fake(grad_output, v, x0, noise, negatives, weight, lam, reduction):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape)


contrastive_forward = define(
    "contrastive_forward",
    f"({_OPERANDS}, int wanted) -> Tensor[]",
    _forward_fake,
    triton=_KERNELS + "contrastive_forward",
)
contrastive_rescale_ = define(
    "contrastive_rescale_",
    f"(Tensor(a!) gradient, Tensor grad_output, {_OPERANDS}) -> ()",
    _rescale_fake,
    triton=_KERNELS + "contrastive_rescale_",
)
contrastive_backward = define(
    "contrastive_backward",
    f"(Tensor grad_output, {_OPERANDS}) -> Tensor",
    _backward_fake,
    triton=_KERNELS + "contrastive_backward",
)
