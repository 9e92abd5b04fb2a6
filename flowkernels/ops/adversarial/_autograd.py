"""How the adversarial losses meet autograd: see ``flowkernels.ops._losses``."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._autograd import FusedFunction, mask_of, reference_gradients, scatter
from flowkernels.ops._losses import ready, stores, taken
from flowkernels.ops.adversarial import _operators as operators
from flowkernels.ops.adversarial import reference

Tensor = torch.Tensor


class GAN(FusedFunction):
    """The discriminator's loss; without ``fake`` the generator's."""

    @staticmethod
    def forward(ctx: Any, backend: str, real: Tensor, fake: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[1:3]
        wanted = mask_of(needed)
        loss, *gradients = operators.gan_forward(
            backend, real, fake, wanted if stores((real, fake), needed) else 0
        )
        ctx.save_for_backward(real, fake)
        ctx.backend, ctx.gradients = backend, gradients
        ctx.needed, ctx.wanted = needed, wanted
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if gradients := ready(ctx, grad_loss):
            return (None, *scatter(gradients, ctx.needed))
        operands = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = reference_gradients(reference.gan, operands, (grad_loss,), ctx.needed)
            return (None, *found)
        gradients = taken(ctx)
        if gradients:
            operators.gan_rescale_(ctx.backend, gradients, grad_loss, *operands, ctx.wanted)
        else:
            gradients = operators.gan_backward(ctx.backend, grad_loss, *operands, ctx.wanted)
        return (None, *scatter(gradients, ctx.needed))


class GradientPenalty(FusedFunction):
    """The input gradient is inside the graph of the discriminator's weights: so is its gradient."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, gamma: float) -> Tensor:
        loss, *gradients = operators.gradient_penalty_forward(
            backend, x, gamma, int(stores((x,), (True,)))
        )
        ctx.save_for_backward(x)
        ctx.backend, ctx.gamma, ctx.gradients = backend, gamma, gradients
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if gradients := ready(ctx, grad_loss):
            return None, gradients[0], None
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda x: reference.gradient_penalty(x, ctx.gamma), (x,), (grad_loss,), (True,)
            )
            return (None, *found, None)
        gradients = taken(ctx)
        if gradients:
            operators.gradient_penalty_rescale_(ctx.backend, gradients[0], grad_loss, x, ctx.gamma)
            return None, gradients[0], None
        gradient = operators.gradient_penalty_backward(ctx.backend, grad_loss, x, ctx.gamma)
        return None, gradient, None
