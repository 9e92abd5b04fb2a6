"""Schemas and fakes of the correction's operators: three each, as ``_losses`` says.

    self_corrected_*   [total, consistency, bidirectional] and the gradient to v where ``wanted``
    pair_loss_*        the loss of x and y, and the gradients asked for by the bits of ``wanted``:
                       mean t²·(x - y)² where there is a t, else mean ρ(x - y)

grad_output is 0-d, or [B] under reduction "none".
"""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._library import define
from flowkernels.ops._losses import gradients_like, loss_like

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.correction.kernels:"


def _self_corrected_forward_fake(v: Tensor, *others: Any) -> list[Tensor]:
    reduction, wanted = others[-2:]
    return [*(loss_like(v, reduction) for _ in range(3)), *gradients_like(wanted, v)]


def _self_corrected_backward_fake(grad_output: Tensor, v: Tensor, *others: Any) -> Tensor:
    return v.new_empty(v.shape)


def _pair_loss_forward_fake(
    x: Tensor, y: Tensor, t: Tensor | None, c: float, reduction: int, wanted: int
) -> list[Tensor]:
    return [loss_like(x, reduction), *gradients_like(wanted, x, y)]


def _pair_loss_backward_fake(
    grad_output: Tensor,
    x: Tensor,
    y: Tensor,
    t: Tensor | None,
    c: float,
    reduction: int,
    wanted: int,
) -> list[Tensor]:
    return gradients_like(wanted, x, y)


def _rescale_fake(gradients: Any, *others: Any) -> None:
    return None


_SELF_CORRECTED = (
    "Tensor v, Tensor v_teacher, Tensor v_post, Tensor v_prev, Tensor x0, Tensor noise, Tensor t,"
    " Tensor t_post, Tensor t_prev, float trunc, float c, float lam_bi, int reduction"
)
_PAIR = "Tensor x, Tensor y, Tensor? t, float c, int reduction, int wanted"

self_corrected_forward = define(
    "self_corrected_forward",
    f"({_SELF_CORRECTED}, int wanted) -> Tensor[]",
    _self_corrected_forward_fake,
    triton=_KERNELS + "self_corrected_forward",
)
self_corrected_rescale_ = define(
    "self_corrected_rescale_",
    f"(Tensor(a!) gradient, Tensor grad_output, {_SELF_CORRECTED}) -> ()",
    _rescale_fake,
    triton=_KERNELS + "self_corrected_rescale_",
)
self_corrected_backward = define(
    "self_corrected_backward",
    f"(Tensor grad_output, {_SELF_CORRECTED}) -> Tensor",
    _self_corrected_backward_fake,
    triton=_KERNELS + "self_corrected_backward",
)
pair_loss_forward = define(
    "pair_loss_forward",
    f"({_PAIR}) -> Tensor[]",
    _pair_loss_forward_fake,
    triton=_KERNELS + "pair_loss_forward",
)
pair_loss_rescale_ = define(
    "pair_loss_rescale_",
    f"(Tensor(a!)[] gradients, Tensor grad_output, {_PAIR}) -> ()",
    _rescale_fake,
    triton=_KERNELS + "pair_loss_rescale_",
)
pair_loss_backward = define(
    "pair_loss_backward",
    f"(Tensor grad_output, {_PAIR}) -> Tensor[]",
    _pair_loss_backward_fake,
    triton=_KERNELS + "pair_loss_backward",
)
