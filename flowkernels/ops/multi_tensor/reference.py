"""Gradient norm, AdamW and moving averages of many tensors: the specification of the kernels.

    norm   = ‖grads‖₂ / |grad_scale|                  over every element of every tensor
    g      = grad / grad_scale · min(1, max_grad_norm / (norm + 1e-6))
    m      = lerp(m, g, 1 - β₁)                       m = g where β₁ = 0: no buffer
    v      = β₂ v + (1 - β₂) g²
    p      = p (1 - lr λ) - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)
    ema_k  = lerp(ema_k, p, 1 - decay_k)              of p as stored, after rounding
    copy   = p                                        rounded to copy's dtype

Where the norm is not finite and ``skip_nonfinite`` is set nothing changes, the step counts t
included, and ``skipped`` counts one. Decisions are taken by selection on the device: no host sync.
Arithmetic is float32, or float64 where the parameter is float64. Adam: arXiv 1412.6980; decoupled
weight decay: arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where a gradient is float64."""
    found = any(grad.dtype == torch.float64 for grad in grads)
    return torch.float64 if found else torch.float32


def grad_norm(grads: Sequence[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    squares = [grad.to(torch.float64).square().sum() for grad in grads]
    norm = torch.stack(squares).sum().sqrt()
    if grad_scale is not None:
        norm = norm / grad_scale.to(torch.float64).reshape(()).abs()
    return norm.to(norm_dtype(grads))


def gradient_factor(
    norm: Tensor | None, grad_scale: Tensor | None, max_grad_norm: float | None
) -> Tensor | None:
    """What a gradient is multiplied by, 0-d float64; None for 1."""
    factor = None
    if grad_scale is not None:
        factor = 1 / grad_scale.to(torch.float64).reshape(())
    if max_grad_norm is not None:
        assert norm is not None
        coefficient = (max_grad_norm / (norm.to(torch.float64) + 1e-6)).clamp(max=1.0)
        factor = coefficient if factor is None else factor * coefficient
    return factor


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """``target = value`` unless skipped; a selection, so that no NaN gets through."""
    target.copy_(value if skip is None else torch.where(skip, target, value.to(target.dtype)))


def ema_(
    params: Sequence[Tensor],
    emas: Sequence[Tensor],
    ema_decays: Sequence[float],
    norm: Tensor | None = None,
) -> None:
    skip = None if norm is None else ~norm.isfinite()
    for k, decay in enumerate(ema_decays):
        for param, ema in zip(params, emas[k * len(params) :], strict=False):
            _assign(ema, torch.lerp(ema, param.to(ema.dtype), 1 - decay), skip)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    skipped: Tensor | None,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[float],
    max_grad_norm: float | None,
    skip_nonfinite: bool,
) -> None:
    skip = ~norm.isfinite() if norm is not None and skip_nonfinite else None
    factor = gradient_factor(norm, grad_scale, max_grad_norm)
    rate = lr if lr_tensor is None else lr_tensor.to(torch.float64).reshape(())
    for i, (param, grad, second, step) in enumerate(
        zip(params, grads, exp_avg_sqs, steps, strict=True)
    ):
        compute = torch.promote_types(param.dtype, torch.float32)
        t = step.to(torch.float64) + 1
        g = grad.to(compute) if factor is None else grad.to(compute) * factor.to(compute)
        first = torch.lerp(exp_avgs[i], g, 1 - beta1) if exp_avgs else g
        v = second * beta2 + (1 - beta2) * g * g
        denominator = v.sqrt() / (1 - beta2**t).sqrt().to(compute) + eps
        step_size = torch.as_tensor(rate / (1 - beta1**t), dtype=compute, device=param.device)
        p = param.to(compute) * (1 - rate * weight_decay) - step_size * (first / denominator)
        if exp_avgs:
            _assign(exp_avgs[i], first, skip)
        _assign(second, v, skip)
        _assign(param, p, skip)
        _assign(step, t, skip)
        if copies:
            _assign(copies[i], param, skip)
    ema_(params, emas, ema_decays, norm if skip_nonfinite else None)
    if skipped is not None and skip is not None:
        skipped.add_(skip)
