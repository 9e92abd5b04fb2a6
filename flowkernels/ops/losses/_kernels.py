# mypy: ignore-errors
"""Triton kernels of the losses.

flow_matching and straightening: read v, x0, noise once and write the gradients once. fgm: reads
u, v, x0, noise (and u_uncond) once, a second time u, x0, noise under the SiD normaliser where a
sample is more than a tile, and writes the gradients once. What follows reads partial sums alone.

Gradients, with scale the reduction's factor of a sample's sum and g the incoming gradient:
    flow_matching, r = v - (noise - x0), c = 2·scale·weight·g:   ∂v = ∂x0 = c·r,  ∂noise = -c·r
    straightening, r = v - (x_end - x_start)/dt, which stand where noise and x0 do:
                            ∂v = c·r,  ∂x_start = c·r/dt,  ∂x_end = -c·r/dt
    fgm, c = 2·scale·ω·g:   ∂u = c·(λ·d + e), times guidance and (1 - guidance) for u and u_uncond
                            ∂v = c·((1 - λ)·d - e),  ∂x0 = c·d,  ∂noise = -c·d
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowkernels.ops._loss_kernels import store_partial
from flowkernels.ops._sample_tiles import load_samples, load_tile, store_tile, tile_of


@triton.jit
def _sum_of_chunks(partial, rows, batch, chunks, BLOCK: tl.constexpr):
    """Sums of partial [batch, chunks] over chunks, [ROWS, 1], in a fixed order."""
    total = tl.zeros((rows.shape[0], BLOCK), tl.float32)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)[None, :]
        mask = (rows < batch) & (chunk < chunks)
        total += tl.load(partial + rows * chunks + chunk, mask=mask, other=0.0)
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def _inverse(dt, dt_stride, rows, batch):
    """1/dt of each sample, [ROWS, 1]; 1 where there is no dt, and in the tile's empty rows."""
    return 1.0 / tl.where(rows < batch, load_samples(dt, dt_stride, rows, batch, 1.0), 1.0)


@triton.jit
def _residual(v, x0, noise, inverse, v_stride, x0_stride, noise_stride, rows, columns, mask):
    """v - (noise - x0)/dt."""
    w = load_tile(noise, noise_stride, rows, columns, mask)
    w -= load_tile(x0, x0_stride, rows, columns, mask)
    return load_tile(v, v_stride, rows, columns, mask) - w * inverse


@triton.jit
def _store_residual(grad_v, grad_x0, grad_noise, inverse, elements, rows, columns, mask, gradient):
    if grad_v is not None:
        store_tile(grad_v, elements, rows, columns, mask, gradient)
    gradient *= inverse
    if grad_x0 is not None:
        store_tile(grad_x0, elements, rows, columns, mask, gradient)
    if grad_noise is not None:
        store_tile(grad_noise, elements, rows, columns, mask, -gradient)


@triton.jit(do_not_specialize=["batch", "chunks"])
def flow_matching_forward_kernel(
    v, x0, noise, grad_v, grad_x0, grad_noise, dt, weight, partial,
    scale, batch, elements, chunks, v_stride, x0_stride, noise_stride, dt_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, chunk = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    inverse = _inverse(dt, dt_stride, rows, batch)
    r = _residual(v, x0, noise, inverse, v_stride, x0_stride, noise_stride, rows, columns, mask)
    factor = scale * load_samples(weight, weight_stride, rows, batch, 1.0)
    total = tl.sum(r * r, axis=1, keep_dims=True)
    store_partial(partial, rows, chunk, chunks, batch, factor * total)
    gradient = 2.0 * factor * r
    _store_residual(grad_v, grad_x0, grad_noise, inverse, elements, rows, columns, mask, gradient)


@triton.jit(do_not_specialize=["batch", "chunks"])
def flow_matching_backward_kernel(
    grad_output, v, x0, noise, grad_v, grad_x0, grad_noise, dt, weight,
    scale, batch, elements, chunks,
    grad_output_stride, v_stride, x0_stride, noise_stride, dt_stride, weight_stride,
    RESCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RESCALE: the gradients are those of grad_output = 1; where it is 1 no memory is touched."""
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    g = load_samples(grad_output, grad_output_stride, rows, batch, 1.0)
    if RESCALE:
        mask &= g != 1.0
    inverse = _inverse(dt, dt_stride, rows, batch)
    r = _residual(v, x0, noise, inverse, v_stride, x0_stride, noise_stride, rows, columns, mask)
    factor = 2.0 * (scale * load_samples(weight, weight_stride, rows, batch, 1.0)) * g
    _store_residual(grad_v, grad_x0, grad_noise, inverse, elements, rows, columns, mask, factor * r)


@triton.jit
def _guided(u, u_uncond, guidance, stride, uncond_stride, rows, columns, mask):
    """The teacher's velocity after guidance."""
    velocity = load_tile(u, stride, rows, columns, mask)
    if u_uncond is not None:
        uncond = load_tile(u_uncond, uncond_stride, rows, columns, mask)
        velocity = uncond + guidance * (velocity - uncond)
    return velocity


@triton.jit
def _store_fgm(
    grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond,
    c, d, e, lam, guidance, finite, elements, rows, columns, mask,
):  # fmt: skip
    """The gradients of d and e, zero by selection where a sample is not finite."""
    d, e = tl.where(finite, d, 0.0), tl.where(finite, e, 0.0)
    c = tl.where(finite, c, 0.0)
    if grad_u is not None:
        store_tile(grad_u, elements, rows, columns, mask, c * guidance * (lam * d + e))
    if grad_v is not None:
        store_tile(grad_v, elements, rows, columns, mask, c * ((1.0 - lam) * d - e))
    if grad_x0 is not None:
        store_tile(grad_x0, elements, rows, columns, mask, c * d)
    if grad_noise is not None:
        store_tile(grad_noise, elements, rows, columns, mask, -c * d)
    if grad_u_uncond is not None:
        uncond = c * (1.0 - guidance) * (lam * d + e)
        store_tile(grad_u_uncond, elements, rows, columns, mask, uncond)


@triton.jit(do_not_specialize=["batch", "chunks"])
def fgm_size_kernel(
    u, x0, noise, u_uncond, size, guidance, batch, elements, chunks,
    u_stride, x0_stride, noise_stride, uncond_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial sums of |u - w|, for the normaliser of samples of more than one tile."""
    rows, columns, mask, chunk = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    velocity = _guided(u, u_uncond, guidance, u_stride, uncond_stride, rows, columns, mask)
    w = load_tile(noise, noise_stride, rows, columns, mask)
    w -= load_tile(x0, x0_stride, rows, columns, mask)
    total = tl.sum(tl.abs(velocity - w), axis=1, keep_dims=True)
    store_partial(size, rows, chunk, chunks, batch, total)


@triton.jit(do_not_specialize=["batch", "chunks"])
def fgm_forward_kernel(
    u, v, x0, noise, u_uncond, grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond,
    t, weight, size, partial, omega,
    lam, guidance, inverse_elements, scale, batch, elements, chunks,
    u_stride, v_stride, x0_stride, noise_stride, uncond_stride, t_stride, weight_stride,
    SID: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial = ω·Σ(2de + λd²)/elements: its sum over chunks is ℓ_b, which has to be finite."""
    rows, columns, mask, chunk = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    velocity = _guided(u, u_uncond, guidance, u_stride, uncond_stride, rows, columns, mask)
    w = load_tile(noise, noise_stride, rows, columns, mask)
    w -= load_tile(x0, x0_stride, rows, columns, mask)
    fake = load_tile(v, v_stride, rows, columns, mask)
    d, e = velocity - fake, fake - w
    factor = load_samples(weight, weight_stride, rows, batch, 1.0)
    if SID:
        if size is not None:
            total = _sum_of_chunks(size, rows, batch, chunks, 128)
        else:
            total = tl.sum(tl.abs(velocity - w), axis=1, keep_dims=True)
        mean = total * inverse_elements
        time = load_samples(t, t_stride, rows, batch, 0.0)
        # A comparison lets NaN through: a sample that has one must not look finite.
        factor *= time / (2.0 * tl.where(mean < 1e-5, 1e-5, mean))
    total = tl.sum(d * (2.0 * e + lam * d), axis=1, keep_dims=True)
    store_partial(partial, rows, chunk, chunks, batch, factor * (total * inverse_elements))
    tl.store(omega + rows, factor, mask=(rows < batch) & (chunk == 0))
    _store_fgm(
        grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond,
        2.0 * scale * factor, d, e, lam, guidance, factor == factor,
        elements, rows, columns, mask,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "chunks"])
def fgm_backward_kernel(
    grad_output, u, v, x0, noise, u_uncond, grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond,
    omega, lam, guidance, scale, batch, elements, chunks,
    grad_output_stride, u_stride, v_stride, x0_stride, noise_stride, uncond_stride,
    RESCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RESCALE: as in flow_matching. ω is NaN for a sample that was left out."""
    rows, columns, mask, _ = tile_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    g = load_samples(grad_output, grad_output_stride, rows, batch, 1.0)
    if RESCALE:
        mask &= g != 1.0
    velocity = _guided(u, u_uncond, guidance, u_stride, uncond_stride, rows, columns, mask)
    w = load_tile(noise, noise_stride, rows, columns, mask)
    w -= load_tile(x0, x0_stride, rows, columns, mask)
    fake = load_tile(v, v_stride, rows, columns, mask)
    factor = tl.load(omega + rows, mask=rows < batch, other=0.0)
    _store_fgm(
        grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond,
        2.0 * scale * factor * g, velocity - fake, fake - w, lam, guidance, factor == factor,
        elements, rows, columns, mask,
    )  # fmt: skip


@triton.jit
def _is_finite(values):
    """Neither infinite nor NaN: a NaN compares false."""
    return tl.abs(values) < float("inf")


@triton.jit
def _zero(pointer, sample, elements, COLUMNS: tl.constexpr):
    """A sample of a contiguous gradient; the loop runs for the rare sample that is not finite."""
    if pointer is not None:
        for first in range(0, elements, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            values = tl.zeros((COLUMNS,), tl.float32).to(pointer.dtype.element_ty)
            tl.store(pointer + sample * elements + column, values, mask=column < elements)


@triton.jit(do_not_specialize=["batch", "chunks"])
def fgm_sum_partials_kernel(
    partial, loss, skipped, omega, t, grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond,
    scale, batch, elements, chunks, t_stride,
    NONE: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program 0 adds the samples that are finite and counts the others; program 1 + b marks
    sample b in ω and makes its gradients zero if it is one of those.
    """
    program = tl.program_id(0)
    if program == 0:
        total = tl.zeros((SAMPLES, 1), tl.float32)
        count = tl.zeros((SAMPLES, 1), tl.int32)
        for first in range(0, batch, SAMPLES):
            rows = first + tl.arange(0, SAMPLES)[:, None].to(tl.int64)
            mean = _sum_of_chunks(partial, rows, batch, chunks, BLOCK)
            finite = _is_finite(mean) & _is_finite(load_samples(t, t_stride, rows, batch, 0.0))
            value = tl.where(finite, mean * scale, 0.0)
            count += tl.where(finite, 0, 1)
            if NONE:
                tl.store(loss + rows, value, mask=rows < batch)
            else:
                total += value
        if not NONE:
            tl.store(loss, tl.sum(total))
        tl.store(skipped, tl.sum(count))
    else:
        sample = (program - 1).to(tl.int64)
        row = sample + tl.zeros((1, 1), tl.int64)
        mean = _sum_of_chunks(partial, row, batch, chunks, BLOCK)
        finite = _is_finite(mean) & _is_finite(load_samples(t, t_stride, row, batch, 0.0))
        if tl.sum(finite.to(tl.int32)) == 0:
            tl.store(omega + sample, float("nan"))
            _zero(grad_u, sample, elements, COLUMNS)
            _zero(grad_v, sample, elements, COLUMNS)
            _zero(grad_x0, sample, elements, COLUMNS)
            _zero(grad_noise, sample, elements, COLUMNS)
            _zero(grad_u_uncond, sample, elements, COLUMNS)
