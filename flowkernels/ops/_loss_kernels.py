# mypy: ignore-errors
"""What the losses' Triton kernels share: their launch geometry, and the two stages of their sums.

Every loss is two stages without atomics: tiles that leave a partial sum each (and write the
gradients), then one program that adds the partial sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowkernels.ops._losses import NONE, SUM, loss_like
from flowkernels.ops._sample_tiles import WARPS, stride_of
from flowkernels.ops._triton import launch


def loss_scale(tiles, reduction):
    """The factor of a sample's sum in the loss; no program runs where it would divide by 0."""
    if reduction == SUM:
        return 1.0
    mean = 1.0 / max(tiles.elements, 1)
    return mean if reduction == NONE else mean / max(tiles.batch, 1)


def empty_loss(x, tiles, reduction):
    """The loss to be written; of no elements at all it is the mean of nothing, or a sum of 0."""
    loss = loss_like(x, reduction)
    if tiles.programs == 0:
        loss.fill_(0.0 if reduction == SUM else float("nan"))
    return loss


def placed(gradients, wanted, operands):
    """The gradients in the places of their operands, None for those whose bit is not set."""
    remaining = iter(gradients)
    return [
        next(remaining) if operand is not None and wanted >> bit & 1 else None
        for bit, operand in enumerate(operands)
    ]


def geometry(tiles):
    """(run-time arguments, options) of a launch over tiles."""
    options = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "num_warps": WARPS}
    return (tiles.batch, tiles.elements, tiles.chunks), options


def strides(*operands):
    return tuple(stride_of(operand) for operand in operands)


def sum_partials(partial, loss, tiles, reduction):
    """The second stage: ``loss`` from the partial sums [batch, chunks]."""
    if tiles.programs:
        samples = tiles.batch if reduction == NONE else 1
        launch(
            sum_partials_kernel,
            (samples,),
            *(partial, loss, tiles.batch * tiles.chunks // samples),
            BLOCK=1024,
            num_warps=4,
        )


@triton.jit
def sum_of(partial, count, BLOCK: tl.constexpr):
    """Sum of partial, [count], in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(partial, out, count, BLOCK: tl.constexpr):
    """out[program] = sum of partial[program], [count]."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(out + program, sum_of(partial + program * count, count, BLOCK))


@triton.jit
def store_partial(partial, rows, chunk, chunks, batch, values):
    """One number for each sample of a tile, [ROWS, 1]."""
    tl.store(partial + rows * chunks + chunk, values, mask=rows < batch)
