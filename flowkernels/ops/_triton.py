"""What every family's Triton kernels share. Imported by ``kernels.py`` modules alone, lazily.

``launch`` is the one way to start a kernel: it skips empty grids, selects the device, and can be
intercepted (:func:`intercepted`), which is how kernels are compiled ahead of time: launchers run on
meta tensors and every kernel, signature and option that they would launch is seen. Where the choice
of a kernel's options depends on the chip, :func:`capability_of` says which, and
:func:`compiling_for` what it says where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor

_interceptor: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] | None = None


@contextmanager
def intercepted(
    callback: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Inside, ``launch`` calls ``callback(kernel, grid, args, options)`` and starts nothing."""
    global _interceptor
    previous, _interceptor = _interceptor, callback
    try:
        yield
    finally:
        _interceptor = previous


# Of tensors on no GPU: the oldest chip served, whose kernels run on all.
_compiled_for = 80


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Inside, launchers choose for this compute capability (90: Hopper) on meta and CPU tensors."""
    global _compiled_for
    previous, _compiled_for = _compiled_for, capability
    try:
        yield
    finally:
        _compiled_for = previous


def capability_of(device: torch.device) -> int:
    """The compute capability 10·major + minor of a device."""
    if device.type != "cuda":
        return _compiled_for
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start ``kernel`` on the device of its first tensor; nothing where the grid is empty.

    Args:
        kernel: A ``triton.jit`` function.
        grid: Programs along each axis.
        *args: Run-time arguments, in the kernel's order; an absent operand is None.
        **options: The constexpr arguments by name, ``num_warps`` and ``num_stages``.
    """
    if _interceptor is not None:
        _interceptor(kernel, grid, args, options)
        return
    if 0 in grid:
        return
    device = next(arg for arg in args if isinstance(arg, Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def split_row(columns: int) -> tuple[int, int]:
    """A row as two power-of-two parts: the largest one that fits, and what covers the rest.

    2432 = 2048 + 384 is read as 2048 + 512: 5 % of the lanes idle, where one part of 4096 would
    idle 41 %. The second part is 0 where the first covers the row.
    """
    first = 1 << (max(columns, 1).bit_length() - 1)
    rest = columns - first
    return first, triton.next_power_of_2(rest) if rest > 0 else 0


def warps_for(elements: int, itemsize: int, most: int = 16) -> int:
    """Warps that leave each thread one load of 16 bytes for each tensor."""
    return max(1, min(most, triton.next_power_of_2(elements) * itemsize // (32 * 16)))


def row_strides(operand: Tensor | None) -> tuple[int, int]:
    """(batch stride, row stride) of an operand [D], [B, D] or [B, S, D]; 0 where it broadcasts."""
    if operand is None:
        return 0, 0
    dim = operand.dim()
    batch = operand.stride(0) if dim >= 2 and operand.shape[0] != 1 else 0
    row = operand.stride(1) if dim == 3 and operand.shape[1] != 1 else 0
    return batch, row


def per_row(operand: Tensor | None) -> bool:
    """Whether an operand [D], [B, D] or [B, S, D] has a row of its own for each row of a sample."""
    return operand is not None and operand.dim() == 3 and operand.shape[1] != 1


class Partials:
    """The second stage of a deterministic reduction: gradients that are sums of partial rows.

    The first stage writes float32 rows ``partial[batch, chunk]``; :meth:`reduce` adds, for each
    registered gradient, those that fall on the same row of it, in a fixed order, in one launch.
    """

    MOST = 4

    def __init__(self, batch: int, rows: int, columns: int, chunks: int, like: Tensor) -> None:
        self._batch, self._rows, self._columns, self._chunks = batch, rows, columns, chunks
        self._like = like
        self._pending: list[tuple[Tensor, Tensor, int, int, int, int]] = []

    def sink(self, gradient: Tensor | None, chunks: int | None = None) -> Tensor | None:
        """Where the first stage writes for ``gradient``: itself, or the partial rows of its sum.

        ``chunks`` where this gradient has a number of chunks of its own.
        """
        if gradient is None:
            return None
        keeps_rows = per_row(gradient)
        keeps_batch = gradient.dim() >= 2 and gradient.shape[0] == self._batch
        if keeps_rows and keeps_batch:
            return gradient
        chunks = self._rows if keeps_rows else (self._chunks if chunks is None else chunks)
        partial = self._like.new_empty((self._batch, chunks, self._columns), dtype=torch.float32)
        if keeps_rows:  # [1, S, D]: a sum over the batch
            geometry = (chunks, self._batch, 1, chunks)
        elif keeps_batch:
            geometry = (self._batch, chunks, chunks, 1)
        else:
            geometry = (1, self._batch * chunks, 0, 1)
        self._pending.append((partial, gradient, *geometry))
        return partial

    def reduce(self) -> None:
        """Write every gradient that ``sink`` gave partial rows for."""
        if not self._pending:
            return
        assert len(self._pending) <= self.MOST
        block = min(64, triton.next_power_of_2(self._columns))
        items = max(pending[2] for pending in self._pending)
        absent = (None, None, 0, 0, 0, 0)
        slots: Sequence[Any] = self._pending + [absent] * (self.MOST - len(self._pending))
        launch(
            _reduce_partials_kernel,
            (items, triton.cdiv(self._columns, block), len(self._pending)),
            *(argument for slot in slots for argument in slot),
            self._columns,
            ROWS=32,
            COLUMNS=block,
            num_warps=4,
        )


_COUNTS = [f"{name}_{i}" for i in range(4) for name in ("items", "terms", "step", "stride")]


@triton.jit(do_not_specialize=_COUNTS)
def _reduce_partials_kernel(  # type: ignore[no-untyped-def]
    partial_0, out_0, items_0, terms_0, step_0, stride_0,
    partial_1, out_1, items_1, terms_1, step_1, stride_1,
    partial_2, out_2, items_2, terms_2, step_2, stride_2,
    partial_3, out_3, items_3, terms_3, step_3, stride_3,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[item] = sum over term < terms of partial[item·step + term·stride].

    Program (item, block of columns, slot). Reads every partial row once, writes every out once.
    """
    slot = tl.program_id(2)
    if slot == 0:
        _reduce(partial_0, out_0, items_0, terms_0, step_0, stride_0, columns, ROWS, COLUMNS)
    if partial_1 is not None:
        if slot == 1:
            _reduce(partial_1, out_1, items_1, terms_1, step_1, stride_1, columns, ROWS, COLUMNS)
    if partial_2 is not None:
        if slot == 2:
            _reduce(partial_2, out_2, items_2, terms_2, step_2, stride_2, columns, ROWS, COLUMNS)
    if partial_3 is not None:
        if slot == 3:
            _reduce(partial_3, out_3, items_3, terms_3, step_3, stride_3, columns, ROWS, COLUMNS)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    partial, out, items, terms, step, stride, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    item = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns) & (item < items)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, terms, ROWS):
        term = first + tl.arange(0, ROWS)
        row = item * step + term.to(tl.int64) * stride
        mask = (term < terms)[:, None] & inside[None, :]
        total += tl.load(partial + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    tl.store(out + item * columns + column, tl.sum(total, axis=0), mask=inside)
