"""Launchers of the modulate family's Triton kernels.

A row that fits the registers is held whole by one program, as two power-of-two parts. A wider one
is cut into tiles of one part; its sums are then taken by a kernel of their own, before.
"""

from __future__ import annotations

import torch
import triton

from flowkernels.ops._triton import Partials, launch, per_row, row_strides, split_row, warps_for
from flowkernels.ops.modulate._device import (
    norm_backward_kernel,
    norm_backward_sums_kernel,
    norm_forward_kernel,
    norm_statistics_kernel,
)
from flowkernels.ops.modulate._operators import gradients_like, statistics
from flowkernels.ops.modulate.reference import promoted

Tensor = torch.Tensor

# The widest row that one program holds without spilling, by ptxas for sm_80, sm_90 and sm_100:
# forward; backward; backward of mixed dtypes, of a scale with a row for each row of x, and of rows
# that are not read 16 bytes at a time.
FORWARD_WIDEST = 16384
BACKWARD_WIDEST = 6144
BACKWARD_WIDEST_MIXED = 4096
WIDE_TILE = 2048
# Registers of a thread: these leave a multiprocessor room for 32 warps in the forward pass, 12 or
# 16 in the backward pass. Left to itself ptxas may aim at fewer than a row needs, and spill.
FORWARD_REGISTERS = 64
BACKWARD_REGISTERS, BACKWARD_REGISTERS_SMALL = 128, 168
# Rows in flight in the backward pass: with two, the next row is on its way to shared memory while
# one is summed. One until a GPU has shown the gain (bench.tune).
BACKWARD_STAGES = 1


def _parts(columns: int, widest: int) -> tuple[int, int, int]:
    """(first part, second part, tiles) of a row."""
    if columns <= widest:
        return *split_row(columns), 1
    return WIDE_TILE, 0, triton.cdiv(columns, WIDE_TILE)


def _narrow(operand: Tensor) -> bool:
    """Whether some row of a view starts where a load of 16 bytes may not."""
    size = operand.element_size()
    places = (operand.data_ptr(), *(stride * size for stride in operand.stride()[:-1]))
    return any(place % 16 for place in places)


def _backward_options(
    columns: int, rms: bool, scale: Tensor | None, *operands: Tensor | None
) -> tuple[dict[str, int | bool], int]:
    """(what the backward kernels are compiled with, tiles)."""
    present = [operand for operand in (scale, *operands) if operand is not None]
    mixed = len({operand.dtype for operand in present}) > 1
    narrow = columns > 2048 and any(map(_narrow, present))
    widest = BACKWARD_WIDEST_MIXED if mixed or narrow or per_row(scale) else BACKWARD_WIDEST
    first, second, tiles = _parts(columns, widest)
    warps = warps_for(first, present[-1].element_size())
    if narrow and first + second > 2560:  # more loads in flight, more registers
        warps = 16
    options = {"RMS": rms, "FIRST": first, "SECOND": second, "num_warps": warps}
    options["maxnreg"] = BACKWARD_REGISTERS_SMALL if warps <= 4 else BACKWARD_REGISTERS
    return options, tiles


def _rows_per_chunk(batch: int, rows: int) -> int:
    """Rows whose partial sums share one float32 row.

    Enough chunks to fill a GPU (some 512), and as few partial rows as that allows. A function of
    the shape alone, so results repeat on any device.
    """
    wanted = batch * rows // 512
    return max(4, min(32, 1 << max(wanted, 1).bit_length() - 1))


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    h: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rms: bool,
    eps: float,
) -> None:
    batch, rows, columns = x.shape
    first, second, tiles = _parts(columns, FORWARD_WIDEST)
    inputs = (x, *row_strides(x), branch, *row_strides(branch), gate, *row_strides(gate))
    options = {
        "RMS": rms,
        "FIRST": first,
        "SECOND": second,
        "num_warps": warps_for(first, x.element_size(), most=32),
        "maxnreg": FORWARD_REGISTERS,
    }
    mean = None if rms else mean
    wide = tiles > 1 and y is not None
    if wide:
        launch(
            norm_statistics_kernel, (batch * rows,), *inputs, h, mean, rstd, rows, columns, eps,
            **options,
        )  # fmt: skip
    launch(
        norm_forward_kernel, (batch * rows, tiles),
        *inputs, h, shift, *row_strides(shift), scale, *row_strides(scale), weight, bias, y,
        mean, rstd, rows, columns, eps, STATISTICS_GIVEN=wide, **options,
    )  # fmt: skip


def modulated_norm_forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=promoted(x, shift, scale, weight, bias))
    mean, rstd = statistics(x, rms)
    _forward(x, None, None, None, shift, scale, weight, bias, y, mean, rstd, rms, eps)
    return y, mean, rstd


def gated_residual_forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    h = x.new_empty(x.shape, dtype=promoted(residual, x, gate))
    _forward(residual, x, gate, h, None, None, None, None, None, None, None, True, 0.0)
    return h


def gated_residual_norm_forward(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x.new_empty(x.shape, dtype=promoted(residual, x, gate))
    y = x.new_empty(x.shape, dtype=promoted(h, shift, scale))
    mean, rstd = statistics(x, rms)
    _forward(residual, x, gate, h, shift, scale, None, None, y, mean, rstd, rms, eps)
    return h, y, mean, rstd


def _backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    rms: bool,
    gradients: dict[str, Tensor],
) -> None:
    """Write every gradient in ``gradients``: full ones straight, sums by way of partial rows."""
    some = branch if h is None else h
    assert some is not None
    batch, rows, columns = some.shape
    options, tiles = _backward_options(columns, rms, scale, grad_y, grad_h, gate, branch, h)
    per_chunk = _rows_per_chunk(batch, rows)
    chunks = triton.cdiv(rows, per_chunk)
    mean = None if rms else mean
    normed = (
        grad_y, *row_strides(grad_y), h, *row_strides(h), scale, *row_strides(scale), weight,
        mean, rstd,
    )  # fmt: skip
    sums = None
    if tiles > 1 and grad_y is not None:
        sums = some.new_empty((2, batch * rows), dtype=torch.float32)
        launch(
            norm_backward_sums_kernel, (batch * rows,), *normed, sums, batch * rows, rows, columns,
            **options,
        )  # fmt: skip
    partials = Partials(batch, rows, columns, chunks, some)
    names = ("gate", "shift", "scale", "weight", "bias")
    launch(
        norm_backward_kernel, (batch * chunks, tiles),
        *normed, bias, grad_h, *row_strides(grad_h), branch, *row_strides(branch),
        gate, *row_strides(gate), sums, gradients.get("input"), gradients.get("branch"),
        *(partials.sink(gradients.get(name)) for name in names),
        batch * rows, rows, columns, chunks,
        ROWS=per_chunk,
        SCALE_PER_ROW=per_row(scale),
        GATE_SINK_PER_ROW=per_row(gate),
        SHIFT_SINK_PER_ROW=per_row(gradients.get("shift")),
        STAGES=BACKWARD_STAGES,
        **options,
    )  # fmt: skip
    partials.reduce()


def _wanted(names: tuple[str, ...], wanted: int, *operands: Tensor | None) -> dict[str, Tensor]:
    """Empty gradients by name, in the operator's order, for the operands whose bit is set."""
    chosen = [
        name
        for bit, (name, operand) in enumerate(zip(names, operands, strict=True))
        if operand is not None and wanted >> bit & 1
    ]
    return dict(zip(chosen, gradients_like(wanted, *operands), strict=True))


def modulated_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    wanted: int,
) -> list[Tensor]:
    names = ("input", "shift", "scale", "weight", "bias")
    gradients = _wanted(names, wanted, x, shift, scale, weight, bias)
    _backward(grad_y, None, x, None, None, scale, weight, bias, mean, rstd, rms, gradients)
    return list(gradients.values())


def gated_residual_backward(
    grad_h: Tensor, residual: Tensor, x: Tensor, gate: Tensor, wanted: int
) -> list[Tensor]:
    gradients = _wanted(("input", "branch", "gate"), wanted, residual, x, gate)
    _backward(None, grad_h, None, x, gate, None, None, None, None, None, True, gradients)
    return list(gradients.values())


def gated_residual_norm_backward(
    grad_h: Tensor | None,
    grad_y: Tensor,
    h: Tensor,
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    wanted: int,
) -> list[Tensor]:
    names = ("input", "branch", "gate", "shift", "scale")
    gradients = _wanted(names, wanted, residual, x, gate, shift, scale)
    _backward(grad_y, grad_h, h, x, gate, scale, None, None, mean, rstd, rms, gradients)
    return list(gradients.values())
