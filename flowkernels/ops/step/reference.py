"""Steps of ODE solvers in plain PyTorch: the specification of the kernels.

    euler_step   x + dt·v,  v = v_uncond + guidance·(v - v_uncond) where v_uncond is given
    rk_combine   y + dt·Σ_i weights_i·ks_i
    rk_error     error = dt·Σ_i weights_i·ks_i
                 norm  = √mean((|error| / (atol + rtol·max(|y0|, |y1|)))²)
    rk_control   rk_error's norm, what is decided from it, and the plan of the next step
    rk_begin     the state and the slope to go on from, and the next step's first stage sum

A stage whose weight is the number 0 is not read. Arithmetic is float32, or that of the operands
where they are float64 or complex; results are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from flowkernels.ops._samples import per_sample

Tensor = torch.Tensor
Stages = Sequence[Tensor] | Tensor  # one tensor a stage, or all of them stacked
Weights = Sequence[float] | Tensor


def result_dtype(x: Tensor, v: Tensor, v_uncond: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, v.dtype)
    return dtype if v_uncond is None else torch.promote_types(dtype, v_uncond.dtype)


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype that all of the tensors promote to."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def euler_step(
    x: Tensor, v: Tensor, dt: float | Tensor, v_uncond: Tensor | None, guidance: float
) -> Tensor:
    dtype = result_dtype(x, v, v_uncond)
    compute = torch.promote_types(dtype, torch.float32)
    velocity = v.to(compute)
    if v_uncond is not None:
        uncond = v_uncond.to(compute)
        velocity = uncond + guidance * (velocity - uncond)
    return (x.to(compute) + step_of(dt, x, compute) * velocity).to(dtype)


def rk_combine(y: Tensor, ks: Stages, weights: Weights, dt: float | Tensor) -> Tensor:
    stages = stages_of(ks)
    dtype = promoted(y, *stages)
    compute = torch.promote_types(dtype, torch.float32)
    total = weighted_sum(stages, weights, compute)
    return (y.to(compute) + step_of(dt, y, compute) * total).to(dtype)


def rk_error(
    ks: Stages,
    weights: Weights,
    dt: float | Tensor,
    y0: Tensor,
    y1: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> tuple[Tensor, Tensor]:
    stages = stages_of(ks)
    compute = torch.promote_types(promoted(y0, y1, *stages), torch.float32)
    error = step_of(dt, y0, compute) * weighted_sum(stages, weights, compute)
    largest = torch.maximum(y0.to(compute).abs(), y1.to(compute).abs())
    square = (error.abs() / (atol + rtol * largest)).square()
    if isinstance(dt, Tensor) and dt.dim() == 1:
        mean = square.flatten(1).mean(1) if square.dim() > 1 else square
    else:
        mean = square.mean()
    return error.to(promoted(*stages)), mean.sqrt().to(norm_dtype(compute))


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of arithmetic in ``dtype``: float64 for float64 and complex128, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def stages_of(ks: Stages) -> Sequence[Tensor]:
    return ks.unbind(0) if isinstance(ks, Tensor) else ks


def step_of(dt: float | Tensor, like: Tensor, compute: torch.dtype) -> float | Tensor:
    """dt as a factor of tensors like ``like``, [B, ...]: a vector [B] is one number a sample."""
    if not isinstance(dt, Tensor):
        return dt
    dt = dt.to(norm_dtype(compute))
    return per_sample(dt, like) if dt.dim() == 1 else dt


def weighted_sum(stages: Sequence[Tensor], weights: Weights, compute: torch.dtype) -> Tensor:
    """Σ_i weights_i·stages_i, in the order of the stages, those of weight 0 left out."""
    numbers: Sequence[Any] = (
        weights.to(norm_dtype(compute)).unbind(0) if isinstance(weights, Tensor) else weights
    )
    total = None
    for k, weight in zip(stages, numbers, strict=True):
        if isinstance(weight, Tensor) or weight != 0:
            term = weight * k.to(compute)
            total = term if total is None else total + term
    return torch.zeros_like(stages[0], dtype=compute) if total is None else total


# Adaptive steps that the device controls ---------------------------------------------------------

# Rows of a plan [6] or [6, B], in float64: ascending time, the caller's signed dt (0 where a sample
# stands still), the size that it would have had, flags. A step's record is its plan with the
# ratio of its error to the tolerance, and ACCEPTED.
START, END, STEP, SIZE, RATIO, FLAGS = range(6)
ACCEPTED, MOVING, STUCK = 1, 2, 4  # STUCK: t + dt is t


class Limits(NamedTuple):
    """What bounds the steps of a solve: its method's order, its options, its end and direction."""

    order: float
    safety: float
    ifactor: float
    dfactor: float
    min_step: float
    max_step: float
    end: float
    sign: float


def next_sizes(dt: Tensor, ratio: Tensor, limits: Limits) -> Tensor:
    """``dt·clip(safety·ratio^(-1/order), least, ifactor)``, least = 1 after a ratio below 1."""
    ratio = ratio.to(dt.dtype)
    least = torch.where(ratio < 1.0, torch.ones_like(ratio), limits.dfactor)  # in its dtype
    factor = torch.maximum(limits.safety / ratio ** (1.0 / limits.order), least)
    factor = torch.where(ratio == 0.0, limits.ifactor, factor.clamp(max=limits.ifactor))
    return (dt * factor).clamp(limits.min_step, limits.max_step)


def plan_step(
    t: Tensor, size: Tensor, nodes: Sequence[float], limits: Limits, time_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(plan, the caller's times of the stages after the first, one row a stage).

    The stages at a step's end look just before it: the slope may jump there.
    """
    size = torch.where(torch.isfinite(size), size, limits.min_step)
    size = size.clamp(limits.min_step, limits.max_step)
    moving = t < limits.end
    stuck = moving & ~(t + size > t)
    dt = torch.where(moving, size, 0.0)
    end = t + dt
    flags = float(MOVING) * moving + float(STUCK) * stuck
    plan = torch.stack([t, end, limits.sign * dt, size, torch.zeros_like(t), flags])
    last = end.to(time_dtype)
    before = torch.nextafter(last, last.new_tensor(-math.inf))
    times = [before if c == 1.0 else (t + c * dt).to(time_dtype) for c in nodes]
    return plan, limits.sign * torch.stack(times)


def rk_control(
    ks: Sequence[Tensor],
    weights: Sequence[float],
    plan: Tensor,
    y0: Tensor,
    y1: Tensor,
    rtol: float,
    atol: float,
    nodes: Sequence[float],
    limits: Limits,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(record of the step, plan of the next, accepted, its stages' times)."""
    t, end, step, size, _, flags = plan.unbind(0)
    dt = limits.sign * step
    _, norm = rk_error(ks, weights, dt, y0, y1, rtol, atol)
    ratio = norm.to(plan.dtype)
    moved = flags % 4 >= MOVING
    accepted = moved & ((ratio <= 1.0) | (dt <= limits.min_step))
    record = torch.stack([t, end, step, size, ratio, flags + float(ACCEPTED) * accepted])
    t = torch.where(accepted, end, t)
    size = torch.where(moved, next_sizes(dt, ratio, limits), size)
    time_dtype = norm_dtype(y0.dtype)
    following, times = plan_step(t, size, nodes, limits, time_dtype)
    return record, following, accepted, times


def rk_begin(
    y0: Tensor,
    y1: Tensor,
    first: Tensor,
    last: Tensor,
    accepted: Tensor,
    dt: Tensor,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, slope) = (y1, last) where accepted, else (y0, first); and y + dt·weight·slope."""
    took = per_sample(accepted, y0) if accepted.dim() else accepted
    y, slope = torch.where(took, y1, y0), torch.where(took, last, first)
    return y, slope, rk_combine(y, [slope], [weight], dt)
