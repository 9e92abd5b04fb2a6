"""The losses of SCFlow in plain PyTorch: the specification of the kernels.

    f(x, t) = x - t·v                          the endpoint that a velocity points to
    ρ(d) = √(d² + c²) - c                      elementwise; means over a sample's elements
    self_corrected: mean ρ(d_con) + lam_bi·mean ρ(d_bi)
    self_reflow:    mean t²·(v_r - v_1)²
    pseudo_huber:   mean ρ(x - y)

with t' = t_post, t'' = t_prev, v' = v_post, v'' = v_prev and the teacher's steps
``x_t' = x_t - (t - t')·v_teacher``, ``x_t'' = x_t + (t'' - t)·v_teacher``:

    d_con = f(x_t, t) - f(x_t', t')   = t'·(v' - v) + (t - t')·(v_teacher - v),    t' >= trunc
    d_con = f(x_t, t) - x0            = t·((noise - x0) - v),                      t' < trunc
    d_bi  = f(x_t, t) - f(x_t'', t'') = t''·(v'' - v) - (t'' - t)·(v_teacher - v)

x_t, x_t' and x_t'' cancel, so the right-hand sides need none of them. They are written in
differences of velocities, which float32 takes exactly where they are small: the order
``(t - t')·v_teacher + t'·v' - t·v`` of the same terms has an error of the size of v's rounding. The
``_literal`` functions are the middle of these equations, states and all: what the tests hold the
right-hand sides to.

Arithmetic and result are at least float32, and float64 where an operand is; t' < trunc is decided
in the dtype of t', at least float32.
"""

from __future__ import annotations

import torch

from flowkernels.ops._losses import compute_dtype, flat, reduce
from flowkernels.ops._samples import per_sample

Tensor = torch.Tensor
Losses = tuple[Tensor, Tensor, Tensor]


def rho(d: Tensor, c: float) -> Tensor:
    """√(d² + c²) - c, in the form that keeps its digits at small d."""
    squares = d.square()
    return squares / ((squares + c * c).sqrt() + c)


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
    trunc: float,
    c: float,
    lam_bi: float,
    reduction: str,
) -> Losses:
    """(total, consistency, bidirectional); the gradient is of total, to v."""
    truncated = per_sample(_truncated(t_post, trunc), v)
    v, v_teacher, v_post, v_prev, x0, noise = _constants(v, v_teacher, v_post, v_prev, x0, noise)
    t, t_post, t_prev = (per_sample(time.detach().to(v.dtype), v) for time in (t, t_post, t_prev))
    to_teacher = v_teacher - v
    d_con = torch.where(
        truncated,
        t * ((noise - x0) - v),
        t_post * (v_post - v) + (t - t_post) * to_teacher,
    )
    d_bi = t_prev * (v_prev - v) - (t_prev - t) * to_teacher
    return _total(d_con, d_bi, c, lam_bi, reduction)


def self_corrected_literal(
    v: Tensor,
    t: Tensor,
    v_teacher: Tensor,
    v_post: Tensor,
    t_post: Tensor,
    v_prev: Tensor,
    t_prev: Tensor,
    x0: Tensor,
    noise: Tensor,
    trunc: float,
    c: float,
    lam_bi: float,
    reduction: str,
) -> Losses:
    """The same from the states x_t, x_t' and x_t''; no kernel computes it so."""
    truncated = per_sample(_truncated(t_post, trunc), v)
    v, v_teacher, v_post, v_prev, x0, noise = _constants(v, v_teacher, v_post, v_prev, x0, noise)
    t, t_post, t_prev = (per_sample(time.detach().to(v.dtype), v) for time in (t, t_post, t_prev))
    x_t = (1 - t) * x0 + t * noise
    x_post = x_t - (t - t_post) * v_teacher
    x_prev = x_t + (t_prev - t) * v_teacher
    endpoint = x_t - t * v
    d_con = endpoint - torch.where(truncated, x0, x_post - t_post * v_post)
    d_bi = endpoint - (x_prev - t_prev * v_prev)
    return _total(d_con, d_bi, c, lam_bi, reduction)


def self_reflow(v_r: Tensor, v_1: Tensor, t: Tensor, reduction: str) -> Tensor:
    """The gradient is to v_r."""
    v_r, v_1 = _constants(v_r, v_1)
    t = per_sample(t.detach().to(v_r.dtype), v_r)
    return reduce(flat((t * (v_r - v_1)).square()).sum(1), None, v_r, reduction)


def self_reflow_literal(
    v_r: Tensor, v_1: Tensor, t: Tensor, noise: Tensor, reduction: str
) -> Tensor:
    """The same from the state x_r = (1 - t)·x̂ + t·noise of the one-step output x̂ = noise - v_1."""
    v_r, v_1, noise = _constants(v_r, v_1, noise)
    t = per_sample(t.detach().to(v_r.dtype), v_r)
    corrected = noise - v_1
    x_r = (1 - t) * corrected + t * noise
    return reduce(flat((x_r - t * v_r - corrected).square()).sum(1), None, v_r, reduction)


def pseudo_huber(x: Tensor, y: Tensor, c: float, reduction: str) -> Tensor:
    dtype = compute_dtype(x, y)
    return reduce(flat(rho(x.to(dtype) - y.to(dtype), c)).sum(1), None, x, reduction)


def _truncated(t_post: Tensor, trunc: float) -> Tensor:
    """t' < trunc, strictly; a tensor filled with trunc is not below it, whatever its dtype."""
    return t_post.detach().to(torch.promote_types(t_post.dtype, torch.float32)) < trunc


def _constants(v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All operands in the dtype of the arithmetic; those after the first get no gradient."""
    dtype = compute_dtype(v, *others)
    return v.to(dtype), *(other.detach().to(dtype) for other in others)


def _total(d_con: Tensor, d_bi: Tensor, c: float, lam_bi: float, reduction: str) -> Losses:
    consistency, bidirectional = (
        reduce(flat(rho(d, c)).sum(1), None, d, reduction) for d in (d_con, d_bi)
    )
    total = consistency + lam_bi * bidirectional
    return total, consistency.detach(), bidirectional.detach()
