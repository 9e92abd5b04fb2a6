"""How a loss whose gradients are born in its forward pass meets autograd.

The forward operator writes the gradients for grad_output = 1 while it reads the operands: one
pass over memory. What arrives in backward is a scale, and four cases have to come out right.

First backward. The stored gradients are scaled in place by an operator that reads grad_output on
the device and returns at once where it is 1, and are handed out: autograd owns them from here on.
Second backward (``retain_graph``). The buffers may be somebody's ``.grad`` by now. Rescaling them
in place by the ratio of the two grad_outputs would alter what the first backward gave, and would
need that scale kept; so the gradients are computed again, with grad_output passed in.
float16 gradients. 2·(v - w)/(n·B) underflows before a GradScaler's factor arrives, so they are
never stored unscaled: every backward computes them with grad_output passed in.
Under torch.compile the stored gradients are multiplied functionally (and fused by the compiler);
under ``create_graph`` the reference formula is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowkernels.ops._autograd import FusedFunction, mask_of, reference_gradients, scatter
from flowkernels.ops._samples import per_sample
from flowkernels.ops.losses import _operators as operators
from flowkernels.ops.losses import reference

Tensor = torch.Tensor

Compute = Callable[[Tensor | None, int], list[Tensor]]
"""(grad_output, wanted) to the gradients wanted."""


def stores_gradients(operands: Sequence[Tensor | None], needed: Sequence[bool]) -> bool:
    """Some gradient is asked for, and none of them in float16."""
    wanted = [x.dtype for x, need in zip(operands, needed, strict=True) if need and x is not None]
    return bool(wanted) and torch.float16 not in wanted


def save(ctx: Any, inputs: Sequence[Tensor | None], gradients: list[Tensor]) -> None:
    """Keep the inputs, and the stored gradients where the first backward will find them.

    Gradients go beside ``saved_tensors`` in eager mode, so that they are let go of at the first
    backward: they are no longer ours, and the memory would be held as long as the loss lives.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*inputs, *gradients)
        ctx.count = len(gradients)
    else:
        ctx.save_for_backward(*inputs)
        ctx.gradients = gradients


def scaled_gradients(
    ctx: Any, stored: Sequence[Tensor], grad_output: Tensor, needed: Sequence[bool], compute: Compute
) -> list[Tensor | None]:
    """The gradients times grad_output, by one of the ways above."""
    if torch.compiler.is_compiling():
        if stored:
            found = [(g * _broadcast(grad_output, g)).to(g.dtype) for g in stored]
        else:
            found = compute(grad_output, mask_of(needed))
    elif ctx.gradients:
        found, ctx.gradients = ctx.gradients, None
        operators.scale_gradients_(ctx.backend, found, grad_output)
    else:
        found = compute(grad_output, mask_of(needed))
    return scatter(found, needed)


def _broadcast(grad_output: Tensor, gradient: Tensor) -> Tensor:
    return per_sample(grad_output, gradient) if grad_output.dim() else grad_output


class FlowMatching(FusedFunction):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        v: Tensor,
        x0: Tensor,
        noise: Tensor,
        weight: Tensor | None,
        reduction: int,
    ) -> Tensor:
        needed = ctx.needs_input_grad[1:4]
        wanted = mask_of(needed) if stores_gradients((v, x0, noise), needed) else 0
        loss, *gradients = operators.flow_matching(
            backend, v, x0, noise, weight, None, reduction, wanted
        )
        save(ctx, (v, x0, noise, weight), gradients)
        ctx.backend, ctx.reduction = backend, reduction
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        v, x0, noise, weight, *stored = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda v, x0, noise: reference.flow_matching(
                    v, x0, noise, weight, operators.REDUCTIONS[ctx.reduction]
                ),
                (v, x0, noise),
                (grad_loss,),
                needed,
            )
        else:
            found = scaled_gradients(
                ctx,
                stored,
                grad_loss,
                needed,
                lambda scale, wanted: operators.flow_matching(
                    ctx.backend, v, x0, noise, weight, scale, ctx.reduction, wanted
                )[1:],
            )
        return (None, *found, None, None)


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
        needed = ctx.needs_input_grad[1:6]
        wanted = mask_of(needed) if stores_gradients((u, v, x0, noise, u_uncond), needed) else 0
        settings = (lam, guidance, sid, reduction)
        loss, skipped, *gradients = operators.fgm(
            backend, u, v, x0, noise, u_uncond, t, weight, None, *settings, wanted
        )
        save(ctx, (u, v, x0, noise, u_uncond, t, weight), gradients)
        ctx.backend, ctx.settings = backend, settings
        ctx.mark_non_differentiable(skipped)
        return loss, skipped

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> Any:
        u, v, x0, noise, u_uncond, t, weight, *stored = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:6]
        lam, guidance, sid, reduction = ctx.settings
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda u, v, x0, noise, u_uncond: reference.fgm(
                    u,
                    v,
                    x0,
                    noise,
                    t,
                    weight,
                    u_uncond,
                    lam,
                    guidance,
                    sid,
                    operators.REDUCTIONS[reduction],
                )[0],
                (u, v, x0, noise, u_uncond),
                (grad_loss,),
                needed,
            )
        else:
            found = scaled_gradients(
                ctx,
                stored,
                grad_loss,
                needed,
                lambda scale, wanted: operators.fgm(
                    ctx.backend, u, v, x0, noise, u_uncond, t, weight, scale, *ctx.settings, wanted
                )[2:],
            )
        return (None, *found, None, None, None, None, None, None)
