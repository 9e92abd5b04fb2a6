"""Schemas and fakes of the adversarial losses' operators: three each.

    forward    the loss, and the gradients asked for by the bits of ``wanted`` as grad_output = 1
               gives them, each in its operand's dtype: one pass over the operands
    rescale_   writes into those gradients what grad_output gives instead; where grad_output is 1,
               which it reads on the device, it touches nothing
    backward   the gradients anew, from the operands and grad_output

grad_output is 0-d.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops._losses import gradients_like

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.adversarial.kernels:"


def _loss_like(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _gan_forward_fake(real, fake, wanted):  # type: ignore[no-untyped-def]
    return [_loss_like(real), *gradients_like(wanted, real, fake)]


def _gan_backward_fake(grad_output, real, fake, wanted):  # type: ignore[no-untyped-def]
    return gradients_like(wanted, real, fake)


def _penalty_forward_fake(x, gamma, wanted):  # type: ignore[no-untyped-def]
    return [_loss_like(x), *gradients_like(wanted, x)]


def _penalty_backward_fake(grad_output, x, gamma):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _rescale_fake(gradients, grad_output, *operands):  # type: ignore[no-untyped-def]
    return None


# Without `fake` the loss is the generator's, of its logits in the place of `real`.
gan_forward = define(
    "gan_forward",
    "(Tensor real, Tensor? fake, int wanted) -> Tensor[]",
    _gan_forward_fake,
    triton=_KERNELS + "gan_forward",
)
gan_rescale_ = define(
    "gan_rescale_",
    "(Tensor(a!)[] gradients, Tensor grad_output, Tensor real, Tensor? fake, int wanted) -> ()",
    _rescale_fake,
    triton=_KERNELS + "gan_rescale_",
)
gan_backward = define(
    "gan_backward",
    "(Tensor grad_output, Tensor real, Tensor? fake, int wanted) -> Tensor[]",
    _gan_backward_fake,
    triton=_KERNELS + "gan_backward",
)
gradient_penalty_forward = define(
    "gradient_penalty_forward",
    "(Tensor x, float gamma, int wanted) -> Tensor[]",
    _penalty_forward_fake,
    triton=_KERNELS + "gradient_penalty_forward",
)
gradient_penalty_rescale_ = define(
    "gradient_penalty_rescale_",
    "(Tensor(a!) gradient, Tensor grad_output, Tensor x, float gamma) -> ()",
    _rescale_fake,
    triton=_KERNELS + "gradient_penalty_rescale_",
)
gradient_penalty_backward = define(
    "gradient_penalty_backward",
    "(Tensor grad_output, Tensor x, float gamma) -> Tensor",
    _penalty_backward_fake,
    triton=_KERNELS + "gradient_penalty_backward",
)
