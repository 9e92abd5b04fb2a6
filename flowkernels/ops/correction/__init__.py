"""Losses of Self-Corrected Flow distillation: loss and gradient in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._samples import (
    REDUCTIONS,
    check_batch_vector,
    check_like,
    check_samples,
    kernels_read_samples,
    tracked,
)
from flowkernels.ops._validate import as_finite, as_number, check_choice
from flowkernels.ops.correction import _operators as operators
from flowkernels.ops.correction import reference
from flowkernels.ops.correction._autograd import PAIR_LOSS, SELF_CORRECTED

__all__ = ["pseudo_huber", "self_corrected", "self_reflow"]

Tensor = torch.Tensor


def self_corrected(
    v: Tensor,
    t: Tensor,
    v_teacher: Tensor,
    v_post: Tensor,
    t_post: Tensor,
    v_prev: Tensor,
    t_prev: Tensor,
    x0: Tensor,
    noise: Tensor,
    *,
    trunc: float,
    c: float = 0.01,
    lam_bi: float = 0.1,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated and bidirectional consistency of SCFlow (arXiv 2412.16906).

    ``total = consistency + lam_bi·bidirectional``, means over a sample's elements of ρ(d_con) and
    ρ(d_bi), with ``ρ(d) = √(d² + c²) - c`` of each element. Where f(x, t) = x - t·v is the endpoint
    that a velocity points to, d_con is f(x_t, t) less f at the neighbour t_post (less x0 where
    t_post < trunc), d_bi the same less f at the neighbour t_prev, and the teacher's velocity leads
    from x_t to both neighbours. The states cancel:

        d_con = (t - t_post)·v_teacher + t_post·v_post - t·v        t_post >= trunc
        d_con = t·((noise - x0) - v)                                t_post < trunc
        d_bi  = t_prev·v_prev - (t_prev - t)·v_teacher - t·v

    Gradient of total, with n elements a sample:
    ``-t/(n·B)·(d_con/√(d_con² + c²) + lam_bi·d_bi/√(d_bi² + c²))`` to v. All else is a constant:
    no gradient goes to another operand, and none comes from the other two results.

    Args:
        v: [B, ...], the student's velocity at (x_t, t), x_t = (1 - t)·x0 + t·noise. Samples that
            are not contiguous take the reference path (of any operand).
        t: [B], times of x_t; float64 ones are taken as float32 where no operand is float64.
        v_teacher: [B, ...] of v's shape, the teacher's velocity at (x_t, t), after guidance.
        v_post: [B, ...] of v's shape, the target network's velocity at
            (x_t - (t - t_post)·v_teacher, t_post): the neighbour next along sampling.
        t_post: [B], times of that neighbour, at most t.
        v_prev: [B, ...] of v's shape, the target network's velocity at
            (x_t + (t_prev - t)·v_teacher, t_prev): the neighbour before it.
        t_prev: [B], times of that neighbour, at least t.
        x0: [B, ...] of v's shape, data.
        noise: [B, ...] of v's shape.
        trunc: τ; a sample with t_post < trunc, strictly, is compared with its x0.
        c: Width of ρ's quadratic part; positive.
        lam_bi: Weight of the bidirectional term; 0 is allowed.
        reduction: ``"mean"``, Σ_b ℓ_b / B (NaN for an empty batch); ``"none"``, [B]; ``"sum"``,
            Σ_b Σ_elements.

    Returns:
        (total, consistency, bidirectional), each 0-d, or [B] for ``"none"``; at least float32,
        accumulated in float32 or better.

    Raises:
        TypeError: An operand is no floating-point tensor, or an option no number.
        ValueError: A shape or device does not fit, c is not positive, an option is not finite, or
            the reduction is unknown; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import self_corrected
        >>> x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
        >>> t = torch.tensor([0.2, 0.9])
        >>> straight = noise - x0  # every neighbour agrees about the endpoint
        >>> total, consistency, bidirectional = self_corrected(
        ...     straight, t, straight, straight, t - 0.1, straight, t + 0.1, x0, noise, trunc=0.4
        ... )
        >>> total
        tensor(0.)
    """
    check_samples(v, "v")
    check_batch_vector(t, "t", v)
    check_like(v_teacher, "v_teacher", v)
    check_like(v_post, "v_post", v)
    check_batch_vector(t_post, "t_post", v)
    check_like(v_prev, "v_prev", v)
    check_batch_vector(t_prev, "t_prev", v)
    check_like(x0, "x0", v)
    check_like(noise, "noise", v)
    trunc, lam_bi = as_finite(trunc, "trunc"), as_finite(lam_bi, "lam_bi")
    c = _width(c)
    check_choice(reduction, "reduction", REDUCTIONS)
    served = kernels_read_samples(v, v_teacher, v_post, v_prev, x0, noise)
    backend = _library.choose("self_corrected", v.device, served)
    if backend == "reference":
        return reference.self_corrected(
            v, t, v_teacher, v_post, t_post, v_prev, t_prev, x0, noise, trunc, c, lam_bi, reduction
        )
    constants = (v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev)
    operands = (
        *(_constant(x) for x in constants[:5]),
        *(_single(_constant(x)) for x in constants[5:]),
        *(trunc, c, lam_bi, REDUCTIONS.index(reduction)),
    )
    if tracked(v, constants=constants):
        total, consistency, bidirectional = SELF_CORRECTED(backend, v, *operands)
    else:
        total, consistency, bidirectional = operators.self_corrected_forward(
            backend, v, *operands, 0
        )
    return total, consistency, bidirectional


def self_reflow(v_r: Tensor, v_1: Tensor, t: Tensor, *, reduction: str = "mean") -> Tensor:
    """The self-correction of SCFlow (arXiv 2412.16906): every t returns the one-step output.

    ``ℓ_b = mean over the sample's elements of t²·(v_r - v_1)²``, which is ``‖f(x_r, t) - x̂‖²`` with
    f(x, t) = x - t·v, the one-step output x̂ = noise - v_1 and x_r = (1 - t)·x̂ + t·noise. Gradient:
    ``2·t²·(v_r - v_1)/(n·B)`` to v_r; v_1 is a constant.

    Args:
        v_r: [B, ...], the student's velocity at (x_r, t), x_r = noise - (1 - t)·v_1. Samples that
            are not contiguous take the reference path.
        v_1: [B, ...] of v_r's shape, the student's velocity at (noise, 1).
        t: [B], times of x_r.
        reduction: ``"mean"``, Σ_b ℓ_b / B (NaN for an empty batch); ``"none"``, [B]; ``"sum"``,
            Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32, accumulated in float32 or better.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: A shape or device does not fit, or the reduction is unknown; names the
            argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import self_reflow
        >>> v_1 = torch.randn(2, 3)
        >>> self_reflow(v_1 + 1, v_1, torch.full((2,), 0.5))
        tensor(0.2500)
    """
    check_samples(v_r, "v_r")
    check_like(v_1, "v_1", v_r)
    check_batch_vector(t, "t", v_r)
    check_choice(reduction, "reduction", REDUCTIONS)
    backend = _library.choose("self_reflow", v_r.device, kernels_read_samples(v_r, v_1))
    if backend == "reference":
        return reference.self_reflow(v_r, v_1, t, reduction)
    operands = (_constant(v_1), _single(_constant(t)), 1.0, REDUCTIONS.index(reduction))
    if tracked(v_r, constants=(v_1, t)):
        return PAIR_LOSS(backend, v_r, *operands)
    return operators.pair_loss_forward(backend, v_r, *operands, 0)[0]


def pseudo_huber(x: Tensor, y: Tensor, *, c: float = 0.01, reduction: str = "mean") -> Tensor:
    """The pseudo-Huber loss of each element, ``ρ(d) = √(d² + c²) - c`` of d = x - y.

    ``ℓ_b = mean over the sample's elements of ρ(x - y)``: near d²/(2c) below c, |d| - c above. It
    is computed as d²/(√(d² + c²) + c), which keeps its digits at small d. Gradients:
    ``d/√(d² + c²)/(n·B)`` to x, its negative to y. (Of the norm of a sample it is another loss:
    Improved Consistency Training, arXiv 2310.14189. SCFlow, arXiv 2412.16906, takes elements.)

    Args:
        x: [B, ...]. Samples that are not contiguous take the reference path.
        y: [B, ...] of x's shape.
        c: Width of the quadratic part; positive.
        reduction: ``"mean"``, Σ_b ℓ_b / B (NaN for an empty batch); ``"none"``, [B]; ``"sum"``,
            Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32, accumulated in float32 or better.

    Raises:
        TypeError: An operand is no floating-point tensor, or c no number.
        ValueError: A shape or device does not fit, c is not positive, or the reduction is unknown;
            names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import pseudo_huber
        >>> pseudo_huber(torch.full((2, 5), 3.0), torch.zeros(2, 5), c=4.0)
        tensor(1.)
    """
    check_samples(x, "x")
    check_like(y, "y", x)
    c = _width(c)
    check_choice(reduction, "reduction", REDUCTIONS)
    backend = _library.choose("pseudo_huber", x.device, kernels_read_samples(x, y))
    if backend == "reference":
        return reference.pseudo_huber(x, y, c, reduction)
    code = REDUCTIONS.index(reduction)
    if tracked(x, y):
        return PAIR_LOSS(backend, x, y, None, c, code)
    return operators.pair_loss_forward(backend, x, y, None, c, code, 0)[0]


def _width(c: Any) -> float:
    """c, whose square float32 arithmetic has to hold."""
    number = as_number(c, "c")
    if not 1e-18 <= number <= 1e18:
        raise ValueError(f"c: got {number}, need a number > 0, from 1e-18 to 1e18")
    return number


def _single(t: Tensor) -> Tensor:
    """Times that the kernels read."""
    return t.float() if t.dtype == torch.float64 else t


def _constant(x: Tensor) -> Tensor:
    """An operand that no gradient goes to: autograd is not to walk what made it, nor to mark what
    an operator makes of it.
    """
    return x.detach() if x.requires_grad else x


for _name in __all__:
    _library.register_function(_name, "flowkernels.losses")
