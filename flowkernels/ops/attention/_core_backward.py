"""Triton kernels of the attention core's backward pass, without atomics.

With s = scale·q kᵀ, p = exp(s - lse), out = p v and g = grad_out:

    dv = pᵀ g                                        from out = p v
    dp = g vᵀ
    ds_ij = p_ij (dp_ij - Σ_j p_ij dp_ij)            the softmax's Jacobian, diag(p) - p pᵀ
          = p_ij (dp_ij - delta_i),   delta_i = Σ_e g_ie out_ie,
            for Σ_j p_ij dp_ij = Σ_j p_ij Σ_e g_ie v_je = Σ_e g_ie Σ_j p_ij v_je
    dq = scale·ds k,   dk = scale·dsᵀ q

p is computed again from lse, so nothing of size [Sq, Sk] is ever stored. dk and dv are sums over
queries, dq is one over keys: two kernels, each of which holds its own sum in registers, seven
products for the five of a kernel that would add dq up by atomics, and the same bits every time.

float32 asks for more than lse has: its rounding, half an ulp of 16 say, is 2⁻²⁰ of every p of the
row, and dp and delta, two sums of the same terms in other orders, do not cancel where one key has
all the weight. There a row's statistics are taken again from the keys, by the same products that
the gradients are made of: top = max_j s_ij, total = Σ_j exp(s_ij - top), p = exp(s - top)/total and
delta = Σ_j p_ij dp_ij. That is two products more in a pass that is there to be right.

Statistics are [B, H, padded] float32, in base 2, ``inverse`` = 1/total or None. Beyond the last
query ``top`` is +inf: p = exp2(s - inf) = 0 with no mask. Names are as in ``_core_device.py``.
"""

# mypy: ignore-errors
# Triton kernels are another language in Python's clothes.

from __future__ import annotations

import triton
import triton.language as tl

from flowkernels.ops.attention._core_device import (
    LOG2E,
    _at,
    _place,
    _rows,
    _store_rows,
    _tile,
    _valid_keys,
)

_VARYING = ["queries", "keys", "heads", "blocks"]


@triton.jit(do_not_specialize=_VARYING)
def attention_delta_kernel(
    grad_out, g_batch, g_row, g_head, out, lse, top, delta, padded, queries, heads, blocks,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """delta = Σ_e grad_out·out, and lse in base 2 for ``top``: the statistics of half precision.

    Reads grad_out and out once, 12 bytes of statistics a row.
    """
    b, h, block = _place(blocks, heads)
    start = block * M
    out_row = heads.to(tl.int64) * E
    out_at = out + b.to(tl.int64) * queries * out_row + h * E
    g_ME = _rows(_at(grad_out, g_batch, g_head, b, h), g_row, start, queries, E, M, COLUMNS, True)
    out_ME = _rows(out_at, out_row, start, queries, E, M, COLUMNS, True)
    row = start + tl.arange(0, M)
    head = b.to(tl.int64) * heads + h
    lse_M = tl.load(lse + head * queries + row, mask=row < queries, other=float("inf"))
    tl.store(top + head * padded + row, lse_M * LOG2E)
    delta_M = tl.sum(g_ME.to(tl.float32) * out_ME.to(tl.float32), axis=1)
    tl.store(delta + head * padded + row, delta_M)


@triton.jit(do_not_specialize=_VARYING)
def attention_statistics_kernel(
    q, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    grad_out, g_batch, g_row, g_head,
    top, inverse, delta, padded, lengths, exponent, queries, keys, heads, blocks,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """top, 1/total and delta = Σ_j p_ij dp_ij: program (sample, head, M queries); for float32.

    Reads what the forward pass does, and grad_out; writes 12 bytes a row. Every block is masked.
    """
    b, h, block = _place(blocks, heads)
    start = block * M
    length = _valid_keys(lengths, b, keys)
    q_ME = _rows(_at(q, q_batch, q_head, b, h), q_row, start, queries, E, M, COLUMNS, True)
    g_ME = _rows(_at(grad_out, g_batch, g_head, b, h), g_row, start, queries, E, M, COLUMNS, True)
    k_at = _at(k, k_batch, k_head, b, h)
    v_at = _at(v, v_batch, v_head, b, h)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    weighted_M = tl.zeros((M,), tl.float32)
    for first in tl.range(0, length, N):
        k_NE = _rows(k_at, k_row, first, length, E, N, COLUMNS, True)
        v_NE = _rows(v_at, v_row, first, length, E, N, COLUMNS, True)
        s_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision="ieee") * exponent
        s_MN = tl.where((first + tl.arange(0, N) < length)[None, :], s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, axis=1))
        p_MN = tl.exp2(s_MN - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        dp_MN = tl.dot(g_ME, tl.trans(v_NE), input_precision="ieee")
        total_M = total_M * shrink_M + tl.sum(p_MN, axis=1)
        weighted_M = weighted_M * shrink_M + tl.sum(p_MN * dp_MN, axis=1)
        top_M = new_top_M
    total_M = tl.where(total_M == 0.0, 1.0, total_M)  # no keys: never used
    row = start + tl.arange(0, M)
    at = (b.to(tl.int64) * heads + h) * padded + row
    tl.store(top + at, tl.where(row < queries, top_M, float("inf")))
    tl.store(inverse + at, 1.0 / total_M)
    tl.store(delta + at, weighted_M / total_M)


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_keys_kernel(
    q, q_tiles, q_batch, q_row, q_head,
    k, k_batch, k_row, k_head,
    v, v_batch, v_row, v_head,
    grad_out, g_tiles, g_batch, g_row, g_head,
    top, inverse, delta, padded, dk, dv, lengths, scale, exponent, queries, keys, heads, blocks,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """dv = pᵀ g and dk = scale·dsᵀ q: program (sample, head, N keys), a loop over all queries.

    Reads k and v and writes dk and dv once; q, grad_out and 8 bytes of statistics a row once for
    each block of keys. No mask in the loop: a key's gradient is its own row of the tiles, so what
    the rows beyond the valid keys hold is replaced by zero when it is written.
    """
    b, h, block = _place(blocks, heads)
    start = block * N
    length = _valid_keys(lengths, b, keys)
    k_NE = _rows(_at(k, k_batch, k_head, b, h), k_row, start, length, E, N, COLUMNS, True)
    v_NE = _rows(_at(v, v_batch, v_head, b, h), v_row, start, length, E, N, COLUMNS, True)
    q_at = _at(q, q_batch, q_head, b, h)
    g_at = _at(grad_out, g_batch, g_head, b, h)
    statistics = (b.to(tl.int64) * heads + h) * padded
    dk_NE = tl.zeros((N, COLUMNS), tl.float32)
    dv_NE = tl.zeros((N, COLUMNS), tl.float32)
    stop = tl.where(start < length, queries, 0)
    for first in tl.range(0, stop, M):
        row = first + tl.arange(0, M)
        q_ME = _tile(q_tiles, q_at, q_row, b, h, first, queries, E, M, COLUMNS, True)
        top_M = tl.load(top + statistics + row)
        s_NM = tl.dot(k_NE, tl.trans(q_ME), input_precision="ieee")
        p_NM = tl.exp2(s_NM * exponent - top_M[None, :])
        if inverse is not None:
            p_NM *= tl.load(inverse + statistics + row)[None, :]
        g_ME = _tile(g_tiles, g_at, g_row, b, h, first, queries, E, M, COLUMNS, True)
        dv_NE = tl.dot(p_NM.to(g_ME.dtype), g_ME, dv_NE, input_precision="ieee")
        delta_M = tl.load(delta + statistics + row)
        dp_NM = tl.dot(v_NE, tl.trans(g_ME), input_precision="ieee")
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, input_precision="ieee")
    out_row = heads.to(tl.int64) * E
    at = b.to(tl.int64) * keys * out_row + h * E
    valid = (start + tl.arange(0, N) < length)[:, None]
    dk_NE = tl.where(valid, dk_NE * scale, 0.0)
    dv_NE = tl.where(valid, dv_NE, 0.0)
    _store_rows(dk + at, out_row, start, keys, dk_NE, E, N, COLUMNS)
    _store_rows(dv + at, out_row, start, keys, dv_NE, E, N, COLUMNS)


@triton.jit
def _add_dq(
    q_ME, g_ME, k_NE, v_NE, top_M, inverse_M, delta_M, dq_ME, exponent, first, length,
    N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq + ds k for one block of keys, not yet scaled."""
    s_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision="ieee")
    p_MN = tl.exp2(s_MN * exponent - top_M[:, None])
    if inverse_M is not None:
        p_MN *= inverse_M[:, None]
    dp_MN = tl.dot(g_ME, tl.trans(v_NE), input_precision="ieee")
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    if MASKED:
        ds_MN = tl.where((first + tl.arange(0, N) < length)[None, :], ds_MN, 0.0)
    return tl.dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, input_precision="ieee")


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_queries_kernel(
    q, q_batch, q_row, q_head,
    k, k_tiles, k_batch, k_row, k_head,
    v, v_tiles, v_batch, v_row, v_head,
    grad_out, g_batch, g_row, g_head,
    top, inverse, delta, padded, dq, lengths, scale, exponent, queries, keys, heads, blocks,
    E: tl.constexpr,
    COLUMNS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """dq = scale·ds k: program (sample, head, M queries), a loop over the valid keys.

    Reads q and grad_out and writes dq once; the valid keys and values once for each block of
    queries. The last block of keys is masked, as in the forward pass.
    """
    b, h, block = _place(blocks, heads)
    start = block * M
    length = _valid_keys(lengths, b, keys)
    q_ME = _rows(_at(q, q_batch, q_head, b, h), q_row, start, queries, E, M, COLUMNS, True)
    g_ME = _rows(_at(grad_out, g_batch, g_head, b, h), g_row, start, queries, E, M, COLUMNS, True)
    k_at = _at(k, k_batch, k_head, b, h)
    v_at = _at(v, v_batch, v_head, b, h)
    statistics = (b.to(tl.int64) * heads + h) * padded + start + tl.arange(0, M)
    top_M = tl.load(top + statistics)
    inverse_M = None if inverse is None else tl.load(inverse + statistics)
    delta_M = tl.load(delta + statistics)
    dq_ME = tl.zeros((M, COLUMNS), tl.float32)
    whole = length // N * N
    for first in tl.range(0, whole, N):
        k_NE = _tile(k_tiles, k_at, k_row, b, h, first, length, E, N, COLUMNS, False)
        v_NE = _tile(v_tiles, v_at, v_row, b, h, first, length, E, N, COLUMNS, False)
        dq_ME = _add_dq(
            q_ME,
            g_ME,
            k_NE,
            v_NE,
            top_M,
            inverse_M,
            delta_M,
            dq_ME,
            exponent,
            first,
            length,
            N,
            False,
        )
    # One turn at most: a loop, so that loads through pointers go straight to shared memory.
    STAGES: tl.constexpr = None if k_tiles is None else 1
    for rest in tl.range(whole, length, N, num_stages=STAGES):
        k_NE = _rows(k_at, k_row, rest, length, E, N, COLUMNS, True)
        v_NE = _rows(v_at, v_row, rest, length, E, N, COLUMNS, True)
        dq_ME = _add_dq(
            q_ME,
            g_ME,
            k_NE,
            v_NE,
            top_M,
            inverse_M,
            delta_M,
            dq_ME,
            exponent,
            whole,
            length,
            N,
            True,
        )
    out_row = heads.to(tl.int64) * E
    dq_at = dq + b.to(tl.int64) * queries * out_row + h * E
    _store_rows(dq_at, out_row, start, queries, dq_ME * scale, E, M, COLUMNS)
