"""The losses in plain PyTorch: the specification of the kernels.

    flow_matching: ℓ_b = mean (v - (noise - x0))²
    straightening: ℓ_b = mean (v - (x_end - x_start)/dt)²
    fgm:           ℓ_b = ω_b·mean (2·d·e + lam·d²),  d = u - v,  e = v - w,  w = noise - x0
                   u = u_uncond + guidance·(u - u_uncond) where u_uncond is given
                   ω_b = t / (2·max(mean|u - w|, 1e-5)) under normalize="sid", a constant; else 1

Means are over a sample's elements. reduction "none" gives weight_b·ℓ_b, "mean" their sum over B
(never over the sum of the weights), "sum" the sum over samples and elements.
Arithmetic and result are at least float32, and float64 where an operand is.
"""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops._losses import compute_dtype, flat, reduce
from flowkernels.ops._samples import per_sample

Tensor = torch.Tensor

SID_FLOOR = 1e-5


def flow_matching(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    dt: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """straightening where there is a dt: x0 and noise are x_start and x_end then."""
    dtype = compute_dtype(v, x0, noise, weight)
    velocity = noise.to(dtype) - x0.to(dtype)
    if dt is not None:
        velocity = velocity / per_sample(dt.to(dtype), v)
    residual = v.to(dtype) - velocity
    return reduce(flat(residual.square()).sum(1), weight, v, reduction)


def fgm(
    u: Tensor,
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    weight: Tensor | None,
    u_uncond: Tensor | None,
    lam: float,
    guidance: float,
    sid: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and how many samples were left out of it because they were not finite."""
    dtype = compute_dtype(u, v, x0, noise, u_uncond, weight)
    operands: list[Any] = [
        None if x is None else x.to(dtype) for x in (u, v, x0, noise, t, weight, u_uncond)
    ]
    with torch.no_grad():
        sums, omega = _fgm_sums(*operands, lam=lam, guidance=guidance, sid=sid)
        finite = torch.isfinite(reduce(sums, omega, u, "none")) & torch.isfinite(t)
    # Selected before the formula, not after it: the gradient of a selection is zero times the
    # gradient of the formula, which is NaN where that is not finite.
    safe: list[Any] = [
        None if x is None else torch.where(per_sample(finite, x), x, 0) for x in operands
    ]
    sums, omega = _fgm_sums(*safe, lam=lam, guidance=guidance, sid=sid)
    return reduce(sums, omega, u, reduction), (~finite).sum(dtype=torch.int32)


def _fgm_sums(
    u: Tensor,
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    weight: Tensor | None,
    u_uncond: Tensor | None,
    *,
    lam: float,
    guidance: float,
    sid: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums of 2·d·e + lam·d² over each sample, and ω, None for 1."""
    if u_uncond is not None:
        u = u_uncond + guidance * (u - u_uncond)
    w = noise - x0
    d, e = u - v, v - w
    sums = flat(2 * d * e + lam * d.square()).sum(1)
    if sid:
        size = flat((u - w).detach().abs()).mean(1)
        normaliser = t.detach() / (2 * size.clamp_min(SID_FLOOR))
        weight = normaliser if weight is None else weight * normaliser
    return sums, weight
