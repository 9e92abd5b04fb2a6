"""The autograd of the correction's losses; ``_losses`` says how it works."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._autograd import FusedFunction, mask_of, reference_gradients, scatter
from flowkernels.ops._losses import ready, stores, taken
from flowkernels.ops._samples import REDUCTIONS
from flowkernels.ops.correction import _operators as operators
from flowkernels.ops.correction import reference

Tensor = torch.Tensor


class SelfCorrected(FusedFunction):
    """v alone has a gradient, and total alone gives one."""

    @staticmethod
    def forward(ctx: Any, backend: str, v: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        """``operands``: five tensors like v, three times, (trunc, c, lam_bi, reduction)."""
        total, consistency, bidirectional, *gradients = operators.self_corrected_forward(
            backend, v, *operands, int(stores((v,), (True,)))
        )
        ctx.save_for_backward(v, *operands[:8])
        ctx.backend, ctx.settings, ctx.gradients = backend, operands[8:], gradients
        ctx.mark_non_differentiable(consistency, bidirectional)
        ctx.set_materialize_grads(False)  # else backward is handed zeros for those two
        return total, consistency, bidirectional

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> Any:
        none = (None,) * 12
        if grad_total is None:
            return (None, None, *none)
        if gradients := ready(ctx, grad_total):
            return (None, gradients[0], *none)
        if torch.is_grad_enabled():
            v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev = ctx.saved_tensors
            trunc, c, lam_bi, code = ctx.settings
            found = reference_gradients(
                lambda v: reference.self_corrected(
                    *(v, t, v_teacher, v_post, t_post, v_prev, t_prev, x0, noise),
                    *(trunc, c, lam_bi, REDUCTIONS[code]),
                )[0],
                (v,),
                (grad_total,),
                (True,),
            )
            return (None, *found, *none)
        arguments = (grad_total, *ctx.saved_tensors, *ctx.settings)
        gradients = taken(ctx)
        if gradients:
            operators.self_corrected_rescale_(ctx.backend, gradients[0], *arguments)
            return (None, gradients[0], *none)
        return (None, operators.self_corrected_backward(ctx.backend, *arguments), *none)


class PairLoss(FusedFunction):
    """self_reflow where there is a t, else pseudo_huber."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, y: Tensor, t: Tensor | None, c: float, reduction: int
    ) -> Tensor:
        needed = ctx.needs_input_grad[1:3]
        wanted = mask_of(needed)
        loss, *gradients = operators.pair_loss_forward(
            backend, x, y, t, c, reduction, wanted if stores((x, y), needed) else 0
        )
        ctx.save_for_backward(x, y, t)
        ctx.backend, ctx.c, ctx.reduction = backend, c, reduction
        ctx.gradients, ctx.needed, ctx.wanted = gradients, needed, wanted
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        if gradients := ready(ctx, grad_loss):
            return (None, *scatter(gradients, ctx.needed), None, None, None)
        x, y, t = ctx.saved_tensors
        if torch.is_grad_enabled():
            reduction = REDUCTIONS[ctx.reduction]
            found = reference_gradients(
                lambda x, y: (
                    reference.pseudo_huber(x, y, ctx.c, reduction)
                    if t is None
                    else reference.self_reflow(x, y, t, reduction)
                ),
                (x, y),
                (grad_loss,),
                ctx.needed,
            )
            return (None, *found, None, None, None)
        arguments = (grad_loss, x, y, t, ctx.c, ctx.reduction, ctx.wanted)
        gradients = taken(ctx)
        if gradients:
            operators.pair_loss_rescale_(ctx.backend, gradients, *arguments)
        else:
            gradients = operators.pair_loss_backward(ctx.backend, *arguments)
        return (None, *scatter(gradients, ctx.needed), None, None, None)
