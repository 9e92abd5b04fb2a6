"""Norm, modulation and gated residual: the chain between the matrix products of a DiT block."""

from __future__ import annotations

from collections.abc import Sequence
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
from flowkernels.ops._validate import (
    as_number,
    check_choice,
    check_shape,
    check_tensor,
    kernels_read,
)
from flowkernels.ops.modulate import _operators as operators
from flowkernels.ops.modulate import reference

__all__ = ["gated_residual", "gated_residual_norm", "modulated_norm"]

Tensor = torch.Tensor


def modulated_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalise the last dimension and modulate: ``n(x)·(1 + scale) + shift``.

    ``n`` is LayerNorm, ``(x - mean)/√(var + eps)·weight + bias``, or RMSNorm,
    ``x/√(mean(x²) + eps)·weight + bias``. The adaptive norm of DiT (arXiv 2212.09748).

    Args:
        x: [B, S, D], any strides with a unit last stride.
        shift: [D], [B, D], [B, 1, D] or [B, S, D], strided; None is 0.
        scale: As ``shift``.
        norm: ``"layer"`` or ``"rms"``.
        weight: [D] or None.
        bias: [D] or None.
        eps: Added to the variance.

    Returns:
        [B, S, D] in the dtype that x, shift, scale, weight and bias promote to. Statistics and
        arithmetic are float32 (float64 where an operand is float64).

    Raises:
        TypeError: An operand is no floating-point tensor, or eps no number.
        ValueError: A shape or device does not fit; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ops import modulated_norm
        >>> shift, scale = torch.randn(2, 6 * 8).chunk(6, dim=-1)[:2]
        >>> modulated_norm(torch.randn(2, 5, 8), shift, scale).shape
        torch.Size([2, 5, 8])
    """
    _check_input(x, "x", None)
    _check_modulation(shift, "shift", x)
    _check_modulation(scale, "scale", x)
    _check_affine(weight, "weight", x)
    _check_affine(bias, "bias", x)
    check_choice(norm, "norm", ("layer", "rms"))
    rms, eps = norm == "rms", as_number(eps, "eps")
    backend = _library.choose(
        "modulated_norm",
        x.device,
        kernels_read(x, shift, scale, weight, bias) and x.shape[-1] > 0,
    )
    if backend == "reference":
        return reference.modulated_norm(x, shift, scale, weight, bias, rms, eps)
    return apply(ModulatedNorm, backend, x, shift, scale, weight, bias, rms, eps)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Add a gated branch to the residual stream: ``residual + gate·x``.

    Args:
        residual: [B, S, D], any strides with a unit last stride.
        x: [B, S, D], likewise.
        gate: [D], [B, D], [B, 1, D] or [B, S, D], strided.

    Returns:
        [B, S, D] in the dtype that the three promote to, rounded once from float32.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: A shape or device does not fit; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ops import gated_residual
        >>> gated_residual(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.full((1, 4), 0.5)).sum()
        tensor(12.)
    """
    _check_input(residual, "residual", None)
    _check_input(x, "x", residual)
    _check_modulation(gate, "gate", residual, required=True)
    backend = _library.choose(
        "gated_residual",
        residual.device,
        kernels_read(residual, x, gate) and x.shape[-1] > 0,
    )
    if backend == "reference":
        return reference.gated_residual(residual, x, gate)
    return apply(GatedResidual, backend, residual, x, gate)


def gated_residual_norm(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The chain of every DiT block in one pass: ``h = residual + gate·x`` and its modulated norm.

    Args:
        residual: [B, S, D], any strides with a unit last stride.
        x: [B, S, D], likewise: the branch's output.
        gate: [D], [B, D], [B, 1, D] or [B, S, D], strided.
        shift: As ``gate``, of the norm that follows; None is 0.
        scale: As ``shift``.
        norm: ``"layer"`` or ``"rms"``.
        eps: Added to the variance.

    Returns:
        ``(h, y)``: the new residual stream in the dtype that residual, x and gate promote to, and
        ``modulated_norm(h, shift, scale)`` of that h, after rounding.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: A shape or device does not fit; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ops import gated_residual_norm
        >>> gate, shift, scale = torch.randn(2, 3 * 8).chunk(3, dim=-1)
        >>> stream, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> h, y = gated_residual_norm(stream, branch, gate, shift, scale)
        >>> h.shape == y.shape
        True
    """
    _check_input(residual, "residual", None)
    _check_input(x, "x", residual)
    _check_modulation(gate, "gate", residual, required=True)
    _check_modulation(shift, "shift", residual)
    _check_modulation(scale, "scale", residual)
    check_choice(norm, "norm", ("layer", "rms"))
    rms, eps = norm == "rms", as_number(eps, "eps")
    backend = _library.choose(
        "gated_residual_norm",
        residual.device,
        kernels_read(residual, x, gate, shift, scale) and x.shape[-1] > 0,
    )
    if backend == "reference":
        return reference.gated_residual_norm(residual, x, gate, shift, scale, rms, eps)
    return apply(GatedResidualNorm, backend, residual, x, gate, shift, scale, rms, eps)


class ModulatedNorm(FusedFunction):
    """Saves x, the operands and the statistics; recomputes the normalised rows in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        rms: bool,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = operators.modulated_norm_forward(
            backend, x, shift, scale, weight, bias, rms, eps
        )
        ctx.save_for_backward(x, shift, scale, weight, bias, mean, rstd)
        ctx.backend, ctx.rms, ctx.eps = backend, rms, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:6]
        inputs = (x, shift, scale, weight, bias)
        if torch.is_grad_enabled():
            found = reference_gradients(
                lambda x, shift, scale, weight, bias: reference.modulated_norm(
                    x, shift, scale, weight, bias, ctx.rms, ctx.eps
                ),
                inputs,
                (grad_y,),
                needed,
            )
        else:
            found = scatter(
                operators.modulated_norm_backward(
                    ctx.backend, readable(grad_y), *inputs, mean, rstd, ctx.rms, mask_of(needed)
                ),
                needed,
            )
        return (None, *found, None, None)


class GatedResidual(FusedFunction):
    @staticmethod
    def forward(ctx: Any, backend: str, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(residual, x, gate)
        ctx.backend = backend
        return operators.gated_residual_forward(backend, residual, x, gate)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> Any:
        residual, x, gate = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            found = reference_gradients(
                reference.gated_residual, (residual, x, gate), (grad_h,), needed
            )
        else:
            found = gated_gradients(ctx.backend, grad_h, residual, x, gate, needed)
        return (None, *found)


def gated_gradients(
    backend: str, grad_h: Tensor, residual: Tensor, x: Tensor, gate: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of residual, x and gate; the residual's is grad_h itself where dtypes agree."""
    passed_on = needed[0] and grad_h.dtype == residual.dtype
    rest = [needed[0] and not passed_on, *needed[1:]]
    found: list[Tensor | None] = [None, None, None]
    if any(rest):
        written = operators.gated_residual_backward(
            backend, readable(grad_h), residual, x, gate, mask_of(rest)
        )
        found = scatter(written, rest)
    if passed_on:
        found[0] = grad_h
    return found


class GatedResidualNorm(FusedFunction):
    """Saves h instead of recomputing it: backward then reads what the forward pass rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        residual: Tensor,
        x: Tensor,
        gate: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        rms: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        h, y, mean, rstd = operators.gated_residual_norm_forward(
            backend, residual, x, gate, shift, scale, rms, eps
        )
        ctx.save_for_backward(residual, x, gate, shift, scale, h, mean, rstd)
        ctx.backend, ctx.rms, ctx.eps = backend, rms, eps
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_y: Tensor | None) -> Any:
        residual, x, gate, shift, scale, h, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:6]
        inputs = (residual, x, gate, shift, scale)
        found: Any
        if grad_h is None and grad_y is None:
            found = [None] * 5
        elif torch.is_grad_enabled():
            found = reference_gradients(
                lambda residual, x, gate, shift, scale: reference.gated_residual_norm(
                    residual, x, gate, shift, scale, ctx.rms, ctx.eps
                ),
                inputs,
                (grad_h, grad_y),
                needed,
            )
        elif grad_y is None:
            assert grad_h is not None
            sums = gated_gradients(ctx.backend, grad_h, residual, x, gate, needed[:3])
            found = [*sums, None, None]
        else:
            found = scatter(
                operators.gated_residual_norm_backward(
                    ctx.backend,
                    None if grad_h is None else readable(grad_h),
                    readable(grad_y),
                    h,
                    *inputs,
                    mean,
                    rstd,
                    ctx.rms,
                    mask_of(needed),
                ),
                needed,
            )
        return (None, *found, None, None)


def _check_input(x: Tensor, name: str, like: Tensor | None) -> None:
    check_tensor(x, name, like)
    if like is not None:
        check_shape(x, name, tuple(like.shape))
    elif x.dim() != 3:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, need [B, S, D]")


def _check_modulation(operand: Tensor | None, name: str, x: Tensor, required: bool = False) -> None:
    if operand is None and not required:
        return
    check_tensor(operand, name, x)
    assert operand is not None
    batch, rows, columns = x.shape
    shape = operand.shape
    fits = (
        1 <= len(shape) <= 3
        and shape[-1] == columns
        and (len(shape) < 2 or shape[0] in (1, batch))
        and (len(shape) < 3 or shape[1] in (1, rows))
    )
    if not fits:
        raise ValueError(
            f"{name}: got shape {tuple(shape)}, need [D], [B, D], [B, 1, D] or [B, S, D] "
            f"with [B, S, D] = {tuple(x.shape)}"
        )


def _check_affine(operand: Tensor | None, name: str, x: Tensor) -> None:
    if operand is not None:
        check_tensor(operand, name, x)
        check_shape(operand, name, (x.shape[-1],))


for _name in __all__:
    _library.register_function(_name, "flowkernels.ops")
