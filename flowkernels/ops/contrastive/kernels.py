"""Triton kernels of contrastive flow matching, and their launchers.

Reads v, x0 and noise of a sample and x0 and noise of its negative, writes the gradient of v:
4 tensors' bytes where every x0 and noise is read from memory once. So that they are, programs go
through all samples of a piece before the next piece begins, and the second reading finds it cached.

With c = 2·scale·weight·grad_output:   ∂v = c·((v - u) - lam·(v - ũ)),  u = noise - x0
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flowkernels.ops._loss_kernels import (
    empty_loss,
    geometry,
    loss_scale,
    store_partial,
    strides,
    sum_partials,
)
from flowkernels.ops._losses import gradients_like
from flowkernels.ops._sample_tiles import load_samples, load_tile, store_tile, tile_of, tiles_of
from flowkernels.ops._triton import launch


@triton.jit
def _piece_of(program, batch, elements, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``tile_of`` in another order: every block of samples of a chunk, then the next chunk."""
    blocks = tl.cdiv(batch, ROWS)
    chunk = program // blocks
    return tile_of(
        (program - chunk * blocks) * chunks + chunk, batch, elements, chunks, ROWS, COLUMNS
    )


@triton.jit
def _residuals(
    v, x0, noise, negatives, batch, v_stride, x0_stride, noise_stride, negatives_stride,
    rows, columns, mask,
):  # fmt: skip
    """v - u and v - ũ; the second NaN where an index lies outside the batch."""
    velocity = load_tile(v, v_stride, rows, columns, mask)
    u = load_tile(noise, noise_stride, rows, columns, mask)
    u -= load_tile(x0, x0_stride, rows, columns, mask)
    other = tl.load(negatives + rows * negatives_stride, mask=rows < batch, other=0)
    inside = (other >= 0) & (other < batch)
    w = load_tile(noise, noise_stride, other, columns, mask & inside)
    w -= load_tile(x0, x0_stride, other, columns, mask & inside)
    return velocity - u, velocity - tl.where(inside, w, float("nan"))


@triton.jit(do_not_specialize=["batch", "chunks"])
def _contrastive_forward_kernel(
    v, x0, noise, negatives, weight, grad_v, partial, lam, scale, batch, elements, chunks,
    v_stride, x0_stride, noise_stride, negatives_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, chunk = _piece_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    own, other = _residuals(
        v, x0, noise, negatives, batch, v_stride, x0_stride, noise_stride, negatives_stride,
        rows, columns, mask,
    )  # fmt: skip
    factor = scale * load_samples(weight, weight_stride, rows, batch, 1.0)
    terms = tl.where(mask, own * own - lam * other * other, 0.0)
    total = tl.sum(terms, axis=1, keep_dims=True)
    store_partial(partial, rows, chunk, chunks, batch, factor * total)
    if grad_v is not None:
        store_tile(grad_v, elements, rows, columns, mask, 2.0 * factor * (own - lam * other))


@triton.jit(do_not_specialize=["batch", "chunks"])
def _contrastive_backward_kernel(
    grad_output, v, x0, noise, negatives, weight, grad_v, lam, scale, batch, elements, chunks,
    grad_output_stride, v_stride, x0_stride, noise_stride, negatives_stride, weight_stride,
    RESCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RESCALE: the gradient is that of grad_output = 1; where it is 1 no memory is touched."""
    rows, columns, mask, _ = _piece_of(tl.program_id(0), batch, elements, chunks, ROWS, COLUMNS)
    g = load_samples(grad_output, grad_output_stride, rows, batch, 1.0)
    if RESCALE:
        mask &= g != 1.0
    own, other = _residuals(
        v, x0, noise, negatives, batch, v_stride, x0_stride, noise_stride, negatives_stride,
        rows, columns, mask,
    )  # fmt: skip
    factor = 2.0 * (scale * load_samples(weight, weight_stride, rows, batch, 1.0)) * g
    store_tile(grad_v, elements, rows, columns, mask, factor * (own - lam * other))


def contrastive_forward(v, x0, noise, negatives, weight, lam, reduction, wanted):
    tiles = tiles_of(v)
    shape, options = geometry(tiles)
    gradients = gradients_like(wanted, v)
    loss = empty_loss(v, tiles, reduction)
    partial = v.new_empty((tiles.batch, tiles.chunks), dtype=torch.float32)
    launch(
        _contrastive_forward_kernel,
        (tiles.programs,),
        *(v, x0, noise, negatives, weight, gradients[0] if gradients else None, partial),
        *(lam, loss_scale(tiles, reduction), *shape, *strides(v, x0, noise, negatives, weight)),
        **options,
    )
    sum_partials(partial, loss, tiles, reduction)
    return [loss, *gradients]


def _gradient(gradient, grad_output, v, x0, noise, negatives, weight, lam, reduction, rescale):
    tiles = tiles_of(v)
    shape, options = geometry(tiles)
    launch(
        _contrastive_backward_kernel,
        (tiles.programs,),
        *(grad_output, v, x0, noise, negatives, weight, gradient),
        *(lam, loss_scale(tiles, reduction), *shape),
        *strides(grad_output, v, x0, noise, negatives, weight),
        RESCALE=rescale,
        **options,
    )


def contrastive_rescale_(gradient, grad_output, *operands):
    _gradient(gradient, grad_output, *operands, rescale=True)


def contrastive_backward(grad_output, v, *operands):
    gradient = v.new_empty(v.shape)
    _gradient(gradient, grad_output, v, *operands, rescale=False)
    return gradient
