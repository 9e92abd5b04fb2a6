"""Triton kernels of the activation family, and their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flowkernels.ops._triton import Partials, launch

Tensor = torch.Tensor

# √(2/π) and its product with 0.044715: the tanh form of GELU.
_SLOPE = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.035677408136300125)

# Elements of a tile: 8 for each thread of 4 warps.
_TILE = 1024


def _leading(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, inner, outer stride, inner stride) of the dimensions before the last."""
    if x.dim() == 1:
        return 1, 1, 0, 0
    if x.dim() == 2:
        return 1, x.shape[0], 0, x.stride(0)
    return x.shape[0], x.shape[1], x.stride(0), x.stride(1)


def _tile(columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile."""
    block = min(_TILE, triton.next_power_of_2(max(columns, 1)))
    return _TILE // block, block


@triton.jit
def _row_offsets(row, inner, outer_stride, inner_stride):
    """Offset of each row's first element; `row` counts over both leading dimensions."""
    row = row.to(tl.int64)
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _sigmoid(z):
    """sigmoid(z) = 1/(1 + e) with e = exp(-z), and its slope s(1 - s) = e·s².

    1 - s would lose its digits where s is near 1. The bound keeps e finite: s is 0 by then.
    """
    e = tl.exp(tl.minimum(-z, 80.0))
    s = 1.0 / (1.0 + e)
    return s, e * s * s


@triton.jit
def _logit(u):
    """The gate of GELU is ½(1 + tanh z) = sigmoid(2z), z = au + bu³: 2z and its derivative."""
    return 2.0 * u * (_SLOPE + _CUBIC * u * u), 2.0 * (_SLOPE + 3.0 * _CUBIC * u * u)


@triton.jit(do_not_specialize=["rows", "inner"])
def _gelu_tanh_forward_kernel(
    x, bias, y, rows, inner, columns, x_outer, x_inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y = u·½(1 + tanh(√(2/π)(u + 0.044715u³))), u = x + bias.

    Reads x and writes y once; bias stays in cache.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = _row_offsets(row, inner, x_outer, x_inner)[:, None] + column[None, :]
    u = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        u += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    logit, _ = _logit(u)
    gate, _ = _sigmoid(logit)
    tl.store(y + row.to(tl.int64)[:, None] * columns + column[None, :], u * gate, mask=mask)


# With s = ½(1 + tanh z) = sigmoid(2z), z = au + bu³ and y = u·s:
#   dy/du = s + u·ds/du = s + u·s(1 - s)·2z',   z' = a + 3bu²
# so grad_x = grad·dy/du and grad_bias = the sum of grad_x over rows. At the tails s(1 - s) is 0
# before u·z' is large: no overflow for |u| < 1e12.
@triton.jit(do_not_specialize=["rows", "inner"])
def _gelu_tanh_backward_kernel(
    grad, x, bias, grad_x, sink_bias,
    rows, inner, columns, grad_outer, grad_inner, x_outer, x_inner,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x = grad·(s + 2u·s(1-s)·z'); one partial row of its sum for each chunk of rows.

    Reads grad and x, writes grad_x once each; one float32 row more for ROWS·TILES rows.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = _row_offsets(row, inner, x_outer, x_inner)[:, None] + column[None, :]
        u = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            u += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        offsets = _row_offsets(row, inner, grad_outer, grad_inner)[:, None] + column[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        logit, logit_slope = _logit(u)
        gate, gate_slope = _sigmoid(logit)
        g = g * (gate + u * gate_slope * logit_slope)
        if grad_x is not None:
            target = grad_x + row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(target, g, mask=mask)
        total += tl.where(mask, g, 0.0)
    if sink_bias is not None:
        target = sink_bias + tl.program_id(0).to(tl.int64) * columns + column
        tl.store(target, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["rows", "inner"])
def _swiglu_forward_kernel(
    x, y, rows, inner, half, x_outer, x_inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y = a·sigmoid(a)·b, (a, b) the halves of x. Reads x and writes y (half its size) once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < half)[None, :]
    source = x + _row_offsets(row, inner, x_outer, x_inner)[:, None] + column[None, :]
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = y + row.to(tl.int64)[:, None] * half + column[None, :]
    s, _ = _sigmoid(a)
    tl.store(target, a * s * b, mask=mask)


# With s = sigmoid(a) and y = a·s·b:
#   dy/da = b·(s + a·s(1 - s)),   dy/db = a·s
@triton.jit(do_not_specialize=["rows", "inner"])
def _swiglu_backward_kernel(
    grad, x, grad_x, rows, inner, half, grad_outer, grad_inner, x_outer, x_inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_a = grad·b·(s + a·s(1-s)), grad_b = grad·a·s. Reads grad and x, writes grad_x once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < half)[None, :]
    source = x + _row_offsets(row, inner, x_outer, x_inner)[:, None] + column[None, :]
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    source = grad + _row_offsets(row, inner, grad_outer, grad_inner)[:, None] + column[None, :]
    g = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    s, s_slope = _sigmoid(a)
    target = grad_x + row.to(tl.int64)[:, None] * (2 * half) + column[None, :]
    tl.store(target, g * b * (s + a * s_slope), mask=mask)
    tl.store(target + half, g * a * s, mask=mask)


def gelu_tanh_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    outer, inner, *strides = _leading(x)
    columns = x.shape[-1]
    tile_rows, tile_columns = _tile(columns)
    launch(
        _gelu_tanh_forward_kernel,
        (triton.cdiv(outer * inner, tile_rows), triton.cdiv(columns, tile_columns)),
        x, bias, y, outer * inner, inner, columns, *strides,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=4,
    )  # fmt: skip
    return y


def gelu_tanh_backward(grad: Tensor, x: Tensor, bias: Tensor | None, wanted: int) -> list[Tensor]:
    grad_x = x.new_empty(x.shape) if wanted & 1 else None
    grad_bias = bias.new_empty(bias.shape) if bias is not None and wanted & 2 else None
    outer, inner, *strides = _leading(x)
    rows, columns = outer * inner, x.shape[-1]
    tile_rows, tile_columns = _tile(columns)
    # A chunk of 32 rows or more where their sum is wanted; a tile alone where it is not.
    tiles = 1 if grad_bias is None else triton.cdiv(32, tile_rows)
    chunks = triton.cdiv(rows, tile_rows * tiles)
    partials = Partials(1, rows, columns, chunks, x)
    launch(
        _gelu_tanh_backward_kernel,
        (chunks, triton.cdiv(columns, tile_columns)),
        grad, x, bias, grad_x, partials.sink(grad_bias),
        rows, inner, columns, *_leading(grad)[2:], *strides,
        TILES=tiles, ROWS=tile_rows, COLUMNS=tile_columns, num_warps=4,
    )  # fmt: skip
    partials.reduce()
    return [gradient for gradient in (grad_x, grad_bias) if gradient is not None]


def swiglu_forward(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], half))
    outer, inner, *strides = _leading(x)
    tile_rows, tile_columns = _tile(half)
    launch(
        _swiglu_forward_kernel,
        (triton.cdiv(outer * inner, tile_rows), triton.cdiv(half, tile_columns)),
        x, y, outer * inner, inner, half, *strides,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=4,
    )  # fmt: skip
    return y


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    grad_x = x.new_empty(x.shape)
    outer, inner, *strides = _leading(x)
    tile_rows, tile_columns = _tile(half)
    launch(
        _swiglu_backward_kernel,
        (triton.cdiv(outer * inner, tile_rows), triton.cdiv(half, tile_columns)),
        grad, x, grad_x, outer * inner, inner, half, *_leading(grad)[2:], *strides,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=4,
    )  # fmt: skip
    return grad_x
