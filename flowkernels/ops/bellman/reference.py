"""A teacher's step in plain PyTorch: the specification of the kernels.

velocity = v_uncond + guidance·(v - v_uncond)    (v itself where there is no v_uncond)
x_next = x + dt·velocity
increment = velocity - previous
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def state_dtype(x: Tensor, v: Tensor, v_uncond: Tensor | None) -> torch.dtype:
    """Of the next state: what the operands promote to."""
    dtype = torch.promote_types(x.dtype, v.dtype)
    return dtype if v_uncond is None else torch.promote_types(dtype, v_uncond.dtype)


def velocity_dtype(v: Tensor, v_uncond: Tensor | None) -> torch.dtype:
    """Of velocity and increment: never below float32, or short spans drown in rounding."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return dtype if v_uncond is None else torch.promote_types(dtype, v_uncond.dtype)


def bellman_step(
    x: Tensor,
    v: Tensor,
    dt: float,
    previous: Tensor | None,
    v_uncond: Tensor | None,
    guidance: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    velocity = v.to(velocity_dtype(v, v_uncond))
    if v_uncond is not None:
        uncond = v_uncond.to(velocity.dtype)
        velocity = uncond + guidance * (velocity - uncond)
    state = state_dtype(x, v, v_uncond)
    x_next = x.to(torch.promote_types(state, torch.float32)) + dt * velocity
    increment = None if previous is None else velocity - previous.to(velocity.dtype)
    return x_next.to(state), velocity, increment
