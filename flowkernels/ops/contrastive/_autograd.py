"""How contrastive flow matching meets autograd: see ``flowkernels.ops._losses``."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._autograd import FusedFunction, reference_gradients
from flowkernels.ops._losses import ready, stores, taken
from flowkernels.ops._samples import REDUCTIONS
from flowkernels.ops.contrastive import _operators as operators
from flowkernels.ops.contrastive import reference

Tensor = torch.Tensor


class ContrastiveFlowMatching(FusedFunction):
    """Its gradient is that of v alone: the others take the reference path."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        v: Tensor,
        x0: Tensor,
        noise: Tensor,
        negatives: Tensor,
        weight: Tensor | None,
        lam: float,
        reduction: int,
    ) -> Tensor:
        operands = (v, x0, noise, negatives, weight)
        wanted = int(stores((v,), (True,)))
        loss, *gradients = operators.contrastive_forward(backend, *operands, lam, reduction, wanted)
        ctx.save_for_backward(*operands)
        ctx.backend, ctx.settings, ctx.gradients = backend, (lam, reduction), gradients
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        none = (None,) * 6
        if gradients := ready(ctx, grad_loss):
            return (None, gradients[0], *none)
        v, x0, noise, negatives, weight = ctx.saved_tensors
        lam, reduction = ctx.settings
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda v: reference.contrastive_flow_matching(
                    v, x0, noise, negatives, weight, lam, REDUCTIONS[reduction]
                ),
                (v,),
                (grad_loss,),
                (True,),
            )
            return (None, *found, *none)
        arguments = (grad_loss, v, x0, noise, negatives, weight, lam, reduction)
        gradients = taken(ctx)
        if gradients:
            operators.contrastive_rescale_(ctx.backend, gradients[0], *arguments)
            return (None, gradients[0], *none)
        return (None, operators.contrastive_backward(ctx.backend, *arguments), *none)
