"""Triton kernels of the modulate family.

    h = residual + gate·branch          (where gated; else h is the input)
    y = (xhat·weight + bias)·(1 + scale) + shift,   xhat = (h - mean)·rstd

A row is read as two power-of-two parts (``SECOND`` is 0 where the first covers it), so kernels are
written as functions of one part. An absent operand is None. Strides of 0 broadcast.
"""

# mypy: ignore-errors
# Triton kernels are another language in Python's clothes.

from __future__ import annotations

import triton
import triton.language as tl

_VARYING = ["rows", "total_rows", "chunks"]


@triton.jit
def _at(pointer, batch_stride, row_stride, b, s):
    """The row of an operand; ``b`` and ``s`` are int64: a tensor may pass 2³¹ elements."""
    return pointer + b * batch_stride + s * row_stride


@triton.jit
def _load(row, column, columns):
    return tl.load(row + column, mask=column < columns, other=0.0).to(tl.float32)


@triton.jit
def _h_part(x_row, branch_row, gate_row, h_row, column, columns, STORE: tl.constexpr):
    """One part of h, rounded as it is stored: the norm is of what the next reader sees."""
    value = _load(x_row, column, columns)
    if gate_row is not None:
        value += _load(gate_row, column, columns) * _load(branch_row, column, columns)
        value = value.to(h_row.dtype.element_ty)
        if STORE:
            tl.store(h_row + column, value, mask=column < columns)
        value = value.to(tl.float32)
    return value


@triton.jit
def _square_sum(h, mean, column, columns):
    centred = tl.where(column < columns, h - mean, 0.0)
    return tl.sum(centred * centred, axis=0)


@triton.jit
def _store_y(
    h, mean, rstd, shift_row, scale_row, weight, bias, y_row, column, columns
):  # fmt: skip
    y = (h - mean) * rstd
    if weight is not None:
        y *= _load(weight, column, columns)
    if bias is not None:
        y += _load(bias, column, columns)
    if scale_row is not None:
        y *= 1.0 + _load(scale_row, column, columns)
    if shift_row is not None:
        y += _load(shift_row, column, columns)
    tl.store(y_row + column, y, mask=column < columns)


@triton.jit(do_not_specialize=_VARYING)
def norm_forward_kernel(
    x, x_batch, x_row, branch, branch_batch, branch_row, gate, gate_batch, gate_row, h,
    shift, shift_batch, shift_row, scale, scale_batch, scale_row, weight, bias, y, mean, rstd,
    rows, columns, eps,
    RMS: tl.constexpr,
    STATISTICS_GIVEN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """h = x + gate·branch (where gated), y = (xhat·weight + bias)·(1 + scale) + shift (if asked).

    Program (row, tile of columns). Reads x (and branch) and writes y (and h) once each, in the
    operands' dtypes; the modulation rows [B, D] stay in cache; 8 bytes of statistics a row.
    Variance is the mean of squares of the centred row, which is in registers.
    """
    index = tl.program_id(0).to(tl.int64)
    b, s = index // rows, index % rows
    start = tl.program_id(1) * FIRST
    x_at = _at(x, x_batch, x_row, b, s)
    branch_at = None if branch is None else _at(branch, branch_batch, branch_row, b, s)
    gate_at = None if gate is None else _at(gate, gate_batch, gate_row, b, s)
    h_at = None if h is None else h + index * columns
    first = start + tl.arange(0, FIRST)
    h_first = _h_part(x_at, branch_at, gate_at, h_at, first, columns, True)
    if SECOND > 0:
        second = FIRST + tl.arange(0, SECOND)
        h_second = _h_part(x_at, branch_at, gate_at, h_at, second, columns, True)
    if y is not None:
        mean_value = 0.0
        if STATISTICS_GIVEN:
            if not RMS:
                mean_value = tl.load(mean + index)
            rstd_value = tl.load(rstd + index)
        else:
            if not RMS:
                mean_value = tl.sum(h_first, axis=0)
                if SECOND > 0:
                    mean_value += tl.sum(h_second, axis=0)
                mean_value = mean_value / columns
                tl.store(mean + index, mean_value)
            variance = _square_sum(h_first, mean_value, first, columns)
            if SECOND > 0:
                variance += _square_sum(h_second, mean_value, second, columns)
            rstd_value = 1.0 / tl.sqrt_rn(variance / columns + eps)
            tl.store(rstd + index, rstd_value)
        shift_at = None if shift is None else _at(shift, shift_batch, shift_row, b, s)
        scale_at = None if scale is None else _at(scale, scale_batch, scale_row, b, s)
        y_at = y + index * columns
        _store_y(
            h_first, mean_value, rstd_value, shift_at, scale_at, weight, bias, y_at, first, columns
        )  # fmt: skip
        if SECOND > 0:
            _store_y(
                h_second, mean_value, rstd_value, shift_at, scale_at, weight, bias, y_at, second,
                columns,
            )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def norm_statistics_kernel(
    x, x_batch, x_row, branch, branch_batch, branch_row, gate, gate_batch, gate_row, h, mean, rstd,
    rows, columns, eps,
    RMS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """mean and rstd of h for a row too wide for registers: read twice, then from cache."""
    index = tl.program_id(0).to(tl.int64)
    b, s = index // rows, index % rows
    x_at = _at(x, x_batch, x_row, b, s)
    branch_at = None if branch is None else _at(branch, branch_batch, branch_row, b, s)
    gate_at = None if gate is None else _at(gate, gate_batch, gate_row, b, s)
    mean_value = 0.0
    if not RMS:
        total = tl.zeros((FIRST,), tl.float32)
        for start in range(0, columns, FIRST):
            column = start + tl.arange(0, FIRST)
            total += _h_part(x_at, branch_at, gate_at, h, column, columns, False)
        mean_value = tl.sum(total, axis=0) / columns
        tl.store(mean + index, mean_value)
    squares = tl.zeros((FIRST,), tl.float32)
    for start in range(0, columns, FIRST):
        column = start + tl.arange(0, FIRST)
        value = _h_part(x_at, branch_at, gate_at, h, column, columns, False)
        centred = tl.where(column < columns, value - mean_value, 0.0)
        squares += centred * centred
    tl.store(rstd + index, 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / columns + eps))


@triton.jit
def _scaled_part(grad_row, scale_row, weight, column, columns):
    """g and g·m, m = weight·(1 + scale): what reaches xhat."""
    g = _load(grad_row, column, columns)
    scaled = g
    if scale_row is not None:
        scaled *= 1.0 + _load(scale_row, column, columns)
    return g, scaled if weight is None else scaled * _load(weight, column, columns)


@triton.jit
def _xhat_part(h_row, mean, rstd, column, columns):
    """xhat, 0 beyond the row."""
    h = tl.load(h_row + column, mask=column < columns, other=0.0).to(tl.float32)
    return tl.where(column < columns, (h - mean) * rstd, 0.0)


@triton.jit
def _store(pointer, index, columns, column, value):
    tl.store(pointer + index * columns + column, value, mask=column < columns)


@triton.jit
def _gated_part(
    total, index, branch_row, gate_row, grad_input, grad_branch, sink_gate, gate_sum, column,
    columns, GATE_SINK_PER_ROW: tl.constexpr,
):  # fmt: skip
    """Everything that follows from the gradient of h: of the residual, the branch and the gate."""
    if grad_input is not None:
        _store(grad_input, index, columns, column, total)
    if grad_branch is not None:
        _store(grad_branch, index, columns, column, total * _load(gate_row, column, columns))
    if sink_gate is not None:
        product = total * _load(branch_row, column, columns)
        if GATE_SINK_PER_ROW:
            _store(sink_gate, index, columns, column, product)
        else:
            gate_sum += product
    return gate_sum


@triton.jit
def _modulation_part(
    g, xhat, index, scale_row, weight, bias, sink_shift, sink_scale, sums, column, columns,
    SCALE_PER_ROW: tl.constexpr,
    SHIFT_SINK_PER_ROW: tl.constexpr,
):  # fmt: skip
    """Adds a row to the sums (of g, of f and of f·xhat) that the operands' gradients are made of.

    f is g where scale is one row for the chunk, g·(1 + scale) where it has one for each row; then
    the gradient of scale is not a sum, and is stored here.
    """
    sum_g, sum_f, sum_fx = sums
    f = g
    if SCALE_PER_ROW:
        if sink_scale is not None:
            normed = xhat if weight is None else xhat * _load(weight, column, columns)
            normed = normed if bias is None else normed + _load(bias, column, columns)
            _store(sink_scale, index, columns, column, g * normed)
        f = g * (1.0 + _load(scale_row, column, columns))
    if sink_shift is not None:
        if SHIFT_SINK_PER_ROW:
            _store(sink_shift, index, columns, column, g)
        else:
            sum_g += g
    return sum_g, sum_f + f, sum_fx + f * xhat


@triton.jit
def _store_sums(
    chunk, scale_row, weight, bias, sink_shift, sink_scale, sink_weight, sink_bias, sums, column,
    columns,
    SCALE_PER_ROW: tl.constexpr,
    SHIFT_SINK_PER_ROW: tl.constexpr,
):  # fmt: skip
    """One partial row for each gradient that is a sum over the chunk's rows."""
    sum_g, sum_f, sum_fx = sums
    if sink_shift is not None:
        if not SHIFT_SINK_PER_ROW:
            _store(sink_shift, chunk, columns, column, sum_g)
    if sink_scale is not None:
        if not SCALE_PER_ROW:
            value = sum_fx if weight is None else sum_fx * _load(weight, column, columns)
            value = value if bias is None else value + sum_f * _load(bias, column, columns)
            _store(sink_scale, chunk, columns, column, value)
    if not SCALE_PER_ROW:
        if scale_row is not None:
            one_plus_scale = 1.0 + _load(scale_row, column, columns)
            sum_f *= one_plus_scale
            sum_fx *= one_plus_scale
    if sink_weight is not None:
        _store(sink_weight, chunk, columns, column, sum_fx)
    if sink_bias is not None:
        _store(sink_bias, chunk, columns, column, sum_f)


@triton.jit(do_not_specialize=_VARYING)
def norm_backward_sums_kernel(
    grad_y, grad_batch, grad_row, h, h_batch, h_row, scale, scale_batch, scale_row, weight,
    mean, rstd, sums, total_rows, rows, columns,
    RMS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """The row sums of the backward pass (below) for a row too wide for registers."""
    index = tl.program_id(0).to(tl.int64)
    b, s = index // rows, index % rows
    grad_at = _at(grad_y, grad_batch, grad_row, b, s)
    h_at = _at(h, h_batch, h_row, b, s)
    scale_at = None if scale is None else _at(scale, scale_batch, scale_row, b, s)
    mean_value = 0.0 if RMS else tl.load(mean + index)
    rstd_value = tl.load(rstd + index)
    plain = tl.zeros((FIRST,), tl.float32)
    along = tl.zeros((FIRST,), tl.float32)
    for start in range(0, columns, FIRST):
        column = start + tl.arange(0, FIRST)
        _, scaled = _scaled_part(grad_at, scale_at, weight, column, columns)
        plain += scaled
        along += scaled * _xhat_part(h_at, mean_value, rstd_value, column, columns)
    tl.store(sums + index, tl.sum(plain, axis=0))
    tl.store(sums + total_rows + index, tl.sum(along, axis=0))


# With g = grad_y, m = weight·(1 + scale), xhat = (h - mean)·rstd, means over the row's D elements:
#
#   y = m·xhat + …, xhat a function of h:  d xhat_i/d h_j = rstd·(δ_ij - 1/D - xhat_i·xhat_j/D)
#   t = grad_h + rstd·(g·m - mean(g·m) - xhat·mean(g·m·xhat))      [mean(g·m) is absent in RMSNorm]
#   grad_input (residual) = t,    grad_branch = gate·t,    grad_gate = Σ branch·t
#   grad_shift = Σ g,             grad_scale = Σ g·(xhat·weight + bias)
#   grad_bias = Σ g·(1 + scale),  grad_weight = Σ g·(1 + scale)·xhat
#
# where Σ runs over the rows that share the operand's row. With f = g (scale one row for the chunk)
# Σf and Σf·xhat give all four; with a scale for each row, f = g·(1 + scale) and Σg is a third sum.
@triton.jit(do_not_specialize=_VARYING)
def norm_backward_kernel(
    grad_y, grad_batch, grad_row, h, h_batch, h_row, scale, scale_batch, scale_row, weight,
    mean, rstd, bias,
    grad_h, grad_h_batch, grad_h_row, branch, branch_batch, branch_row, gate, gate_batch, gate_row,
    sums, grad_input, grad_branch, sink_gate, sink_shift, sink_scale, sink_weight, sink_bias,
    total_rows, rows, columns, chunks,
    ROWS: tl.constexpr,
    SCALE_PER_ROW: tl.constexpr,
    GATE_SINK_PER_ROW: tl.constexpr,
    SHIFT_SINK_PER_ROW: tl.constexpr,
    RMS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of h, residual, branch, gate, shift, scale, weight and bias: those with a pointer.

    Program (chunk of ROWS rows of one sample, tile of columns). Reads grad_y, h (grad_h, branch)
    and writes grad_input (grad_branch) once each; one float32 row for each chunk and sum, which
    _reduce_partials_kernel adds in a fixed order.
    """
    chunk = tl.program_id(0).to(tl.int64)
    b = chunk // chunks
    start = tl.program_id(1) * FIRST
    first = start + tl.arange(0, FIRST)
    second = FIRST + tl.arange(0, SECOND if SECOND > 0 else 1)
    zeros = tl.zeros((FIRST,), tl.float32)
    gate_sum, sums_first = zeros, (zeros, zeros, zeros)
    zeros = tl.zeros((SECOND if SECOND > 0 else 1,), tl.float32)
    gate_sum_second, sums_second = zeros, (zeros, zeros, zeros)
    first_row = (chunk % chunks) * ROWS
    # Counted in 32 bits: with 64 ptxas spills an address or two.
    count = tl.minimum(rows - first_row, ROWS).to(tl.int32)
    for step in tl.range(0, count, num_stages=STAGES):
        s = first_row + step
        index = b * rows + s
        t_first = tl.zeros((FIRST,), tl.float32)
        t_second = zeros
        if grad_h is not None:
            grad_h_at = _at(grad_h, grad_h_batch, grad_h_row, b, s)
            t_first = _load(grad_h_at, first, columns)
            if SECOND > 0:
                t_second = _load(grad_h_at, second, columns)
        if grad_y is not None:
            grad_at = _at(grad_y, grad_batch, grad_row, b, s)
            h_at = _at(h, h_batch, h_row, b, s)
            scale_at = None if scale is None else _at(scale, scale_batch, scale_row, b, s)
            mean_value = 0.0 if RMS else tl.load(mean + index)
            rstd_value = tl.load(rstd + index)
            g, scaled = _scaled_part(grad_at, scale_at, weight, first, columns)
            xhat = _xhat_part(h_at, mean_value, rstd_value, first, columns)
            sums_first = _modulation_part(
                g, xhat, index, scale_at, weight, bias, sink_shift, sink_scale, sums_first, first,
                columns, SCALE_PER_ROW, SHIFT_SINK_PER_ROW,
            )  # fmt: skip
            if SECOND > 0:
                g, scaled_second = _scaled_part(grad_at, scale_at, weight, second, columns)
                xhat_second = _xhat_part(h_at, mean_value, rstd_value, second, columns)
                sums_second = _modulation_part(
                    g, xhat_second, index, scale_at, weight, bias, sink_shift, sink_scale,
                    sums_second, second, columns, SCALE_PER_ROW, SHIFT_SINK_PER_ROW,
                )  # fmt: skip
            if sums is None:
                plain = tl.sum(scaled, axis=0)
                along = tl.sum(scaled * xhat, axis=0)
                if SECOND > 0:
                    plain += tl.sum(scaled_second, axis=0)
                    along += tl.sum(scaled_second * xhat_second, axis=0)
            else:
                plain = tl.load(sums + index)
                along = tl.load(sums + total_rows + index)
            plain = 0.0 if RMS else plain / columns
            along = along / columns
            t_first += rstd_value * (scaled - plain - xhat * along)
            if SECOND > 0:
                t_second += rstd_value * (scaled_second - plain - xhat_second * along)
        branch_at = None if branch is None else _at(branch, branch_batch, branch_row, b, s)
        gate_at = None if gate is None else _at(gate, gate_batch, gate_row, b, s)
        gate_sum = _gated_part(
            t_first, index, branch_at, gate_at, grad_input, grad_branch, sink_gate, gate_sum,
            first, columns, GATE_SINK_PER_ROW,
        )  # fmt: skip
        if SECOND > 0:
            gate_sum_second = _gated_part(
                t_second, index, branch_at, gate_at, grad_input, grad_branch, sink_gate,
                gate_sum_second, second, columns, GATE_SINK_PER_ROW,
            )  # fmt: skip
    scale_at = None if scale is None else _at(scale, scale_batch, scale_row, b, first_row)
    if sink_gate is not None:
        if not GATE_SINK_PER_ROW:
            _store(sink_gate, chunk, columns, first, gate_sum)
            if SECOND > 0:
                _store(sink_gate, chunk, columns, second, gate_sum_second)
    if grad_y is not None:
        _store_sums(
            chunk, scale_at, weight, bias, sink_shift, sink_scale, sink_weight, sink_bias,
            sums_first, first, columns, SCALE_PER_ROW, SHIFT_SINK_PER_ROW,
        )  # fmt: skip
        if SECOND > 0:
            _store_sums(
                chunk, scale_at, weight, bias, sink_shift, sink_scale, sink_weight, sink_bias,
                sums_second, second, columns, SCALE_PER_ROW, SHIFT_SINK_PER_ROW,
            )  # fmt: skip
