"""Schemas and fakes of the teacher's step, whole and into memory that is there."""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops.bellman.reference import state_dtype

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.bellman.kernels:"
_STEP = "Tensor x, Tensor v, Tensor? v_uncond, Tensor? previous, float dt, float guidance"


def _forward_fake(x, v, v_uncond, previous, dt, guidance):  # type: ignore[no-untyped-def]
    x_next = x.new_empty(x.shape, dtype=state_dtype(x, v, v_uncond))
    velocity = x.new_empty(x.shape, dtype=torch.float32)
    size = (0,) if previous is None else x.shape
    return x_next, velocity, x.new_empty(size, dtype=torch.float32)


def _out_fake(  # type: ignore[no-untyped-def]
    x, v, v_uncond, previous, dt, guidance, x_next, velocity, increment
):
    return None


# (x_next, velocity, increment); increment is [0] where there is no `previous`.
bellman_step_forward = define(
    "bellman_step_forward",
    f"({_STEP}) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    triton=_KERNELS + "bellman_step_forward",
)
# `x_next` may be x and `velocity` may be `previous`: each element is read before it is written, by
# the thread that writes it.
bellman_step_out = define(
    "bellman_step_out",
    f"({_STEP}, Tensor(a!) x_next, Tensor(b!) velocity, Tensor(c!)? increment) -> ()",
    _out_fake,
    triton=_KERNELS + "bellman_step_out",
)
