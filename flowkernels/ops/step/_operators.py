"""Schemas and fakes of the steps: dt is a tensor, 0-d or [B], or else a number."""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops.step.reference import norm_dtype, promoted, result_dtype

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.step.kernels:"
_STEP = "Tensor x, Tensor v, Tensor? v_uncond, Tensor? dt, float dt_value, float guidance"


def _forward_fake(x, v, v_uncond, dt, dt_value, guidance):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=result_dtype(x, v, v_uncond))


def _out_fake(x, v, v_uncond, dt, dt_value, guidance, out, twice):  # type: ignore[no-untyped-def]
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
# `twice`, contiguous [2B, ...] in out's dtype, is written with out after out.
euler_step_out = define(
    "euler_step_out",
    f"({_STEP}, Tensor(a!) out, Tensor(b!)? twice) -> ()",
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

# Stages: one tensor each, or all stacked in the only one. Their weights: numbers, or a tensor [n].
MOST_STAGES = 64
_STAGES = "Tensor[] ks, float[] weights, Tensor? weights_tensor, Tensor? dt, float dt_value"


def _combine_fake(y, ks, weights, weights_tensor, dt, dt_value):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape, dtype=promoted(y, *ks))


def _combine_out_fake(y, ks, weights, weights_tensor, dt, dt_value, out):  # type: ignore[no-untyped-def]
    return None


def _error_fake(  # type: ignore[no-untyped-def]
    ks, weights, weights_tensor, dt, dt_value, y0, y1, rtol, atol, rtol_value, atol_value, write
):
    error = y0.new_empty(y0.shape if write else (0,), dtype=promoted(*ks))
    shape = dt.shape if dt is not None else ()
    return error, y0.new_empty(shape, dtype=norm_dtype(promoted(y0, y1, *ks)))


rk_combine_forward = define(
    "rk_combine_forward", f"(Tensor y, {_STAGES}) -> Tensor", _combine_fake, native_cuda=True
)
# `out` may be y or a stage: each element is read before it is written, by the thread that writes.
rk_combine_out = define(
    "rk_combine_out",
    f"(Tensor y, {_STAGES}, Tensor(a!) out) -> ()",
    _combine_out_fake,
    native_cuda=True,
)
# The error is written where `write_error` says so; else it is an empty tensor.
rk_error = define(
    "rk_error",
    f"({_STAGES}, Tensor y0, Tensor y1, Tensor? rtol, Tensor? atol, float rtol_value,"
    " float atol_value, bool write_error) -> (Tensor error, Tensor norm)",
    _error_fake,
    native_cuda=True,
)


def _control_fake(  # type: ignore[no-untyped-def]
    ks, weights, dt, plan, y0, y1, rtol, atol, nodes, limits, tickets
):
    times = plan.new_empty((len(nodes), *plan.shape[1:]), dtype=norm_dtype(y0.dtype))
    accepted = plan.new_empty(plan.shape[1:], dtype=torch.bool)
    return torch.empty_like(plan), torch.empty_like(plan), accepted, times


def _begin_fake(y0, y1, first, last, accepted, dt, weight):  # type: ignore[no-untyped-def]
    return tuple(y0.new_empty(y0.shape) for _ in range(3))


# What is decided after a step and planned for the next, on the device: reference.rk_control, where
# plans and Limits (here a list of numbers) are explained. dt is the plan's row STEP; tickets, one
# int32 for each column of the plan, are 0 before and after.
rk_control = define(
    "rk_control",
    "(Tensor[] ks, float[] weights, Tensor dt, Tensor plan, Tensor y0, Tensor y1, float rtol,"
    " float atol, float[] nodes, float[] limits, Tensor(a!) tickets)"
    " -> (Tensor record, Tensor plan, Tensor accepted, Tensor times)",
    _control_fake,
    native_cuda=True,
)
rk_begin = define(
    "rk_begin",
    "(Tensor y0, Tensor y1, Tensor first, Tensor last, Tensor accepted, Tensor dt, float weight)"
    " -> (Tensor y, Tensor slope, Tensor at)",
    _begin_fake,
    native_cuda=True,
)
