"""Schemas and fakes of the losses' operators: three each.

    forward    the loss, and the gradients asked for by the bits of ``wanted`` as grad_output = 1
               gives them, each in its operand's dtype: one pass over the operands
    rescale_   writes into those gradients what grad_output gives instead; where grad_output is 1,
               which it reads on the device, it touches nothing
    backward   the gradients anew, from the operands and grad_output

grad_output is 0-d, or [B] under reduction "none".
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops._losses import gradients_like, loss_like

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.losses.kernels:"


def _flow_matching_forward_fake(v, x0, noise, dt, weight, reduction, wanted):  # type: ignore[no-untyped-def]
    return [loss_like(v, reduction), *gradients_like(wanted, v, x0, noise)]


def _flow_matching_backward_fake(grad_output, v, x0, noise, dt, weight, reduction, wanted):  # type: ignore[no-untyped-def]
    return gradients_like(wanted, v, x0, noise)


def _fgm_forward_fake(  # type: ignore[no-untyped-def]
    u, v, x0, noise, u_uncond, t, weight, lam, guidance, sid, reduction, wanted
):
    skipped = u.new_empty((), dtype=torch.int32)
    omega = u.new_empty(u.shape[:1], dtype=torch.float32)
    gradients = gradients_like(wanted, u, v, x0, noise, u_uncond)
    return [loss_like(u, reduction), skipped, omega, *gradients]


def _fgm_backward_fake(  # type: ignore[no-untyped-def]
    grad_output, u, v, x0, noise, u_uncond, omega, lam, guidance, reduction, wanted
):
    return gradients_like(wanted, u, v, x0, noise, u_uncond)


def _rescale_fake(gradients, *others):  # type: ignore[no-untyped-def]
    return None


# With dt, x0 and noise are x_start and x_end of straightening.
_FLOW_MATCHING = (
    "Tensor v, Tensor x0, Tensor noise, Tensor? dt, Tensor? weight, int reduction, int wanted"
)
_FGM = "Tensor u, Tensor v, Tensor x0, Tensor noise, Tensor? u_uncond"
_FGM_BACKWARD = f"{_FGM}, Tensor omega, float lam, float guidance, int reduction, int wanted"

flow_matching_forward = define(
    "flow_matching_forward",
    f"({_FLOW_MATCHING}) -> Tensor[]",
    _flow_matching_forward_fake,
    triton=_KERNELS + "flow_matching_forward",
)
flow_matching_rescale_ = define(
    "flow_matching_rescale_",
    f"(Tensor(a!)[] gradients, Tensor grad_output, {_FLOW_MATCHING}) -> ()",
    _rescale_fake,
    triton=_KERNELS + "flow_matching_rescale_",
)
flow_matching_backward = define(
    "flow_matching_backward",
    f"(Tensor grad_output, {_FLOW_MATCHING}) -> Tensor[]",
    _flow_matching_backward_fake,
    triton=_KERNELS + "flow_matching_backward",
)
# After the loss come the number of samples left out, int32, and ω [B], NaN for those: what the
# backward pass needs to know about t, the weights and the normaliser.
fgm_forward = define(
    "fgm_forward",
    f"({_FGM}, Tensor t, Tensor? weight, float lam, float guidance, bool sid, int reduction,"
    " int wanted) -> Tensor[]",
    _fgm_forward_fake,
    triton=_KERNELS + "fgm_forward",
)
fgm_rescale_ = define(
    "fgm_rescale_",
    f"(Tensor(a!)[] gradients, Tensor grad_output, {_FGM_BACKWARD}) -> ()",
    _rescale_fake,
    triton=_KERNELS + "fgm_rescale_",
)
fgm_backward = define(
    "fgm_backward",
    f"(Tensor grad_output, {_FGM_BACKWARD}) -> Tensor[]",
    _fgm_backward_fake,
    triton=_KERNELS + "fgm_backward",
)
