"""Triton kernels of the heads: per-head RMSNorm, rotation and the joint layout.

    z = x·rstd·weight,   rstd = 1/√(mean(x²) + eps)   over the E elements of a head
    y = z·cos + turn(z)·sin,   turn takes each pair (a, b) of elements to (-b, a)

Elements are held in pairs (``_tiles.py``), also where nothing turns. An absent operand is None.
"""

# mypy: ignore-errors
# Triton kernels are another language in Python's clothes.

from __future__ import annotations

import triton
import triton.language as tl

from flowkernels.ops.attention._tiles import (
    at,
    load_heads,
    load_pairs,
    place,
    store_heads,
    store_pairs,
)

_VARYING = ["q_rows", "k_rows", "q_total", "k_total", "q_offset", "k_offset", "position",
            "first_keys", "second_keys", "batch"]  # fmt: skip


@triton.jit
def _rounded(value, pointer):
    """Rounded as it would be stored there."""
    return value.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _weighted(value, weight_values, x, weight, y, ROUNDING: tl.constexpr):
    """xhat·weight with the roundings of separate operators: 1 as torch's, 2 as diffusers' norm."""
    if ROUNDING == 2:
        value = _rounded(value, x if weight is None else weight)
    if weight is not None:
        value *= weight_values
    if ROUNDING == 2:
        if weight is not None:
            value = _rounded(value, weight)
    if ROUNDING == 1:
        value = _rounded(value, y)
    return value


@triton.jit
def _forward_token(
    x, x_head, weight, cos, sin, y, rstd, valid, eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    ROUNDING: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y of all heads of a token; every pointer is at the token. Zeros where it is not valid."""
    weight0, weight1 = 1.0, 1.0
    if weight is not None:
        weight0, weight1 = load_pairs(weight, HEAD_DIM, HALF, INTERLEAVED)
    if cos is not None:
        cos0, cos1 = load_pairs(cos, HEAD_DIM, HALF, INTERLEAVED)
        sin0, sin1 = load_pairs(sin, HEAD_DIM, HALF, INTERLEAVED)
    for start in tl.range(0, HEADS, BLOCK_H, num_stages=STAGES):
        head = start + tl.arange(0, BLOCK_H)
        inside = head < HEADS
        a, b = load_heads(
            x, x_head, head, inside & valid, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED
        )  # fmt: skip
        if NORM:
            squares = tl.sum(a * a + b * b, axis=1)
            scale = 1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps)
            tl.store(rstd + head, scale, mask=inside)
            a = _weighted(a * scale[:, None], weight0, x, weight, y, ROUNDING)
            b = _weighted(b * scale[:, None], weight1, x, weight, y, ROUNDING)
        elif rstd is not None:
            tl.store(rstd + head, tl.full((BLOCK_H,), 1.0, tl.float32), mask=inside)
        if cos is not None:
            turned = a * cos0 - b * sin0
            b = b * cos1 + a * sin1
            a = turned
        a = tl.where(valid, a, 0.0)
        b = tl.where(valid, b, 0.0)
        store_heads(a, b, y, head, inside, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED)


@triton.jit
def _forward_piece(
    x, x_batch, x_row, x_head, weight, y, rstd, cos, cos_row, sin, sin_row,
    b, s, row, valid, rows, total, offset, position, eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    ROUNDING: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    if s < rows:
        _forward_token(
            at(x, x_batch, x_row, b, s), x_head, weight,
            None if cos is None else cos + (position + s) * cos_row,
            None if sin is None else sin + (position + s) * sin_row,
            y + (b * total + row) * (HEADS * HEAD_DIM),
            None if rstd is None else rstd + (b * total + offset + s) * HEADS,
            valid, eps, HEADS, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED, NORM, ROUNDING, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def heads_forward_kernel(
    q, q_batch, q_row, q_head, q_weight, q_out, q_rstd,
    k, k_batch, k_row, k_head, k_weight, k_out, k_rstd,
    v, v_batch, v_row, v_head, v_out,
    cos, cos_row, sin, sin_row, lengths, lengths_batch, lengths_stream,
    q_rows, k_rows, q_total, k_total, q_offset, k_offset, position, first_keys, second_keys, eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    ROUNDING: tl.constexpr,
    STREAM: tl.constexpr,
    STREAMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One stream's q, k and v into their rows of the joint tensors.

    Program (token, which of q, k, v). Reads each input once where it lies, writes each output once,
    4 bytes of rstd a head; weight, cos and sin stay in cache.
    """
    index = tl.program_id(0).to(tl.int64)
    rows = tl.maximum(q_rows, k_rows)
    b, s = index // rows, index % rows
    which = tl.program_id(1)
    if which == 0:
        _forward_piece(
            q, q_batch, q_row, q_head, q_weight, q_out, q_rstd, cos, cos_row, sin, sin_row,
            b, s, q_offset + s, s >= 0, q_rows, q_total, q_offset, position, eps,
            HEADS, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED, NORM, ROUNDING, STAGES,
        )  # fmt: skip
    else:
        row, valid = place(
            lengths, lengths_batch, lengths_stream, b, s, k_offset, first_keys, second_keys,
            STREAM, STREAMS,
        )  # fmt: skip
        if which == 1:
            _forward_piece(
                k, k_batch, k_row, k_head, k_weight, k_out, k_rstd, cos, cos_row, sin, sin_row,
                b, s, row, valid, k_rows, k_total, k_offset, position, eps,
                HEADS, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED, NORM, ROUNDING, STAGES,
            )  # fmt: skip
        if v is not None:
            if which == 2:
                _forward_piece(
                    v, v_batch, v_row, v_head, None, v_out, None, None, 0, None, 0,
                    b, s, row, valid, k_rows, k_total, k_offset, position, eps,
                    HEADS, HEAD_DIM, HALF, BLOCK_H, True, False, 0, STAGES,
                )  # fmt: skip


# With g the gradient of y, in pairs, and gz = g turned back (the rotation's transpose):
#
#   gz = (g0·cos0 + g1·sin1, g1·cos1 - g0·sin0)
#   grad_weight = Σ gz·xhat                                    over all tokens and heads
#   grad_x = rstd·(gz·w - xhat·mean(gz·w·xhat))                gz where nothing is normed
#
# Roundings of the forward pass count as the identity.
@triton.jit
def _backward_token(
    g, g_head, x, x_head, weight0, weight1, cos, sin, rstd, grad, valid, sums0, sums1,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """grad_x of all heads of a token, and its share of the weight's gradient onto the sums."""
    if cos is not None:
        cos0, cos1 = load_pairs(cos, HEAD_DIM, HALF, INTERLEAVED)
        sin0, sin1 = load_pairs(sin, HEAD_DIM, HALF, INTERLEAVED)
    for start in tl.range(0, HEADS, BLOCK_H, num_stages=STAGES):
        head = start + tl.arange(0, BLOCK_H)
        inside = head < HEADS
        taken = inside & valid
        a, b = load_heads(g, g_head, head, taken, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED)
        if cos is not None:
            turned = a * cos0 + b * sin1
            b = b * cos1 - a * sin0
            a = turned
        if NORM:
            scale = tl.load(rstd + head, mask=taken, other=0.0)[:, None]
            x0, x1 = load_heads(x, x_head, head, taken, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED)
            x0 *= scale
            x1 *= scale
            sums0 += a * x0
            sums1 += b * x1
            a *= weight0
            b *= weight1
            mean = (tl.sum(a * x0 + b * x1, axis=1) / HEAD_DIM)[:, None]
            a = tl.where(valid, scale * (a - x0 * mean), 0.0)
            b = tl.where(valid, scale * (b - x1 * mean), 0.0)
        if grad is not None:
            store_heads(a, b, grad, head, inside, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED)
    return sums0, sums1


@triton.jit
def _backward_piece(
    g, g_batch, g_row, g_head, x, x_batch, x_row, x_head, weight, rstd, grad, partial,
    cos, cos_row, sin, sin_row, lengths, lengths_batch, lengths_stream,
    batch, rows, total, offset, position, first_keys, second_keys,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    STREAM: tl.constexpr,
    STREAMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A chunk of ROWS tokens of one tensor: their gradients, and one row of partial sums."""
    chunk = tl.program_id(0).to(tl.int64)
    weight0, weight1 = 1.0, 1.0
    if weight is not None:
        weight0, weight1 = load_pairs(weight, HEAD_DIM, HALF, INTERLEAVED)
    sums0 = tl.zeros((BLOCK_H, HALF), tl.float32)
    sums1 = tl.zeros((BLOCK_H, HALF), tl.float32)
    first_token = chunk * ROWS
    for step in range(0, tl.minimum(batch * rows.to(tl.int64) - first_token, ROWS).to(tl.int32)):
        index = first_token + step
        b, s = index // rows, index % rows
        row, valid = place(
            lengths, lengths_batch, lengths_stream, b, s, offset, first_keys, second_keys,
            STREAM, STREAMS,
        )  # fmt: skip
        sums0, sums1 = _backward_token(
            at(g, g_batch, g_row, b, row), g_head, at(x, x_batch, x_row, b, s), x_head,
            weight0, weight1,
            None if cos is None else cos + (position + s) * cos_row,
            None if sin is None else sin + (position + s) * sin_row,
            None if rstd is None else rstd + (b * total + offset + s) * HEADS,
            None if grad is None else grad + index * (HEADS * HEAD_DIM),
            valid, sums0, sums1, HEADS, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED, NORM, STAGES,
        )  # fmt: skip
    if partial is not None:
        store_pairs(
            tl.sum(sums0, axis=0), tl.sum(sums1, axis=0), partial + chunk * HEAD_DIM,
            HEAD_DIM, HALF, INTERLEAVED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def heads_backward_kernel(
    grad_q, grad_q_batch, grad_q_row, grad_q_head, q, q_batch, q_row, q_head, q_weight, q_rstd,
    q_grad, q_partial,
    grad_k, grad_k_batch, grad_k_row, grad_k_head, k, k_batch, k_row, k_head, k_weight, k_rstd,
    k_grad, k_partial,
    grad_v, grad_v_batch, grad_v_row, grad_v_head, v, v_batch, v_row, v_head, v_grad,
    cos, cos_row, sin, sin_row, lengths, lengths_batch, lengths_stream,
    batch, q_rows, k_rows, q_total, k_total, q_offset, k_offset, position, first_keys, second_keys,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    STREAM: tl.constexpr,
    STREAMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one stream's q, k, v and weights: those with a pointer.

    Program (chunk of ROWS tokens, which of q, k, v). Reads the joint gradient and the input and
    writes the input's gradient once each (v's gradient is a copy: v is not read); one float32 row
    of E for each chunk and weight, which _reduce_partials_kernel adds in a fixed order.
    """
    which = tl.program_id(1)
    if which == 0:
        _backward_piece(
            grad_q, grad_q_batch, grad_q_row, grad_q_head, q, q_batch, q_row, q_head,
            q_weight, q_rstd, q_grad, q_partial, cos, cos_row, sin, sin_row, None, 0, 0,
            batch, q_rows, q_total, q_offset, position, first_keys, second_keys,
            ROWS, HEADS, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED, NORM, STREAM, STREAMS, STAGES,
        )  # fmt: skip
    if which == 1:
        _backward_piece(
            grad_k, grad_k_batch, grad_k_row, grad_k_head, k, k_batch, k_row, k_head,
            k_weight, k_rstd, k_grad, k_partial, cos, cos_row, sin, sin_row,
            lengths, lengths_batch, lengths_stream,
            batch, k_rows, k_total, k_offset, position, first_keys, second_keys,
            ROWS, HEADS, HEAD_DIM, HALF, BLOCK_H, INTERLEAVED, NORM, STREAM, STREAMS, STAGES,
        )  # fmt: skip
    if v_grad is not None:
        if which == 2:
            _backward_piece(
                grad_v, grad_v_batch, grad_v_row, grad_v_head, v, v_batch, v_row, v_head,
                None, None, v_grad, None, None, 0, None, 0,
                lengths, lengths_batch, lengths_stream,
                batch, k_rows, k_total, k_offset, position, first_keys, second_keys,
                ROWS, HEADS, HEAD_DIM, HALF, BLOCK_H, True, False, STREAM, STREAMS, STAGES,
            )  # fmt: skip
