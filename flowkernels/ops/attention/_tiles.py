"""Tiles of heads: what the heads' Triton kernels read and write.

A tile is some heads of a token, [BLOCK_H, E], held as two [BLOCK_H, HALF]: the first and the
second elements of all pairs. They are 2i and 2i + 1 where INTERLEAVED, read and written as whole
rows, else i and i + ⌈E/2⌉.
"""

# mypy: ignore-errors
# Triton kernels are another language in Python's clothes.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def at(pointer, batch_stride, row_stride, b, s):
    """A token of an operand; ``b`` and ``s`` are int64: a tensor may pass 2³¹ elements."""
    return pointer + b * batch_stride + s * row_stride


@triton.jit
def load_pairs(row, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A row of E elements as float32 (first, second) elements of its pairs, [HALF] each."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        value = tl.load(row + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(value, (HALF, 2)))
    else:
        half: tl.constexpr = (HEAD_DIM + 1) // 2
        pair = tl.arange(0, HALF)
        first = tl.load(row + pair, mask=pair < half, other=0.0).to(tl.float32)
        second = tl.load(row + half + pair, mask=half + pair < HEAD_DIM, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    first, second, row, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        value = tl.reshape(tl.join(first, second), (2 * HALF,))
        tl.store(row + column, value, mask=column < HEAD_DIM)
    else:
        half: tl.constexpr = (HEAD_DIM + 1) // 2
        pair = tl.arange(0, HALF)
        tl.store(row + pair, first, mask=pair < half)
        tl.store(row + half + pair, second, mask=half + pair < HEAD_DIM)


@triton.jit
def load_heads(
    token, head_stride, head, inside, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads of a token as float32 (first, second), [BLOCK_H, HALF] each; 0 where not inside."""
    rows = token + head[:, None] * head_stride
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        mask = inside[:, None] & (column < HEAD_DIM)
        value = tl.load(rows + column, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(value, (BLOCK_H, HALF, 2)))
    else:
        half: tl.constexpr = (HEAD_DIM + 1) // 2
        pair = tl.arange(0, HALF)[None, :]
        mask = inside[:, None] & (pair < half)
        first = tl.load(rows + pair, mask=mask, other=0.0).to(tl.float32)
        mask = inside[:, None] & (half + pair < HEAD_DIM)
        second = tl.load(rows + half + pair, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_heads(
    first, second, token, head, inside, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads of a token into a contiguous tensor."""
    rows = token + head[:, None] * HEAD_DIM
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        mask = inside[:, None] & (column < HEAD_DIM)
        value = tl.reshape(tl.join(first, second), (BLOCK_H, 2 * HALF))
        tl.store(rows + column, value, mask=mask)
    else:
        half: tl.constexpr = (HEAD_DIM + 1) // 2
        pair = tl.arange(0, HALF)[None, :]
        tl.store(rows + pair, first, mask=inside[:, None] & (pair < half))
        mask = inside[:, None] & (half + pair < HEAD_DIM)
        tl.store(rows + half + pair, second, mask=mask)


@triton.jit
def place(
    lengths, lengths_batch, lengths_stream, b, s, offset, first_keys, second_keys,
    STREAM: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    """(joint row, whether it is valid) of row s of a stream's keys.

    Valid rows of both streams come first; each invalid row owns one of the rows that remain, which
    hold zeros. So every row of the joint tensor has one writer.
    """
    row = offset + s
    valid = s >= 0
    if lengths is not None:
        own = lengths + b * lengths_batch
        first = tl.minimum(tl.maximum(tl.load(own), 0), first_keys).to(tl.int64)
        second = tl.zeros_like(first)
        if STREAMS == 2:
            second = tl.load(own + lengths_stream)
            second = tl.minimum(tl.maximum(second, 0), second_keys).to(tl.int64)
        if STREAM == 0:
            valid = s < first
            row = tl.where(valid, s, s + second)
        else:
            valid = s < second
            row = tl.where(valid, first + s, first_keys + s)
    return row, valid
