"""Triton kernels of the noising process, and of the counter-based normals behind it.

x_t = (1 - t)·x0 + t·noise: reads x0 (and noise), writes x_t (and seeded noise, if asked for), each
once. Backward reads the gradient of x_t once and writes (1 - t)·g and t·g.

The polynomials of ln, cos and sin are Chebyshev fits made for these arguments (their derivation
is at their C++ twins in csrc/cpu/philox.h). They are written with fma, so that every path through
them rounds alike whatever the compiler contracts: the noise is bitwise the same for any tile.
"""

from __future__ import annotations

import torch
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


@triton.jit
def _philox(group, seed, offset):
    """Words of philox4x32-10 at counter (group lo, hi, offset lo, hi) under key (seed lo, hi)."""
    offset = offset + group * 0
    return tl.philox(
        seed,
        group.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
    )


@triton.jit
def _seed(pointer, value):
    """A seed, from the device where it is a tensor."""
    if pointer is not None:
        return tl.load(pointer)
    else:
        return tl.full((), 0, tl.int64) + value


@triton.jit
def _log_of_uniform(u):
    """ln u for u in (0, 1]: u = 2^e m with m in [√½, √2)."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.07149753719568253, -0.115712009370327)
    p = tl.fma(p, f, 0.11661510914564133)
    p = tl.fma(p, f, -0.12411050498485565)
    p = tl.fma(p, f, 0.14249937236309052)
    p = tl.fma(p, f, -0.1666848063468933)
    p = tl.fma(p, f, 0.20000708103179932)
    p = tl.fma(p, f, -0.24999989569187164)
    p = tl.fma(p, f, 0.3333333134651184)
    p = tl.fma(p, f, -0.5)
    return tl.fma(exponent.to(tl.float32), 0.6931471805599453, tl.fma(f * f, p, f))


@triton.jit
def _cos_sin_of_turn(u):
    """cos 2πu and sin 2πu for u in [0, 1), reduced exactly to f = u - q/4, |f| <= 1/8."""
    quadrant = tl.fma(u, 4.0, 0.5).to(tl.int32)
    f = tl.fma(quadrant.to(tl.float32), -0.25, u)
    z = f * f
    s = tl.fma(z, -75.40184020996094, 81.59254455566406)
    s = f * tl.fma(z, tl.fma(z, s, -41.3416633605957), 6.2831854820251465)
    c = tl.fma(z, 59.424224853515625, -85.44882202148438)
    c = tl.fma(z, tl.fma(z, tl.fma(z, c, 64.93936920166016), -19.739208221435547), 1.0)
    odd = (quadrant & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return cosine, tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def _box_muller(first, second):
    """Two normals of two words."""
    u1 = ((first >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    u2 = (second >> 8).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt_rn(-2.0 * _log_of_uniform(u1))
    cosine, sine = _cos_sin_of_turn(u2)
    return radius * cosine, radius * sine


@triton.jit
def _normals(rows, columns, chunk, elements, seed, offset, ALIGNED: tl.constexpr):
    """Normals of the contiguous order at (rows, columns).

    Where samples hold whole groups of four (ALIGNED) a tile does too, and each group is computed
    once; elsewhere each element computes its group and takes its own of it.
    """
    if ALIGNED:
        QUARTER: tl.constexpr = columns.shape[1] // 4
        first = (rows * elements) // 4 + chunk.to(tl.int64) * QUARTER
        group = first + tl.arange(0, QUARTER)[None, :]
        w0, w1, w2, w3 = _philox(group, seed, offset)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        flat = rows * elements + columns
        w0, w1, w2, w3 = _philox(flat >> 2, seed, offset)
        low = (flat & 2) == 0
        z0, z1 = _box_muller(tl.where(low, w0, w2), tl.where(low, w1, w3))
        return tl.where((flat & 1) == 0, z0, z1)


@triton.jit(do_not_specialize=["batch", "chunks"])
def _interpolate_kernel(
    x0, noise, x_t, t, batch, elements, chunks, x0_stride, noise_stride, t_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    time = load_samples(t, t_stride, rows, batch, 0.0)
    data = load_tile(x0, x0_stride, rows, columns, mask)
    noise = load_tile(noise, noise_stride, rows, columns, mask)
    store_tile(x_t, elements, rows, columns, mask, (1.0 - time) * data + time * noise)


@triton.jit(do_not_specialize=["batch", "chunks", "seed_value", "offset_value"])
def _interpolate_seeded_kernel(
    x0, noise, x_t, t, seed, seed_value, offset, offset_value,
    batch, elements, chunks, x0_stride, t_stride,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, chunk = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    time = load_samples(t, t_stride, rows, batch, 0.0)
    data = load_tile(x0, x0_stride, rows, columns, mask)
    key, stream = _seed(seed, seed_value), _seed(offset, offset_value)
    normals = _normals(rows, columns, chunk, elements, key, stream, ALIGNED)
    rounded = normals.to(x0.dtype.element_ty)
    if noise is not None:
        tl.store(noise + (rows * elements + columns), rounded, mask=mask)
    values = (1.0 - time) * data + time * rounded.to(tl.float32)
    store_tile(x_t, elements, rows, columns, mask, values)


@triton.jit(do_not_specialize=["batch", "chunks"])
def _interpolate_backward_kernel(
    grad, grad_x0, grad_noise, t, batch, elements, chunks, grad_stride, t_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    time = load_samples(t, t_stride, rows, batch, 0.0)
    g = load_tile(grad, grad_stride, rows, columns, mask)
    if grad_x0 is not None:
        store_tile(grad_x0, elements, rows, columns, mask, (1.0 - time) * g)
    if grad_noise is not None:
        store_tile(grad_noise, elements, rows, columns, mask, time * g)


@triton.jit(do_not_specialize=["count", "seed_value", "offset_value"])
def _philox_kernel(
    groups, words, seed, seed_value, offset, offset_value, count, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    group = tl.load(groups + index, mask=mask, other=0)
    w0, w1, w2, w3 = _philox(group, _seed(seed, seed_value), _seed(offset, offset_value))
    tl.store(words + 4 * index, w0.to(tl.int64), mask=mask)
    tl.store(words + 4 * index + 1, w1.to(tl.int64), mask=mask)
    tl.store(words + 4 * index + 2, w2.to(tl.int64), mask=mask)
    tl.store(words + 4 * index + 3, w3.to(tl.int64), mask=mask)


def interpolate_forward(x0, t, noise):
    x_t = x0.new_empty(x0.shape, dtype=torch.promote_types(x0.dtype, noise.dtype))
    tiles = tiles_of(x0)
    launch(
        _interpolate_kernel,
        (tiles.programs,),
        x0,
        noise,
        x_t,
        t,
        tiles.batch,
        tiles.elements,
        tiles.chunks,
        stride_of(x0),
        stride_of(noise),
        stride_of(t),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=WARPS,
    )
    return x_t


def interpolate_seeded(x0, t, seed, seed_value, offset, offset_value, return_noise):
    x_t = x0.new_empty(x0.shape)
    noise = x0.new_empty(x0.shape if return_noise else (0,))
    tiles = tiles_of(x0)
    launch(
        _interpolate_seeded_kernel,
        (tiles.programs,),
        x0,
        noise if return_noise else None,
        x_t,
        t,
        seed,
        seed_value,
        offset,
        offset_value,
        tiles.batch,
        tiles.elements,
        tiles.chunks,
        stride_of(x0),
        stride_of(t),
        ALIGNED=tiles.elements % 4 == 0,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=WARPS,
    )
    return x_t, noise


def interpolate_backward(grad_x_t, t, wanted):
    grads = [grad_x_t.new_empty(grad_x_t.shape) if wanted >> bit & 1 else None for bit in range(2)]
    tiles = tiles_of(grad_x_t)
    launch(
        _interpolate_backward_kernel,
        (tiles.programs,),
        grad_x_t,
        *grads,
        t,
        tiles.batch,
        tiles.elements,
        tiles.chunks,
        stride_of(grad_x_t),
        stride_of(t),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=WARPS,
    )
    return [grad for grad in grads if grad is not None]


def philox(groups, seed, seed_value, offset, offset_value):
    count = groups.shape[0]
    words = groups.new_empty((count, 4))
    launch(
        _philox_kernel,
        (triton.cdiv(count, 256),),
        groups,
        words,
        seed,
        seed_value,
        offset,
        offset_value,
        count,
        BLOCK=256,
        num_warps=4,
    )
    return words
