"""Steps of ODE solvers in plain PyTorch: the specification of the kernels.

    euler_step   x + dt·v,  v = v_uncond + guidance·(v - v_uncond) where v_uncond is given
    rk_combine   y + dt·Σ_i weights_i·ks_i
    rk_error     error = dt·Σ_i weights_i·ks_i
                 norm  = √mean((|error| / (atol + rtol·max(|y0|, |y1|)))²)

A stage whose weight is the number 0 is not read. Arithmetic is float32, or that of the operands
where they are float64 or complex; results are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
