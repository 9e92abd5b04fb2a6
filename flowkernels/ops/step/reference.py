"""One Euler step in plain PyTorch: the specification of the kernels.

x + dt·v,  v = v_uncond + guidance·(v - v_uncond) where v_uncond is given
"""

from __future__ import annotations

import torch

from flowkernels.ops._samples import per_sample

Tensor = torch.Tensor


def result_dtype(x: Tensor, v: Tensor, v_uncond: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, v.dtype)
    return dtype if v_uncond is None else torch.promote_types(dtype, v_uncond.dtype)


def euler_step(
    x: Tensor, v: Tensor, dt: float | Tensor, v_uncond: Tensor | None, guidance: float
) -> Tensor:
    dtype = result_dtype(x, v, v_uncond)
    compute = torch.promote_types(dtype, torch.float32)
    velocity = v.to(compute)
    if v_uncond is not None:
        uncond = v_uncond.to(compute)
        velocity = uncond + guidance * (velocity - uncond)
    if isinstance(dt, Tensor):
        dt = per_sample(dt.to(compute), x) if dt.dim() == 1 else dt.to(compute)
    return (x.to(compute) + dt * velocity).to(dtype)
