"""Triton kernels of the adversarial losses, and their launchers.

One kernel for all of them: the mean of a function over one tensor or two, and its gradient. It
reads the tensors once, writes the gradients once and leaves one partial sum a program, which a
second kernel adds in a fixed order.

    softplus    first: softplus(-x), slope -1/(1 + eˣ);  second: softplus(x), slope 1/(1 + e⁻ˣ)
    square      first: x², slope 2x
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flowkernels.ops._loss_kernels import placed, sum_partials_kernel
from flowkernels.ops._losses import gradients_like
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
def _softplus(x):
    """ln(1 + eˣ) and its derivative, for x of any size.

    ln(1 + e) of e in [0, 1] is 2·atanh(z), z = e/(2 + e) ≤ 1/3, by its series: to 2e-7 of itself.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    w = z * z
    p = 1.0 / 13.0 + w / 15.0
    p = 1.0 / 11.0 + w * p
    p = 1.0 / 9.0 + w * p
    p = 1.0 / 7.0 + w * p
    p = 1.0 / 5.0 + w * p
    p = 1.0 / 3.0 + w * p
    value = tl.where(x > 0.0, x, 0.0) + 2.0 * z * (1.0 + w * p)
    return value, tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _term(
    x, grad, grad_output, partial, program, slot, scale, batch, elements, chunks, stride,
    SIGN: tl.constexpr, SQUARE: tl.constexpr, RESCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask, _ = tile_of(program, batch, elements, chunks, ROWS, COLUMNS)
    g = load_samples(grad_output, 0, rows, batch, 1.0)
    if RESCALE:
        mask &= g != 1.0
    values = load_tile(x, stride, rows, columns, mask)
    if SQUARE:
        result, slope = values * values, 2.0 * values
    else:
        result, slope = _softplus(SIGN * values)
        slope *= SIGN
    if partial is not None:
        tl.store(partial + slot, scale * tl.sum(tl.where(mask, result, 0.0)))
    if grad is not None:
        store_tile(grad, elements, rows, columns, mask, g * scale * slope)


_COUNTS = [f"{which}_{count}" for which in ("first", "second") for count in ("batch", "chunks")]


@triton.jit(do_not_specialize=[*_COUNTS, "first_programs"])
def _means_kernel(
    first, second, grad_first, grad_second, grad_output, partial,
    first_programs, first_scale, first_batch, first_elements, first_chunks, first_stride,
    second_scale, second_batch, second_elements, second_chunks, second_stride,
    SQUARE: tl.constexpr, RESCALE: tl.constexpr,
    FIRST_ROWS: tl.constexpr, FIRST_COLUMNS: tl.constexpr,
    SECOND_ROWS: tl.constexpr, SECOND_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs of the first tensor, then those of the second.

    RESCALE: the gradients are those of grad_output = 1; where it is 1 no memory is touched.
    """
    program = tl.program_id(0)
    if program < first_programs:
        _term(
            first, grad_first, grad_output, partial, program, program, first_scale,
            first_batch, first_elements, first_chunks, first_stride,
            -1.0, SQUARE, RESCALE, FIRST_ROWS, FIRST_COLUMNS,
        )  # fmt: skip
    if second is not None:
        if program >= first_programs:
            _term(
                second, grad_second, grad_output, partial, program - first_programs, program,
                second_scale, second_batch, second_elements, second_chunks, second_stride,
                1.0, SQUARE, RESCALE, SECOND_ROWS, SECOND_COLUMNS,
            )  # fmt: skip


class _Cut(NamedTuple):
    """A tensor's programs, the kernel's arguments of it, and the two sides of its tile."""

    programs: int
    arguments: tuple[Any, ...]
    rows: int
    columns: int


def _cut(x, scale):
    if x is None:
        return _Cut(0, (0.0, 0, 1, 0, 0), 1, 1)
    if x.is_contiguous():
        x = x.view(1, x.numel())  # one sample: many small ones would leave a tile's columns short
    tiles = tiles_of(x)
    shape = (tiles.batch, tiles.elements, tiles.chunks)
    return _Cut(tiles.programs, (scale, *shape, stride_of(x)), tiles.rows, tiles.columns)


def _launch(operands, scales, gradients, grad_output, *, square, rescale=False, loss=None):
    """One pass over one tensor or two; ``loss`` is where the sum goes, if it is wanted."""
    first, second = (_cut(x, scale) for x, scale in zip(operands, scales, strict=True))
    programs = first.programs + second.programs
    partial = loss  # of one program it is the sum
    if loss is not None and programs > 1:
        partial = loss.new_empty((programs,))
    launch(
        _means_kernel,
        (programs,),
        *(*operands, *gradients, grad_output, partial),
        *(first.programs, *first.arguments, *second.arguments),
        SQUARE=square,
        RESCALE=rescale,
        FIRST_ROWS=first.rows,
        FIRST_COLUMNS=first.columns,
        SECOND_ROWS=second.rows,
        SECOND_COLUMNS=second.columns,
        num_warps=WARPS,
    )
    if partial is not loss:
        launch(sum_partials_kernel, (1,), partial, loss, programs, BLOCK=1024, num_warps=4)


def _mean_scales(real, fake):
    return tuple(0.0 if x is None else 1.0 / max(x.numel(), 1) for x in (real, fake))


def gan_forward(real, fake, wanted):
    gradients = gradients_like(wanted, real, fake)
    loss = real.new_empty((), dtype=torch.float32)
    _launch(
        (real, fake),
        _mean_scales(real, fake),
        placed(gradients, wanted, (real, fake)),
        None,
        square=False,
        loss=loss,
    )
    if real.numel() == 0 or (fake is not None and fake.numel() == 0):
        loss.fill_(float("nan"))  # the mean of nothing
    return [loss, *gradients]


def gan_rescale_(gradients, grad_output, real, fake, wanted):
    _launch(
        (real, fake),
        _mean_scales(real, fake),
        placed(gradients, wanted, (real, fake)),
        grad_output,
        square=False,
        rescale=True,
    )


def gan_backward(grad_output, real, fake, wanted):
    gradients = gradients_like(wanted, real, fake)
    _launch(
        (real, fake),
        _mean_scales(real, fake),
        placed(gradients, wanted, (real, fake)),
        grad_output,
        square=False,
    )
    return gradients


def _penalty_scales(x, gamma):
    return 0.5 * gamma / max(x.shape[0], 1), 0.0


def gradient_penalty_forward(x, gamma, wanted):
    gradients = gradients_like(wanted, x)
    loss = x.new_empty((), dtype=torch.float32)
    gradient = gradients[0] if gradients else None
    _launch((x, None), _penalty_scales(x, gamma), (gradient, None), None, square=True, loss=loss)
    if x.numel() == 0:  # the mean over no sample, or sums of no elements
        loss.fill_(0.0 if x.shape[0] else float("nan"))
    return [loss, *gradients]


def gradient_penalty_rescale_(gradient, grad_output, x, gamma):
    scales = _penalty_scales(x, gamma)
    _launch((x, None), scales, (gradient, None), grad_output, square=True, rescale=True)


def gradient_penalty_backward(grad_output, x, gamma):
    gradient = x.new_empty(x.shape)
    _launch((x, None), _penalty_scales(x, gamma), (gradient, None), grad_output, square=True)
    return gradient
