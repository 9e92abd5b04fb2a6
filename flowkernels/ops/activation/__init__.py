"""Feed-forward activations."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import (
    FusedFunction,
    apply,
    mask_of,
    readable,
    reference_gradients,
    scatter,
)
from flowkernels.ops._validate import check_shape, check_tensor, kernels_read
from flowkernels.ops.activation import _operators as operators
from flowkernels.ops.activation import reference

__all__ = ["gelu_tanh", "swiglu"]

Tensor = torch.Tensor


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh form, of ``x + bias``: ``½u(1 + tanh(√(2/π)(u + 0.044715u³)))``.

    Args:
        x: [..., D], any strides with a unit last stride.
        bias: [D] or None: the bias of the linear layer before it, added in the same pass.

    Returns:
        [..., D] in the dtype that x and bias promote to, rounded once from float32.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: ``bias`` does not fit the last dimension of ``x``.

    Example:
        >>> import torch
        >>> from flowkernels.ops import gelu_tanh
        >>> gelu_tanh(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, 1.0]))
        tensor([[0.0000, 1.9546]])

    Source: arXiv 1606.08415.
    """
    check_tensor(x, "x")
    if x.dim() < 1:
        raise ValueError("x: got a 0-d tensor, need [..., D]")
    if bias is not None:
        check_tensor(bias, "bias", x)
        check_shape(bias, "bias", (x.shape[-1],))
    backend = _library.choose("gelu_tanh", x.device, kernels_read(x, bias) and _collapses(x))
    if backend == "reference":
        return reference.gelu_tanh(x, bias)
    if x.dim() <= 3:
        return apply(GeluTanh, backend, x, bias)
    return apply(GeluTanh, backend, x.flatten(0, -2), bias).view(x.shape)


def swiglu(x: Tensor) -> Tensor:
    """The gated activation ``silu(a)·b``, where (a, b) are the halves of the last dimension.

    Args:
        x: [..., 2F], any strides with a unit last stride.

    Returns:
        [..., F] in x's dtype, rounded once from float32.

    Raises:
        TypeError: ``x`` is no floating-point tensor.
        ValueError: The last dimension of ``x`` is odd.

    Example:
        >>> import torch
        >>> from flowkernels.ops import swiglu
        >>> swiglu(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2.1932, 7.0464]])

    Source: arXiv 2002.05202.
    """
    check_tensor(x, "x")
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, need an even last dimension [..., 2F]")
    backend = _library.choose("swiglu", x.device, kernels_read(x) and _collapses(x))
    if backend == "reference":
        return reference.swiglu(x)
    if x.dim() <= 3:
        return apply(SwiGLU, backend, x)
    return apply(SwiGLU, backend, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _collapses(x: Tensor) -> bool:
    """Whether the kernels, which take up to three dimensions, can read x in place."""
    return x.shape[-1] > 0 and (x.dim() <= 3 or x.is_contiguous())


class GeluTanh(FusedFunction):
    """Saves x and bias; the backward pass recomputes the gate."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.backend = backend
        return operators.gelu_tanh_forward(backend, x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:3]
        if torch.is_grad_enabled():
            return (None, *reference_gradients(reference.gelu_tanh, (x, bias), (grad,), needed))
        found = operators.gelu_tanh_backward(ctx.backend, readable(grad), x, bias, mask_of(needed))
        return (None, *scatter(found, needed))


class SwiGLU(FusedFunction):
    """Saves x; the backward pass recomputes the gate."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return operators.swiglu_forward(backend, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, *reference_gradients(reference.swiglu, (x,), (grad,), (True,)))
        return None, operators.swiglu_backward(ctx.backend, readable(grad), x)


for _name in __all__:
    _library.register_function(_name, "flowkernels.ops")
