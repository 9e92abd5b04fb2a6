"""Schemas and fakes of the losses: one operator each, loss and gradients in one pass.

The gradients asked for by the bits of ``wanted`` follow the loss in the list that is returned,
each in its operand's dtype. They are scaled by ``grad_output`` (0-d, or [B] under reduction
"none"; read on the device), None for 1.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops._samples import REDUCTIONS

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.losses.kernels:"
NONE = REDUCTIONS.index("none")


def loss_like(x: Tensor, reduction: int) -> Tensor:
    """An empty loss of samples like ``x``: [B], or 0-d."""
    return x.new_empty(x.shape[:1] if reduction == NONE else (), dtype=torch.float32)


def _flow_matching_fake(v, x0, noise, weight, grad_output, reduction, wanted):  # type: ignore[no-untyped-def]
    return [loss_like(v, reduction), *gradients_like(wanted, v, x0, noise)]


def gradients_like(wanted: int, *operands: Tensor | None) -> list[Tensor]:
    """Empty contiguous gradients for the operands whose bit is set."""
    return [
        operand.new_empty(operand.shape)
        for bit, operand in enumerate(operands)
        if operand is not None and wanted >> bit & 1
    ]


def _fgm_fake(  # type: ignore[no-untyped-def]
    u, v, x0, noise, u_uncond, t, weight, grad_output, lam, guidance, sid, reduction, wanted
):
    gradients = gradients_like(wanted, u, v, x0, noise, u_uncond)
    return [loss_like(u, reduction), u.new_empty((), dtype=torch.int32), *gradients]


def _scale_fake(gradients, grad_output):  # type: ignore[no-untyped-def]
    return None


flow_matching = define(
    "flow_matching",
    "(Tensor v, Tensor x0, Tensor noise, Tensor? weight, Tensor? grad_output, int reduction,"
    " int wanted) -> Tensor[]",
    _flow_matching_fake,
    triton=_KERNELS + "flow_matching",
)
# Second in the list, after the loss: how many samples were not finite, int32.
fgm = define(
    "fgm",
    "(Tensor u, Tensor v, Tensor x0, Tensor noise, Tensor? u_uncond, Tensor t, Tensor? weight,"
    " Tensor? grad_output, float lam, float guidance, bool sid, int reduction, int wanted)"
    " -> Tensor[]",
    _fgm_fake,
    triton=_KERNELS + "fgm",
)
# In place; looks at grad_output on the device and touches nothing where it is 1.
scale_gradients_ = define(
    "scale_gradients_",
    "(Tensor(a!)[] gradients, Tensor grad_output) -> ()",
    _scale_fake,
    triton=_KERNELS + "scale_gradients_",
)
