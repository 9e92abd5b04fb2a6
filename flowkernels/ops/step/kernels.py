"""Triton kernels of the Euler step: x + dt·v with guidance, each operand read once."""

from __future__ import annotations

import triton
import triton.language as tl

from flowkernels.ops._sample_tiles import (
    WARPS,
    load_samples,
    load_tile,
    store_tile,
    stride_of,
    tile_of,
    tiles_of,
)
from flowkernels.ops._triton import launch
from flowkernels.ops.step.reference import result_dtype


@triton.jit(do_not_specialize=["batch", "chunks"])
def _euler_step_kernel(
    x, v, v_uncond, out, twice, dt, dt_value, guidance, batch, elements, chunks,
    x_stride, v_stride, v_uncond_stride, out_stride, dt_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    step = load_samples(dt, dt_stride, rows, batch, dt_value)
    state = load_tile(x, x_stride, rows, columns, mask)
    velocity = load_tile(v, v_stride, rows, columns, mask)
    if v_uncond is not None:
        uncond = load_tile(v_uncond, v_uncond_stride, rows, columns, mask)
        velocity = uncond + guidance * (velocity - uncond)
    result = state + step * velocity
    store_tile(out, out_stride, rows, columns, mask, result)
    if twice is not None:
        store_tile(twice, elements, rows, columns, mask, result)
        store_tile(twice, elements, rows + batch, columns, mask, result)


@triton.jit(do_not_specialize=["batch", "chunks"])
def _euler_step_backward_kernel(
    grad, grad_v, grad_v_uncond, dt, dt_value, guidance, batch, elements, chunks,
    grad_stride, dt_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    step = load_samples(dt, dt_stride, rows, batch, dt_value)
    g = step * load_tile(grad, grad_stride, rows, columns, mask)
    if grad_v is not None:
        store_tile(grad_v, elements, rows, columns, mask, guidance * g)
    if grad_v_uncond is not None:
        store_tile(grad_v_uncond, elements, rows, columns, mask, (1.0 - guidance) * g)


def euler_step_out(x, v, v_uncond, dt, dt_value, guidance, out, twice):
    tiles = tiles_of(x)
    launch(
        _euler_step_kernel,
        (tiles.programs,),
        x,
        v,
        v_uncond,
        out,
        twice,
        dt,
        dt_value,
        guidance,
        tiles.batch,
        tiles.elements,
        tiles.chunks,
        stride_of(x),
        stride_of(v),
        stride_of(v_uncond),
        stride_of(out),
        stride_of(dt),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=WARPS,
    )


def euler_step_forward(x, v, v_uncond, dt, dt_value, guidance):
    out = x.new_empty(x.shape, dtype=result_dtype(x, v, v_uncond))
    euler_step_out(x, v, v_uncond, dt, dt_value, guidance, out, None)
    return out


def euler_step_backward(grad, dt, dt_value, guidance, wanted):
    grads = [grad.new_empty(grad.shape) if wanted >> bit & 1 else None for bit in range(2)]
    tiles = tiles_of(grad)
    launch(
        _euler_step_backward_kernel,
        (tiles.programs,),
        grad,
        *grads,
        dt,
        dt_value,
        guidance,
        tiles.batch,
        tiles.elements,
        tiles.chunks,
        stride_of(grad),
        stride_of(dt),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=WARPS,
    )
    return [each for each in grads if each is not None]
