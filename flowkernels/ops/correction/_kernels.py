# mypy: ignore-errors
"""Triton kernels of the correction's losses.

self_corrected: reads v, v_teacher, v_prev once, and of a sample either x0 and noise or v_post, and
writes the gradient once. self_reflow and pseudo_huber: read x, y once and write the gradients once.
What follows reads partial sums alone.

Gradients, with scale the reduction's factor of a sample's sum and g the incoming gradient:
    self_corrected:   ∂v = -t·scale·g·(d_con/√(d_con² + c²) + lam_bi·d_bi/√(d_bi² + c²)),
                      since v has the factor -t in both differences, in either case of d_con
    self_reflow:      ∂x = 2·t²·scale·g·(x - y)
    pseudo_huber:     ∂x = scale·g·(x - y)/√((x - y)² + c²),  ∂y = -∂x
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowkernels.ops._loss_kernels import store_partial, sum_of
from flowkernels.ops._sample_tiles import load_samples, load_tile, store_tile, tile_of


@triton.jit
def _pseudo_huber(d, c):
    """ρ(d) = d²/(√(d² + c²) + c) and its slope d/√(d² + c²), of one division."""
    squares = d * d
    root = tl.sqrt_rn(squares + c * c)
    total = root + c
    inverse = 1.0 / (root * total)
    return squares * (root * inverse), d * (total * inverse)


@triton.jit
def _differences(
    v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc,
    v_stride, teacher_stride, post_stride, prev_stride, x0_stride, noise_stride,
    t_stride, t_post_stride, t_prev_stride, rows, columns, mask, batch,
):  # fmt: skip
    """d_con, d_bi and t; of x0, noise and v_post a sample reads what it needs."""
    time = load_samples(t, t_stride, rows, batch, 0.0)
    time_post = load_samples(t_post, t_post_stride, rows, batch, 0.0)
    time_prev = load_samples(t_prev, t_prev_stride, rows, batch, 0.0)
    truncated = time_post < trunc
    here = load_tile(v, v_stride, rows, columns, mask)
    to_teacher = load_tile(v_teacher, teacher_stride, rows, columns, mask) - here
    post = load_tile(v_post, post_stride, rows, columns, mask & (time_post >= trunc))
    a = load_tile(noise, noise_stride, rows, columns, mask & truncated)
    b = load_tile(x0, x0_stride, rows, columns, mask & truncated)
    # Near a straight path the difference is no larger than the rounding of noise - x0, so that is
    # added back: for s = fl(a - b), a - b - s is exact as below (Knuth, TAOCP 2, 4.2.2).
    s = a - b
    back = s - a
    lost = (a - (s - back)) - (b + back)
    d_con = tl.where(
        truncated,
        time * ((s - here) + lost),
        time_post * (post - here) + (time - time_post) * to_teacher,
    )
    prev = load_tile(v_prev, prev_stride, rows, columns, mask)
    d_bi = time_prev * (prev - here) - (time_prev - time) * to_teacher
    return d_con, d_bi, time


@triton.jit(do_not_specialize=["batch", "chunks"])
def self_corrected_forward_kernel(
    v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, grad_v, consistency, bidirectional,
    trunc, c, lam_bi, scale, batch, elements, chunks,
    v_stride, teacher_stride, post_stride, prev_stride, x0_stride, noise_stride,
    t_stride, t_post_stride, t_prev_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, chunk = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    d_con, d_bi, time = _differences(
        v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc,
        v_stride, teacher_stride, post_stride, prev_stride, x0_stride, noise_stride,
        t_stride, t_post_stride, t_prev_stride, rows, columns, mask, batch,
    )  # fmt: skip
    value_con, slope_con = _pseudo_huber(d_con, c)
    value_bi, slope_bi = _pseudo_huber(d_bi, c)
    total = scale * tl.sum(value_con, axis=1, keep_dims=True)
    store_partial(consistency, rows, chunk, chunks, batch, total)
    total = scale * tl.sum(value_bi, axis=1, keep_dims=True)
    store_partial(bidirectional, rows, chunk, chunks, batch, total)
    if grad_v is not None:
        gradient = -time * scale * (slope_con + lam_bi * slope_bi)
        store_tile(grad_v, elements, rows, columns, mask, gradient)


@triton.jit(do_not_specialize=["batch", "chunks"])
def self_corrected_backward_kernel(
    grad_output, v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, grad_v,
    trunc, c, lam_bi, scale, batch, elements, chunks,
    grad_output_stride, v_stride, teacher_stride, post_stride, prev_stride, x0_stride,
    noise_stride, t_stride, t_post_stride, t_prev_stride,
    RESCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RESCALE: the gradient is that of grad_output = 1; where it is 1 no memory is touched."""
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    g = load_samples(grad_output, grad_output_stride, rows, batch, 1.0)
    if RESCALE:
        mask &= g != 1.0
    d_con, d_bi, time = _differences(
        v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc,
        v_stride, teacher_stride, post_stride, prev_stride, x0_stride, noise_stride,
        t_stride, t_post_stride, t_prev_stride, rows, columns, mask, batch,
    )  # fmt: skip
    _, slope_con = _pseudo_huber(d_con, c)
    _, slope_bi = _pseudo_huber(d_bi, c)
    gradient = -time * scale * g * (slope_con + lam_bi * slope_bi)
    store_tile(grad_v, elements, rows, columns, mask, gradient)


@triton.jit(do_not_specialize=["count"])
def self_corrected_sum_kernel(
    consistency_partial, bidirectional_partial, total, consistency, bidirectional,
    lam_bi, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """The three losses [program] from partial sums [program, count]."""
    program = tl.program_id(0).to(tl.int64)
    con = sum_of(consistency_partial + program * count, count, BLOCK)
    bi = sum_of(bidirectional_partial + program * count, count, BLOCK)
    tl.store(consistency + program, con)
    tl.store(bidirectional + program, bi)
    tl.store(total + program, con + lam_bi * bi)


@triton.jit
def _pair(x, y, t, c, x_stride, y_stride, t_stride, rows, columns, mask, batch):
    """Values and slopes of the difference x - y, and the factor of both, [ROWS, 1]."""
    d = load_tile(x, x_stride, rows, columns, mask) - load_tile(y, y_stride, rows, columns, mask)
    if t is not None:
        value, slope = d * d, 2.0 * d
    else:
        value, slope = _pseudo_huber(d, c)
    time = load_samples(t, t_stride, rows, batch, 1.0)
    return value, slope, time * time


@triton.jit
def _store_pair(grad_x, grad_y, elements, rows, columns, mask, gradient):
    if grad_x is not None:
        store_tile(grad_x, elements, rows, columns, mask, gradient)
    if grad_y is not None:
        store_tile(grad_y, elements, rows, columns, mask, -gradient)


@triton.jit(do_not_specialize=["batch", "chunks"])
def pair_loss_forward_kernel(
    x, y, t, grad_x, grad_y, partial, c, scale, batch, elements, chunks,
    x_stride, y_stride, t_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, chunk = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    value, slope, weight = _pair(
        x, y, t, c, x_stride, y_stride, t_stride, rows, columns, mask, batch
    )
    factor = scale * weight
    total = factor * tl.sum(value, axis=1, keep_dims=True)
    store_partial(partial, rows, chunk, chunks, batch, total)
    _store_pair(grad_x, grad_y, elements, rows, columns, mask, factor * slope)


@triton.jit(do_not_specialize=["batch", "chunks"])
def pair_loss_backward_kernel(
    grad_output, x, y, t, grad_x, grad_y, c, scale, batch, elements, chunks,
    grad_output_stride, x_stride, y_stride, t_stride,
    RESCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RESCALE: as in self_corrected."""
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    g = load_samples(grad_output, grad_output_stride, rows, batch, 1.0)
    if RESCALE:
        mask &= g != 1.0
    _, slope, weight = _pair(x, y, t, c, x_stride, y_stride, t_stride, rows, columns, mask, batch)
    _store_pair(grad_x, grad_y, elements, rows, columns, mask, scale * weight * g * slope)
