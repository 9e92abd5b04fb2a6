"""Norm, modulation and gated residual in plain PyTorch: the specification of the kernels.

    n(x) = (x - mean) / sqrt(var + eps)        LayerNorm, or x / sqrt(mean(x²) + eps) for RMSNorm
    modulated_norm      = (n(x)·weight + bias) · (1 + scale) + shift
    gated_residual      = residual + gate · x
    gated_residual_norm = (h, modulated_norm(h)),  h = residual + gate · x after rounding

Arithmetic is at least float32 and float64 where an operand is; results are rounded once.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that torch's promotion gives these operands (all with at least one dimension)."""
    found = [tensor.dtype for tensor in tensors if tensor is not None]
    result = found[0]
    for dtype in found[1:]:
        result = torch.promote_types(result, dtype)
    return result


def rows_of(operand: Tensor) -> Tensor:
    """An operand [D], [B, D] or [B, S, D] as one that broadcasts against [B, S, D]."""
    return operand.unsqueeze(1) if operand.dim() == 2 else operand


def modulated_norm(
    x_BSD: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rms: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    dtype = promoted(x_BSD, shift, scale, weight, bias)
    compute = torch.promote_types(dtype, torch.float32)
    x = x_BSD.to(compute)
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    if scale is not None:
        y = y * (1 + rows_of(scale).to(compute))
    if shift is not None:
        y = y + rows_of(shift).to(compute)
    return y.to(dtype)


def gated_residual(residual_BSD: Tensor, x_BSD: Tensor, gate: Tensor) -> Tensor:
    dtype = promoted(residual_BSD, x_BSD, gate)
    compute = torch.promote_types(dtype, torch.float32)
    h = residual_BSD.to(compute) + rows_of(gate).to(compute) * x_BSD.to(compute)
    return h.to(dtype)


def gated_residual_norm(
    residual_BSD: Tensor,
    x_BSD: Tensor,
    gate: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    rms: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    h = gated_residual(residual_BSD, x_BSD, gate)
    return h, modulated_norm(h, shift, scale, rms=rms, eps=eps)
