"""Launchers of the attention core's Triton kernels.

They serve float32, bfloat16 and float16 (one dtype for q, k, v) and heads of up to 256. float32
products are IEEE ones: TF32 has 1e-3 of error, and its three-product form sums in the tensor
cores' own way, which rounds towards zero and drifts over thousands of keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flowkernels.ops._triton import capability_of, launch
from flowkernels.ops.attention._core_backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_delta_kernel,
    attention_statistics_kernel,
)
from flowkernels.ops.attention._core_config import (
    FORWARD,
    KEYS,
    LARGEST_TILE,
    POINTERS,
    QUERIES,
    Tiles,
    reads_by_tma,
    tiles_for,
)
from flowkernels.ops.attention._core_device import attention_forward_kernel

Tensor = torch.Tensor

WIDEST_HEAD = 256
_LOG2E = 1.4426950408889634
_DELTA_ROWS = 32


def _columns(width: int) -> int:
    """The power of two that holds a head; the tensor cores take 16 at least."""
    if width > WIDEST_HEAD:
        raise ValueError(f"q: got heads of {width}, need at most {WIDEST_HEAD}")
    return max(16, triton.next_power_of_2(width))


def _readable(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where its rows cannot be read 16 bytes at a time and a copy's can.

    The loops over tiles read an operand once for each block of the other side: two bytes at a time
    that costs many copies. Also copied: a last stride other than 1 (the gradient of ``sum()`` is a
    scalar seen as a tensor), and rows so far apart that a tile of them passes 2³¹ elements.
    """
    size, (*outer, last) = x.element_size(), x.stride()
    whole = x.shape[-1] * size % 16 == 0
    aligned = x.data_ptr() % 16 == 0 and all(
        stride * size % 16 == 0 or x.shape[dim] <= 1 for dim, stride in enumerate(outer)
    )
    unit = last == 1 or x.shape[-1] == 1
    near = x.stride(1) * LARGEST_TILE < 2**31
    return x if unit and near and (aligned or not whole) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, row, head)."""
    return x.stride(0), x.stride(1), x.stride(2)


def _tma_strides(x: Tensor) -> list[int] | None:
    """The strides of ``x`` [B, S, H, E] for TMA; None where it cannot read ``x``."""
    if not reads_by_tma(capability_of(x.device)) or x.element_size() > 2 or x.numel() == 0:
        return None
    # The stride of a dimension of one element is never used, but it is checked.
    strides, dense = [1], x.shape[3]
    for dim in (2, 1, 0):
        strides.insert(0, x.stride(dim) if x.shape[dim] > 1 else -(-dense // 16) * 16)
        dense = strides[0] * x.shape[dim]
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in strides[:3])
    return strides if aligned else None


def _plan(
    which: str, columns: int, one: Tensor, other: Tensor
) -> tuple[Tiles, TensorDescriptor | None, TensorDescriptor | None]:
    """A pass's tiles, and descriptors of the two operands that it streams, where TMA reads both."""
    strides = _tma_strides(one), _tma_strides(other)
    if strides[0] is None or strides[1] is None:
        return tiles_for(which, columns, one.dtype, POINTERS), None, None
    tiles = tiles_for(which, columns, one.dtype, capability_of(one.device))
    block = [1, tiles.M if which == KEYS else tiles.N, 1, columns]
    first, second = (
        TensorDescriptor(x, list(x.shape), each, block)
        for x, each in zip((one, other), strides, strict=True)
    )
    return tiles, first, second


def _options(tiles: Tiles, width: int, columns: int) -> dict[str, Any]:
    options = {
        "E": width,
        "COLUMNS": columns,
        "M": tiles.M,
        "N": tiles.N,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return options if tiles.registers is None else {**options, "maxnreg": tiles.registers}


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale·q kᵀ) v over the first lengths[b] keys of each sample, and its log-sum-exp.

    Args:
        q: [B, Sq, H, E] with any strides and a unit last one, as k and v [B, Sk, H, E].
        k: Keys.
        v: Values.
        lengths: [B] int32, valid keys, clamped to 0..Sk; None where all are.
        scale: Of the scores.

    Returns:
        out [B, Sq, H, E], contiguous, in q's dtype; lse [B, H, Sq] float32, of natural base. A
        sample with no valid key has out 0 and lse -inf.

    Raises:
        ValueError: A head is wider than 256.
    """
    if scale < 0:  # the kernels take the maximum of the scores before they are scaled
        return attention_forward(-q, k, v, lengths, -scale)
    q, k, v = map(_readable, (q, k, v))
    batch, queries, heads, width = q.shape
    columns = _columns(width)
    tiles, k_tiles, v_tiles = _plan(FORWARD, columns, k, v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    blocks = triton.cdiv(queries, tiles.M)
    launch(
        attention_forward_kernel, (blocks * batch * heads,),
        q, *_strides(q), k, k_tiles, *_strides(k), v, v_tiles, *_strides(v), out, lse,
        None if lengths is None else lengths.contiguous(), scale * _LOG2E,
        queries, k.shape[1], heads, blocks,
        **_options(tiles, width, columns),
    )  # fmt: skip
    return out, lse


def _statistics(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor, int]:
    """(top, inverse, delta, padded): what a row's p and ds need; [B, H, padded] each.

    Padded so that no tile of queries ends early.
    """
    batch, queries, heads, width = q.shape
    columns = _columns(width)
    padded = triton.cdiv(queries, LARGEST_TILE) * LARGEST_TILE
    top, inverse, delta = q.new_empty((3, batch, heads, padded), dtype=torch.float32)
    if q.dtype != torch.float32:
        blocks = padded // _DELTA_ROWS
        launch(
            attention_delta_kernel, (blocks * batch * heads,),
            grad_out, *_strides(grad_out), out, lse, top, delta, padded, queries, heads, blocks,
            E=width, COLUMNS=columns, M=_DELTA_ROWS, num_warps=4,
        )  # fmt: skip
        return top, None, delta, padded
    tiles = tiles_for(QUERIES, columns, q.dtype, POINTERS)
    blocks = padded // tiles.M
    launch(
        attention_statistics_kernel, (blocks * batch * heads,),
        q, *_strides(q), k, *_strides(k), v, *_strides(v), grad_out, *_strides(grad_out),
        top, inverse, delta, padded, lengths, scale * _LOG2E, queries, k.shape[1], heads, blocks,
        **_options(tiles, width, columns),
    )  # fmt: skip
    return top, inverse, delta, padded


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in their operands' dtypes; the same bits every time.

    Args:
        grad_out: [B, Sq, H, E], the gradient of ``out``; any strides.
        q: As in the forward pass, like k, v, lengths and scale.
        k: Keys.
        v: Values.
        out: What the forward pass returned, contiguous.
        lse: Likewise.
        lengths: Rows of dk and dv beyond them are zero.
        scale: Of the scores.
    """
    if scale < 0:
        dq, dk, dv = attention_backward(grad_out, -q, k, v, out, lse, lengths, -scale)
        return dq.neg_(), dk, dv
    grad_out, q, k, v = map(_readable, (grad_out, q, k, v))
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    columns = _columns(width)
    lengths = None if lengths is None else lengths.contiguous()
    statistics = _statistics(grad_out, q, k, v, out, lse, lengths, scale)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    common = (lengths, scale, scale * _LOG2E, queries, keys, heads)

    tiles, q_tiles, g_tiles = _plan(KEYS, columns, q, grad_out)
    blocks = triton.cdiv(keys, tiles.N)
    launch(
        attention_backward_keys_kernel, (blocks * batch * heads,),
        q, q_tiles, *_strides(q), k, *_strides(k), v, *_strides(v),
        grad_out, g_tiles, *_strides(grad_out), *statistics, dk, dv,
        *common, blocks,
        **_options(tiles, width, columns),
    )  # fmt: skip

    tiles, k_tiles, v_tiles = _plan(QUERIES, columns, k, v)
    blocks = triton.cdiv(queries, tiles.M)
    launch(
        attention_backward_queries_kernel, (blocks * batch * heads,),
        q, *_strides(q), k, k_tiles, *_strides(k), v, v_tiles, *_strides(v),
        grad_out, *_strides(grad_out), *statistics, dq,
        *common, blocks,
        **_options(tiles, width, columns),
    )  # fmt: skip
    return dq, dk, dv
