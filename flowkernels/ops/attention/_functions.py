"""The family's ``autograd.Function`` classes: heads, and the core between them and the outputs.

``joint_attention`` is two of them in a row. Either saves only what its own backward reads: the
heads keep a stream's q and k where they are normed, and nothing else; the core keeps the joint q,
k, v. So activations are stored once, and both are differentiable again under ``create_graph``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flowkernels.ops._autograd import (
    FusedFunction,
    mask_of,
    readable,
    reference_gradients,
    scatter,
)
from flowkernels.ops.attention import _operators as operators
from flowkernels.ops.attention import cores, reference

Tensor = torch.Tensor


class QKNormRope(FusedFunction):
    """Saves q, k and their statistics; recomputes the normalised rows in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        interleaved: bool,
        eps: float,
        rounding: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.options = backend, (interleaved, eps, rounding)
        q_out, k_out, q_rstd, k_rstd = operators.qk_norm_rope_forward(
            backend, q, k, q_weight, k_weight, cos, sin, interleaved, eps, rounding
        )
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> Any:
        q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:5]
        inputs = (q, k, q_weight, k_weight)
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda q, k, q_weight, k_weight: reference.qk_norm_rope(
                    q, k, q_weight, k_weight, cos, sin, *ctx.options
                ),
                inputs,
                (grad_q, grad_k),
                needed,
            )
        else:
            found = scatter(
                operators.qk_norm_rope_backward(
                    ctx.backend,
                    readable(grad_q),
                    readable(grad_k),
                    *inputs,
                    cos,
                    sin,
                    q_rstd,
                    k_rstd,
                    *ctx.options,
                    mask_of(needed),
                ),
                needed,
            )
        return (None, *found, None, None, None, None, None)


class JointHeads(FusedFunction):
    """Both streams' q, k, v into the joint layout; saves q and k of the normed streams alone."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        q1: Tensor,
        k1: Tensor,
        v1: Tensor,
        q2: Tensor | None,
        k2: Tensor | None,
        v2: Tensor | None,
        q1_weight: Tensor | None,
        k1_weight: Tensor | None,
        q2_weight: Tensor | None,
        k2_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        key_lengths: Tensor | None,
        norm1: bool,
        norm2: bool,
        interleaved: bool,
        eps: float,
        rounding: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams = (q1, k1, v1, q2, k2, v2)
        rest = (q1_weight, k1_weight, q2_weight, k2_weight, cos, sin, key_lengths)
        options = (norm1, norm2, interleaved, eps, rounding)
        q, k, v, q_rstd, k_rstd = operators.joint_heads_forward(backend, *streams, *rest, *options)
        read = (norm1, norm1, False, norm2, norm2, False)
        ctx.save_for_backward(
            *(x if need else None for x, need in zip(streams, read, strict=True)),
            *rest,
            q_rstd,
            k_rstd,
        )
        ctx.backend, ctx.options = backend, options
        ctx.forms = tuple(None if x is None else (x.shape, x.dtype) for x in streams)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> Any:
        *saved, cos, sin, key_lengths, q_rstd, k_rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:11]
        streams = [
            _stand_in(grad_q, *form) if x is None and form is not None else x
            for x, form in zip(saved[:6], ctx.forms, strict=True)
        ]
        inputs = (*streams, *saved[6:])
        if torch.is_grad_enabled():
            # A stand-in enters linearly: its values have no part in the gradient, its place has.
            inputs = tuple(
                x.requires_grad_() if x is not None and need and not x.requires_grad else x
                for x, need in zip(inputs, needed, strict=True)
            )
            found = reference_gradients(
                _heads_formula(cos, sin, key_lengths, ctx.options),
                inputs,
                (grad_q, grad_k, grad_v),
                needed,
            )
            return (None, *found, *(None,) * 8)
        grads = (grad_q, grad_k, grad_v)
        found = _passed_on(grads, ctx.forms, ctx.options, cos is not None, key_lengths is not None)
        found = [each if need else None for each, need in zip(found, needed, strict=True)]
        rest = [need and each is None for each, need in zip(found, needed, strict=True)]
        if any(rest):
            written = operators.joint_heads_backward(
                ctx.backend,
                *(readable(grad) for grad in grads),
                *inputs,
                cos,
                sin,
                key_lengths,
                q_rstd,
                k_rstd,
                *ctx.options,
                mask_of(rest),
            )
            pairs = zip(found, scatter(written, rest), strict=True)
            found = [mine if theirs is None else theirs for mine, theirs in pairs]
        return (None, *found, *(None,) * 8)


def _passed_on(
    grads: tuple[Tensor, ...], forms: Any, options: Any, rope: bool, lengths: bool
) -> list[Tensor | None]:
    """Gradients that are rows of the joint ones as they are: neither normed, turned nor packed."""
    found: list[Tensor | None] = [None] * 10
    for index, form in enumerate(forms):
        stream, which = divmod(index, 3)
        untouched = (
            form is not None
            and form[1] == grads[which].dtype
            and not (which < 2 and (rope or options[stream]))
            and not (which > 0 and lengths)
        )
        if untouched:
            start = 0 if stream == 0 else forms[which][0][1]
            found[index] = grads[which].narrow(1, start, form[0][1])
    return found


def _heads_formula(
    cos: Tensor | None, sin: Tensor | None, key_lengths: Tensor | None, options: Any
) -> Callable[..., Any]:
    def formula(*operands: Any) -> Any:
        rest: Any = (cos, sin, key_lengths, *options)
        return reference.joint_heads(*operands, *rest)

    return formula


def _stand_in(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of a shape and dtype that holds one head's row: what nobody reads was not saved."""
    return like.new_empty((1, 1, 1, shape[-1]), dtype=dtype).expand(shape)


class Attention(FusedFunction):
    """A core on the joint layout; saves q, k, v, the output and what the core asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        core: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        out, saved = cores.CORES[core].forward(q, k, v, lengths, scale)
        ctx.save_for_backward(q, k, v, out, lengths, *saved)
        ctx.core, ctx.scale = core, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        q, k, v, out, lengths, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda q, k, v: reference.attention(q, k, v, lengths, ctx.scale),
                (q, k, v),
                (grad_out,),
                needed,
            )
        else:
            gradients = cores.CORES[ctx.core].backward(
                readable(grad_out), q, k, v, out, tuple(saved), lengths, ctx.scale
            )
            found = [each if need else None for each, need in zip(gradients, needed, strict=True)]
        return (None, *found, None, None)
