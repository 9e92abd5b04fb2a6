"""The autograd of the losses; ``_losses`` says how it works."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._autograd import FusedFunction, mask_of, reference_gradients, scatter
from flowkernels.ops._losses import ready, stores, taken
from flowkernels.ops._samples import REDUCTIONS
from flowkernels.ops.losses import _operators as operators
from flowkernels.ops.losses import reference

Tensor = torch.Tensor


class FlowMatching(FusedFunction):
    """straightening too: there x0 and noise are x_start and x_end, and dt is given."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        v: Tensor,
        x0: Tensor,
        noise: Tensor,
        dt: Tensor | None,
        weight: Tensor | None,
        reduction: int,
    ) -> Tensor:
        needed = ctx.needs_input_grad[1:4]
        wanted = mask_of(needed)
        loss, *gradients = operators.flow_matching_forward(
            backend,
            v,
            x0,
            noise,
            dt,
            weight,
            reduction,
            wanted if stores((v, x0, noise), needed) else 0,
        )
        ctx.save_for_backward(v, x0, noise, dt, weight)
        ctx.backend, ctx.reduction = backend, reduction
        ctx.gradients, ctx.needed, ctx.wanted = gradients, needed, wanted
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if gradients := ready(ctx, grad_loss):
            return (None, *scatter(gradients, ctx.needed), None, None, None)
        v, x0, noise, dt, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda v, x0, noise: reference.flow_matching(
                    v, x0, noise, dt, weight, REDUCTIONS[ctx.reduction]
                ),
                (v, x0, noise),
                (grad_loss,),
                ctx.needed,
            )
            return (None, *found, None, None, None)
        arguments = (grad_loss, v, x0, noise, dt, weight, ctx.reduction, ctx.wanted)
        gradients = taken(ctx)
        if gradients:
            operators.flow_matching_rescale_(ctx.backend, gradients, *arguments)
        else:
            gradients = operators.flow_matching_backward(ctx.backend, *arguments)
        return (None, *scatter(gradients, ctx.needed), None, None, None)


class FGM(FusedFunction):
    """Its second output counts the samples that were left out; it has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        u: Tensor,
        v: Tensor,
        x0: Tensor,
        noise: Tensor,
        u_uncond: Tensor | None,
        t: Tensor,
        weight: Tensor | None,
        lam: float,
        guidance: float,
        sid: bool,
        reduction: int,
    ) -> tuple[Tensor, Tensor]:
        operands = (u, v, x0, noise, u_uncond)
        needed = ctx.needs_input_grad[1:6]
        wanted = mask_of(needed)
        loss, skipped, omega, *gradients = operators.fgm_forward(
            backend,
            *operands,
            t,
            weight,
            lam,
            guidance,
            sid,
            reduction,
            wanted if stores(operands, needed) else 0,
        )
        ctx.save_for_backward(*operands, t, weight, omega)
        ctx.backend, ctx.settings = backend, (lam, guidance, sid, reduction)
        ctx.gradients, ctx.needed, ctx.wanted = gradients, needed, wanted
        ctx.mark_non_differentiable(skipped)
        ctx.set_materialize_grads(False)  # else backward is handed zeros for `skipped`
        return loss, skipped

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> Any:
        none = (None,) * 6
        if grad_loss is None:
            return (None, *(None,) * 5, *none)
        if gradients := ready(ctx, grad_loss):
            return (None, *scatter(gradients, ctx.needed), *none)
        u, v, x0, noise, u_uncond, t, weight, omega = ctx.saved_tensors
        operands = (u, v, x0, noise, u_uncond)
        lam, guidance, sid, reduction = ctx.settings
        if torch.is_grad_enabled():
            settings = (lam, guidance, sid, REDUCTIONS[reduction])
            found = reference_gradients(
                lambda u, v, x0, noise, u_uncond: reference.fgm(
                    u, v, x0, noise, t, weight, u_uncond, *settings
                )[0],
                operands,
                (grad_loss,),
                ctx.needed,
            )
            return (None, *found, *none)
        arguments = (grad_loss, *operands, omega, lam, guidance, reduction, ctx.wanted)
        gradients = taken(ctx)
        if gradients:
            operators.fgm_rescale_(ctx.backend, gradients, *arguments)
        else:
            gradients = operators.fgm_backward(ctx.backend, *arguments)
        return (None, *scatter(gradients, ctx.needed), *none)
