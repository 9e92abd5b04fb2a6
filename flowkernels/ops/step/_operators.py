"""Schemas and fakes of the Euler step: dt is a tensor, 0-d or [B], or else a number."""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops.step.reference import result_dtype

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.step.kernels:"
_STEP = "Tensor x, Tensor v, Tensor? v_uncond, Tensor? dt, float dt_value, float guidance"


def _forward_fake(x, v, v_uncond, dt, dt_value, guidance):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=result_dtype(x, v, v_uncond))


def _out_fake(x, v, v_uncond, dt, dt_value, guidance, out):  # type: ignore[no-untyped-def]
    return None


def _backward_fake(grad, dt, dt_value, guidance, wanted):  # type: ignore[no-untyped-def]
    return [grad.new_empty(grad.shape) for bit in range(2) if wanted >> bit & 1]


euler_step_forward = define(
    "euler_step_forward",
    f"({_STEP}) -> Tensor",
    _forward_fake,
    triton=_KERNELS + "euler_step_forward",
)
# `out` may be x itself: each element is read before it is written, by the thread that writes it.
euler_step_out = define(
    "euler_step_out",
    f"({_STEP}, Tensor(a!) out) -> ()",
    _out_fake,
    triton=_KERNELS + "euler_step_out",
)
# Gradients to v and v_uncond (the bits of `wanted`), in the dtype of grad; x's is grad itself.
# `guidance` is 1 where there is no v_uncond.
euler_step_backward = define(
    "euler_step_backward",
    "(Tensor grad, Tensor? dt, float dt_value, float guidance, int wanted) -> Tensor[]",
    _backward_fake,
    triton=_KERNELS + "euler_step_backward",
)
