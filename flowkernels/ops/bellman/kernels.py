"""Triton kernel of a teacher's step: guidance, Euler update and increment in one pass.

Reads x, v, v_uncond and the previous velocity once, writes the next state, the velocity and the
increment once; with float32 operands 7·4 bytes an element under guidance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flowkernels.ops._sample_tiles import (
    WARPS,
    load_tile,
    store_tile,
    stride_of,
    tile_of,
    tiles_of,
)
from flowkernels.ops._triton import launch
from flowkernels.ops.bellman.reference import state_dtype


@triton.jit(do_not_specialize=["batch", "chunks"])
def _bellman_step_kernel(
    x, v, v_uncond, previous, x_next, velocity, increment, dt, guidance, batch, elements, chunks,
    x_stride, v_stride, v_uncond_stride, previous_stride,
    x_next_stride, velocity_stride, increment_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    state = load_tile(x, x_stride, rows, columns, mask)
    now = load_tile(v, v_stride, rows, columns, mask)
    if v_uncond is not None:
        uncond = load_tile(v_uncond, v_uncond_stride, rows, columns, mask)
        now = uncond + guidance * (now - uncond)
    if previous is not None:
        before = load_tile(previous, previous_stride, rows, columns, mask)
        store_tile(increment, increment_stride, rows, columns, mask, now - before)
    store_tile(velocity, velocity_stride, rows, columns, mask, now)
    store_tile(x_next, x_next_stride, rows, columns, mask, state + dt * now)


def bellman_step_out(x, v, v_uncond, previous, dt, guidance, x_next, velocity, increment):
    tiles = tiles_of(x)
    launch(
        _bellman_step_kernel,
        (tiles.programs,),
        x,
        v,
        v_uncond,
        previous,
        x_next,
        velocity,
        increment if previous is not None else None,
        dt,
        guidance,
        tiles.batch,
        tiles.elements,
        tiles.chunks,
        stride_of(x),
        stride_of(v),
        stride_of(v_uncond),
        stride_of(previous),
        stride_of(x_next),
        stride_of(velocity),
        stride_of(increment),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=WARPS,
    )


def bellman_step_forward(x, v, v_uncond, previous, dt, guidance):
    x_next = x.new_empty(x.shape, dtype=state_dtype(x, v, v_uncond))
    velocity = x.new_empty(x.shape, dtype=torch.float32)
    increment = x.new_empty((0,) if previous is None else x.shape, dtype=torch.float32)
    bellman_step_out(x, v, v_uncond, previous, dt, guidance, x_next, velocity, increment)
    return x_next, velocity, increment
