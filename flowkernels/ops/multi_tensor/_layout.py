"""Which tensors the kernels may walk together: one dense layout, element by element in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flowkernels.ops._library import KERNEL_DTYPES

Tensor = torch.Tensor


def is_dense(tensor: Tensor) -> bool:
    """Every element once and no gap: strides, sorted, are the products of the sizes before them."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(tensor: Tensor, like: Tensor) -> bool:
    """Same sizes, and same strides wherever a dimension has more than one element."""
    if tensor.shape != like.shape:
        return False
    if tensor.is_contiguous() and like.is_contiguous():
        return True
    return all(
        a == b
        for a, b, size in zip(tensor.stride(), like.stride(), like.shape, strict=True)
        if size > 1
    )


def walkable(*tensors: Tensor) -> bool:
    """The kernels read these tensors of one parameter: dtypes, and one dense layout."""
    first = tensors[0]
    return (
        all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)
        and is_dense(first)
        and all(same_layout(tensor, first) for tensor in tensors[1:])
    )


def lists_walkable(params: list[Tensor], *lists: Iterable[Tensor]) -> bool:
    """:func:`walkable` for each parameter; a list may be empty, or hold several lists in a row."""
    columns: list[list[Tensor]] = [[param] for param in params]
    for each in lists:
        for index, tensor in enumerate(each):
            columns[index % len(params)].append(tensor)
    return all(walkable(*column) for column in columns)
