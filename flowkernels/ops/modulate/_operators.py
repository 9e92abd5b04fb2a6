"""Schemas and fakes of the modulate family's operators.

Backward operators return only the gradients asked for by the bits of ``wanted``, in the order of
the forward operator's tensor arguments.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops.modulate.reference import promoted

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.modulate.kernels:"


def statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Empty (mean, rstd), float32 [B, S]; RMSNorm has no mean."""
    mean = x.new_empty((0,) if rms else x.shape[:2], dtype=torch.float32)
    return mean, x.new_empty(x.shape[:2], dtype=torch.float32)


def gradients_like(wanted: int, *operands: Tensor | None) -> list[Tensor]:
    """Empty contiguous gradients for the operands whose bit is set."""
    return [
        operand.new_empty(operand.shape)
        for bit, operand in enumerate(operands)
        if operand is not None and wanted >> bit & 1
    ]


def _modulated_norm_forward_fake(x, shift, scale, weight, bias, rms, eps):  # type: ignore[no-untyped-def]
    dtype = promoted(x, shift, scale, weight, bias)
    return x.new_empty(x.shape, dtype=dtype), *statistics(x, rms)


def _modulated_norm_backward_fake(  # type: ignore[no-untyped-def]
    grad_y, x, shift, scale, weight, bias, mean, rstd, rms, wanted
):
    return gradients_like(wanted, x, shift, scale, weight, bias)


def _gated_residual_forward_fake(residual, x, gate):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=promoted(residual, x, gate))


def _gated_residual_backward_fake(grad_h, residual, x, gate, wanted):  # type: ignore[no-untyped-def]
    return gradients_like(wanted, residual, x, gate)


def _gated_residual_norm_forward_fake(residual, x, gate, shift, scale, rms, eps):  # type: ignore[no-untyped-def]
    h = x.new_empty(x.shape, dtype=promoted(residual, x, gate))
    return h, x.new_empty(x.shape, dtype=promoted(h, shift, scale)), *statistics(x, rms)


def _gated_residual_norm_backward_fake(  # type: ignore[no-untyped-def]
    grad_h, grad_y, h, residual, x, gate, shift, scale, mean, rstd, rms, wanted
):
    return gradients_like(wanted, residual, x, gate, shift, scale)


modulated_norm_forward = define(
    "modulated_norm_forward",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, bool rms, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _modulated_norm_forward_fake,
    triton=_KERNELS + "modulated_norm_forward",
)
modulated_norm_backward = define(
    "modulated_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor rstd, bool rms, int wanted) -> Tensor[]",
    _modulated_norm_backward_fake,
    triton=_KERNELS + "modulated_norm_backward",
)
gated_residual_forward = define(
    "gated_residual_forward",
    "(Tensor residual, Tensor x, Tensor gate) -> Tensor",
    _gated_residual_forward_fake,
    triton=_KERNELS + "gated_residual_forward",
)
gated_residual_backward = define(
    "gated_residual_backward",
    "(Tensor grad_h, Tensor residual, Tensor x, Tensor gate, int wanted) -> Tensor[]",
    _gated_residual_backward_fake,
    triton=_KERNELS + "gated_residual_backward",
)
gated_residual_norm_forward = define(
    "gated_residual_norm_forward",
    "(Tensor residual, Tensor x, Tensor gate, Tensor? shift, Tensor? scale, bool rms, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_residual_norm_forward_fake,
    triton=_KERNELS + "gated_residual_norm_forward",
)
gated_residual_norm_backward = define(
    "gated_residual_norm_backward",
    "(Tensor? grad_h, Tensor grad_y, Tensor h, Tensor residual, Tensor x, Tensor gate,"
    " Tensor? shift, Tensor? scale, Tensor mean, Tensor rstd, bool rms, int wanted) -> Tensor[]",
    _gated_residual_norm_backward_fake,
    triton=_KERNELS + "gated_residual_norm_backward",
)
