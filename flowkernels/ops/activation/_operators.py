"""Schemas and fakes of the activation family's operators. x has one to three dimensions."""

from __future__ import annotations

import torch

from flowkernels.ops._library import define

_KERNELS = "flowkernels.ops.activation.kernels:"


def _gelu_tanh_forward_fake(x, bias):  # type: ignore[no-untyped-def]
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _gelu_tanh_backward_fake(grad, x, bias, wanted):  # type: ignore[no-untyped-def]
    return [
        operand.new_empty(operand.shape)
        for bit, operand in enumerate((x, bias))
        if operand is not None and wanted >> bit & 1
    ]


def _swiglu_forward_fake(x):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _swiglu_backward_fake(grad, x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


gelu_tanh_forward = define(
    "gelu_tanh_forward",
    "(Tensor x, Tensor? bias) -> Tensor",
    _gelu_tanh_forward_fake,
    triton=_KERNELS + "gelu_tanh_forward",
)
gelu_tanh_backward = define(
    "gelu_tanh_backward",
    "(Tensor grad, Tensor x, Tensor? bias, int wanted) -> Tensor[]",
    _gelu_tanh_backward_fake,
    triton=_KERNELS + "gelu_tanh_backward",
)
swiglu_forward = define(
    "swiglu_forward",
    "(Tensor x) -> Tensor",
    _swiglu_forward_fake,
    triton=_KERNELS + "swiglu_forward",
)
swiglu_backward = define(
    "swiglu_backward",
    "(Tensor grad, Tensor x) -> Tensor",
    _swiglu_backward_fake,
    triton=_KERNELS + "swiglu_backward",
)
