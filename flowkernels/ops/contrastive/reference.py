"""Contrastive flow matching in plain PyTorch: the specification of the kernels.

    ℓ_b = mean ((v - u)² - lam·(v - ũ)²),  u = noise - x0,  ũ_b = u of sample negatives_b

An index outside [0, B) makes ũ NaN: nothing outside the tensors is read, and the host need not look
at the indices. Arithmetic and result are at least float32, and float64 where an operand is.
"""

from __future__ import annotations

import torch

from flowkernels.ops._losses import compute_dtype, flat, reduce
from flowkernels.ops._samples import per_sample

Tensor = torch.Tensor


def contrastive_flow_matching(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    negatives: Tensor,
    weight: Tensor | None,
    lam: float,
    reduction: str,
) -> Tensor:
    dtype = compute_dtype(v, x0, noise, weight)
    u = noise.to(dtype) - x0.to(dtype)
    last = v.shape[0] - 1
    inside = (negatives >= 0) & (negatives <= last)
    other = torch.where(per_sample(inside, v), u[negatives.clamp(0, last)], float("nan"))
    velocity = v.to(dtype)
    terms = (velocity - u).square() - lam * (velocity - other).square()
    return reduce(flat(terms).sum(1), weight, v, reduction)
