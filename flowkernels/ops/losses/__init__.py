"""Losses over samples: loss and gradients in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._losses import needs_grad
from flowkernels.ops._samples import (
    REDUCTIONS,
    check_batch_vector,
    check_like,
    check_samples,
    code_of,
    kernels_read_samples,
    tracked,
)
from flowkernels.ops._validate import as_finite, check_choice, check_tensor, is_finite
from flowkernels.ops.losses import _operators as operators
from flowkernels.ops.losses import reference
from flowkernels.ops.losses._autograd import FGM, FLOW_MATCHING

__all__ = ["fgm", "flow_matching", "straightening"]

Tensor = torch.Tensor


def flow_matching(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The conditional flow-matching loss ``‖v - (noise - x0)‖²`` (arXiv 2210.02747).

    ``ℓ_b = mean over the sample's elements of (v - (noise - x0))²``. Gradients, with n elements a
    sample: ``2·weight_b·(v - (noise - x0))/(n·B)`` to v and x0, its negative to noise.

    Args:
        v: [B, ...], predicted velocity. Samples that are not contiguous take the reference path.
        x0: [B, ...] of v's shape, data.
        noise: [B, ...] of v's shape.
        weight: [B], a factor for each sample's loss; None is 1. One that requires grad takes the
            reference path.
        reduction: ``"mean"``, Σ_b weight_b·ℓ_b / B (NaN for an empty batch); ``"none"``, [B];
            ``"sum"``, Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32, accumulated in float32 or better.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: A shape or device does not fit, or the reduction is unknown; names the
            argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import flow_matching
        >>> x0, noise = torch.randn(2, 3), torch.randn(2, 3)
        >>> flow_matching(noise - x0 + 0.5, x0, noise)
        tensor(0.2500)
    """
    return _residual_loss("flow_matching", ("x0", "noise"), v, x0, noise, None, weight, reduction)


def straightening(
    v: Tensor,
    x_start: Tensor,
    x_end: Tensor,
    dt: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The straightening loss of BOSS (arXiv 2312.16414), ``‖v - (x_end - x_start)/dt‖²``.

    Where it is zero, one Euler step of dt from x_start lands on x_end exactly.
    ``ℓ_b = mean over the sample's elements of (v - (x_end - x_start)/dt)²``. Gradients, with n
    elements a sample and c = ``2·weight_b·(v - (x_end - x_start)/dt)/(n·B)``: c to v, c/dt to
    x_start, -c/dt to x_end.

    Args:
        v: [B, ...], predicted velocity at x_start. Samples that are not contiguous take the
            reference path.
        x_start: [B, ...] of v's shape, states where an interval begins.
        x_end: [B, ...] of v's shape, states where it ends.
        dt: [B], time at the end less time at the start: negative when sampling, never 0 (the
            result is not finite there). One that requires grad takes the reference path.
        weight: [B], a factor for each sample's loss; None is 1. ``dt**2`` makes it the error of
            the Euler step. One that requires grad takes the reference path.
        reduction: ``"mean"``, Σ_b weight_b·ℓ_b / B (NaN for an empty batch); ``"none"``, [B];
            ``"sum"``, Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32, accumulated in float32 or better.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: A shape or device does not fit, or the reduction is unknown; names the
            argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import straightening
        >>> x_start, v, dt = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([-0.5, -0.25])
        >>> x_end = x_start + dt[:, None] * v
        >>> straightening(v, x_start, x_end, dt)
        tensor(0.)
    """
    check_tensor(dt, "dt")
    names = ("x_start", "x_end")
    return _residual_loss("straightening", names, v, x_start, x_end, dt, weight, reduction)


def _residual_loss(
    name: str,
    ends: tuple[str, str],
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    dt: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The loss of ``v - (noise - x0)/dt``; ``ends``: what ``name`` calls x0 and noise."""
    operands = (v, x0, noise, dt, weight, code_of(reduction))
    plain: Tensor | None = FLOW_MATCHING.plain(name, *operands)
    if plain is not None:
        return plain
    check_samples(v, "v")
    check_like(x0, ends[0], v)
    check_like(noise, ends[1], v)
    if dt is not None:
        check_batch_vector(dt, "dt", v)
    check_choice(reduction, "reduction", REDUCTIONS)
    if weight is not None:
        check_batch_vector(weight, "weight", v)
    served = kernels_read_samples(v, x0, noise, weight)
    served = served and not needs_grad(weight) and not needs_grad(dt)
    backend = _library.choose(name, v.device, served)
    if backend == "reference":
        return reference.flow_matching(v, x0, noise, dt, weight, reduction)
    if dt is not None and dt.dtype == torch.float64:
        dt = dt.float()
    code = code_of(reduction)
    if tracked(v, x0, noise, constants=(dt, weight)):
        return FLOW_MATCHING(backend, v, x0, noise, dt, weight, code)
    return operators.flow_matching_forward(backend, v, x0, noise, dt, weight, code, 0)[0]


def fgm(
    u: Tensor,
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    lam: float = 0.0,
    weight: Tensor | None = None,
    normalize: str | None = None,
    u_uncond: Tensor | None = None,
    guidance: float = 1.0,
    nonfinite: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The generator's loss of Flow Generator Matching (arXiv 2410.19310) and its family.

    ``ℓ_b = ω_b·mean(2·d·e + lam·d²)`` with ``d = u - v``, ``e = v - w``, ``w = noise - x0``, and
    under guidance ``u = u_uncond + guidance·(u - u_uncond)``. lam = 0 is the practical form,
    1 the exact objective, -0.4 SiD with α = 1.2. Gradients: ``ω(2e + 2·lam·d)`` to the guided u,
    ``ω(2(1 - lam)d - 2e)`` to v, and through w ``2ωd`` to x0 (over n·B under ``"mean"``).

    A sample that is not finite (its loss, weight or t) contributes exactly zero to the loss and
    gets zero gradients, by selection; the divisor stays B. That does not protect the gradients of
    the weights of a network that such a sample went through: the optimiser's skip does.

    Args:
        u: [B, ...], the teacher's velocity (under guidance, the conditional one). Samples that
            are not contiguous take the reference path.
        v: [B, ...] of u's shape, velocity of the online ("fake") flow.
        x0: [B, ...] of u's shape, generated samples.
        noise: [B, ...] of u's shape, the noise of the interpolation (not the generator's).
        t: [B], times of the interpolation; a constant in the gradient.
        lam: λ above.
        weight: [B], a factor for each sample's loss; None is 1. One that requires grad takes the
            reference path.
        normalize: ``"sid"`` multiplies ω by ``t/(2·max(mean|u - w|, 1e-5))``, mean over the sample
            of the guided u, a constant in the gradient. None: ω = weight.
        u_uncond: [B, ...] of u's shape, the teacher's velocity without conditions.
        guidance: Scale of the teacher's guidance; used with ``u_uncond`` only.
        nonfinite: 0-d or [1] int32 tensor on u's device; the number of samples left out is added
            to it, without a host sync.
        reduction: ``"mean"``, Σ_b ℓ_b / B (NaN for an empty batch); ``"none"``, [B]; ``"sum"``,
            Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32. Under lam = 0 a signed difference near zero:
        no signal of convergence.

    Raises:
        TypeError: An operand is no floating-point tensor, or ``nonfinite`` no int32 tensor.
        ValueError: A shape or device does not fit, or an option is unknown; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import fgm
        >>> u, v, x0, noise = torch.randn(4, 2, 3).unbind()
        >>> exact = fgm(u, v, x0, noise, torch.rand(2), lam=1.0)
        >>> w = noise - x0
        >>> torch.allclose(exact, ((u - w) ** 2 - (v - w) ** 2).mean(), atol=1e-6)
        True
    """
    sid = normalize is not None if normalize in (None, "sid") else None
    operands = (u, v, x0, noise, u_uncond, t, weight)
    scale = 1.0 if u_uncond is None else guidance
    found = None
    if is_finite(lam) and is_finite(scale):
        found = FGM.plain("fgm", *operands, lam, scale, sid, code_of(reduction))
    if found is None:
        found = _fgm(*operands, lam, scale, normalize, reduction)
    loss: Tensor = found[0]
    if nonfinite is not None:
        _check_counter(nonfinite, u)
        nonfinite.add_(found[1])
    return loss


def _fgm(
    u: Tensor,
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    u_uncond: Tensor | None,
    t: Tensor,
    weight: Tensor | None,
    lam: float,
    guidance: float,
    normalize: str | None,
    reduction: str,
) -> Any:
    """Operands not yet checked to the loss and the number of samples left out."""
    check_samples(u, "u")
    for name, value in (("v", v), ("x0", x0), ("noise", noise)):
        check_like(value, name, u)
    if u_uncond is not None:
        check_like(u_uncond, "u_uncond", u)
    check_batch_vector(t, "t", u)
    if weight is not None:
        check_batch_vector(weight, "weight", u)
    if normalize is not None:
        check_choice(normalize, "normalize", ("sid",))
    check_choice(reduction, "reduction", REDUCTIONS)
    lam, guidance = as_finite(lam, "lam"), as_finite(guidance, "guidance")
    sid = normalize is not None
    served = kernels_read_samples(u, v, x0, noise, u_uncond, weight) and not needs_grad(weight)
    backend = _library.choose("fgm", u.device, served)
    if backend == "reference":
        return reference.fgm(u, v, x0, noise, t, weight, u_uncond, lam, guidance, sid, reduction)
    if t.dtype == torch.float64:
        t = t.float()
    operands = (u, v, x0, noise, u_uncond, t, weight, lam, guidance, sid, code_of(reduction))
    if tracked(u, v, x0, noise, u_uncond, constants=(t, weight)):
        return FGM(backend, *operands)
    return operators.fgm_forward(backend, *operands, 0)[:2]


def _check_counter(nonfinite: Tensor, like: Tensor) -> None:
    if not isinstance(nonfinite, Tensor) or nonfinite.dtype != torch.int32:
        found = nonfinite.dtype if isinstance(nonfinite, Tensor) else type(nonfinite).__name__
        raise TypeError(f"nonfinite: got {found}, need an int32 tensor")
    if nonfinite.shape not in ((), (1,)):
        raise ValueError(f"nonfinite: got shape {tuple(nonfinite.shape)}, need 0-d or [1]")
    if nonfinite.device != like.device:
        raise ValueError(
            f"nonfinite: is on {nonfinite.device}, need {like.device} like the first argument"
        )


for _name in __all__:
    _library.register_function(_name, "flowkernels.losses")
