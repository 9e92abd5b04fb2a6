"""Triton kernels of the attention core: what its passes share, and the forward pass.

    out = softmax(scale·q kᵀ) v                over the first lengths[b] keys of each sample
    lse = log Σ exp(scale·q kᵀ)

Tiles carry their shape in their names: M queries, N keys, E columns of a head (``COLUMNS``, a power
of two, of which the first ``E`` are there). Operands are [B, S, H, E] with a unit last stride. A
``*_tiles`` argument is the same operand as a TMA descriptor [B, S, H, E], or None: then it is read
through pointers. Exponentials are of base 2, so ``exponent`` is scale·log₂e.

Programs go along one axis, the blocks of one head side by side: they read the same keys from L2.
"""

# mypy: ignore-errors
# Triton kernels are another language in Python's clothes.

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
_VARYING = ["queries", "keys", "heads", "blocks"]


@triton.jit
def _place(blocks, heads):
    """(sample, head, block) of this program."""
    program = tl.program_id(0)
    head = program // blocks
    return head // heads, head % heads, program % blocks


@triton.jit
def _valid_keys(lengths, b, keys):
    if lengths is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths + b), 0), keys)
    return keys


@triton.jit
def _at(pointer, batch_stride, head_stride, b, h):
    """Row 0 of a head; int64: a tensor may pass 2³¹ elements."""
    return pointer + b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride


@triton.jit
def _grid(base, row_stride, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The pointers of a tile: int64 to its first row, and from there offsets of half the registers.

    The launcher sees to it that a tile's rows lie within 2³¹ elements.
    """
    first = base + tl.full((), start, tl.int64) * row_stride
    return first + (tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _rows(
    base, row_stride, start, stop,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start.. of a head through pointers; where MASKED, those from ``stop`` on are zero."""
    at = _grid(base, row_stride, start, ROWS, COLUMNS)
    inside = start + tl.arange(0, ROWS)[:, None] < stop
    there = tl.arange(0, COLUMNS)[None, :] < E
    if MASKED and E < COLUMNS:
        tile = tl.load(at, mask=inside & there, other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=inside, other=0.0)
    elif E < COLUMNS:
        tile = tl.load(at, mask=there, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _tile(
    tiles, base, row_stride, b, h, start, stop,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start.. of a head by TMA where there is a descriptor: the tensor's end reads as zero."""
    if tiles is None:
        tile = _rows(base, row_stride, start, stop, E, ROWS, COLUMNS, MASKED)
    else:
        tile = tiles.load([b, start, h, 0]).reshape([ROWS, COLUMNS])
    return tile


@triton.jit
def _store_rows(
    base, row_stride, start, stop, value, E: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    at = _grid(base, row_stride, start, ROWS, COLUMNS)
    mask = start + tl.arange(0, ROWS)[:, None] < stop
    if E < COLUMNS:
        mask = mask & (tl.arange(0, COLUMNS)[None, :] < E)
    tl.store(at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q_ME, k_NE, v_NE, out_ME, total_M, top_M, exponent, first, length,
    N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax: (out, total, top), with top in base 2."""
    s_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision="ieee")
    if MASKED:
        # Scaled first: -inf·0 would be NaN where the scale is 0.
        valid = (first + tl.arange(0, N) < length)[None, :]
        s_MN = tl.where(valid, s_MN * exponent, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, axis=1))
        p_MN = tl.exp2(s_MN - new_top_M[:, None])
    else:
        new_top_M = tl.maximum(top_M, tl.max(s_MN, axis=1) * exponent)
        p_MN = tl.exp2(s_MN * exponent - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    total_M = total_M * shrink_M + tl.sum(p_MN, axis=1)
    out_ME = out_ME * shrink_M[:, None]
    out_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, out_ME, input_precision="ieee")
    return out_ME, total_M, new_top_M


@triton.jit(do_not_specialize=_VARYING)
def attention_forward_kernel(
    q, q_batch, q_row, q_head,
    k, k_tiles, k_batch, k_row, k_head,
    v, v_tiles, v_batch, v_row, v_head,
    out, lse, lengths, exponent, queries, keys, heads, blocks,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale·q kᵀ) v, lse = log Σ exp(scale·q kᵀ): program (sample, head, M queries).

    Reads q and writes out once, and 4 bytes of lse a row; reads the lengths[b] valid keys and
    values once for each block of queries, which L2 serves. Keys beyond them are not visited, and
    the blocks before the last carry no mask. A sample without keys gives out = 0, lse = -inf.
    """
    b, h, block = _place(blocks, heads)
    start = block * M
    length = _valid_keys(lengths, b, keys)
    q_ME = _rows(_at(q, q_batch, q_head, b, h), q_row, start, queries, E, M, COLUMNS, True)
    k_at = _at(k, k_batch, k_head, b, h)
    v_at = _at(v, v_batch, v_head, b, h)
    out_ME = tl.zeros((M, COLUMNS), tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    whole = length // N * N
    for first in tl.range(0, whole, N):
        k_NE = _tile(k_tiles, k_at, k_row, b, h, first, length, E, N, COLUMNS, False)
        v_NE = _tile(v_tiles, v_at, v_row, b, h, first, length, E, N, COLUMNS, False)
        out_ME, total_M, top_M = _attend(
            q_ME, k_NE, v_NE, out_ME, total_M, top_M, exponent, first, length, N, False
        )
    # One turn at most: a loop, so that loads through pointers go straight to shared memory.
    STAGES: tl.constexpr = None if k_tiles is None else 1
    for rest in tl.range(whole, length, N, num_stages=STAGES):
        # Through pointers: what lies beyond a sample's keys may be anything, and 0·NaN is NaN.
        k_NE = _rows(k_at, k_row, rest, length, E, N, COLUMNS, True)
        v_NE = _rows(v_at, v_row, rest, length, E, N, COLUMNS, True)
        out_ME, total_M, top_M = _attend(
            q_ME, k_NE, v_NE, out_ME, total_M, top_M, exponent, rest, length, N, True
        )
    total_M = tl.where(total_M == 0.0, 1.0, total_M)
    row = start + tl.arange(0, M)
    head = b.to(tl.int64) * heads + h
    tl.store(lse + head * queries + row, (top_M + tl.log2(total_M)) * LN2, mask=row < queries)
    out_row = heads.to(tl.int64) * E
    out_at = out + b.to(tl.int64) * queries * out_row + h * E
    _store_rows(out_at, out_row, start, queries, out_ME / total_M[:, None], E, M, COLUMNS)
