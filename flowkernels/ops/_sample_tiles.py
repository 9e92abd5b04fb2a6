# mypy: ignore-errors
"""Tiles of operands [B, elements] with contiguous samples: how every sample kernel is cut.

A program takes ROWS samples by COLUMNS elements: one sample and a wide piece of it where samples
are large, many samples where they are small, so that neither leaves lanes idle.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

# Elements a program holds of each operand, and its warps: 8 elements a thread, two 16-byte loads
# of float32 in flight for each operand.
TILE = 2048
WARPS = 8


class Tiles(NamedTuple):
    """Samples, elements of each, pieces of a sample, programs, and the tile's two sides."""

    batch: int
    elements: int
    chunks: int
    programs: int
    rows: int
    columns: int


def tiles_of(x) -> Tiles:
    """The cut of a tensor [B, ...]."""
    batch, elements = x.shape[0], math.prod(x.shape[1:])
    columns = TILE
    # The widest power of two that leaves less than a quarter of a sample's lanes idle.
    while columns > 4 and triton.cdiv(elements, columns) * columns * 3 > max(elements, 1) * 4:
        columns //= 2
    chunks = triton.cdiv(elements, columns)
    rows = TILE // columns
    return Tiles(batch, elements, chunks, triton.cdiv(batch, rows) * chunks, rows, columns)


def stride_of(x) -> int:
    """Elements from a sample to the next."""
    return 0 if x is None else x.stride(0) if x.dim() else 0


@triton.jit
def tile_of(program, batch, elements, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Samples [ROWS, 1] and their elements [1, COLUMNS] of a program, int64, and their mask."""
    row_block = program // chunks
    chunk = program - row_block * chunks
    rows = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = chunk.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < batch) & (columns < elements), chunk


@triton.jit
def load_tile(pointer, stride, rows, columns, mask):
    """Elements of an operand as float32, 0 outside it."""
    return tl.load(pointer + (rows * stride + columns), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, stride, rows, columns, mask, values):
    """Round to the operand's dtype, and store."""
    tl.store(pointer + (rows * stride + columns), values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_samples(pointer, stride, rows, batch, default):
    """A number for each sample as float32 [ROWS, 1]: of a vector, a 0-d tensor, or `default`."""
    if pointer is not None:
        return tl.load(pointer + rows * stride, mask=rows < batch, other=0.0).to(tl.float32)
    else:
        return tl.full(rows.shape, 1.0, tl.float32) * default
