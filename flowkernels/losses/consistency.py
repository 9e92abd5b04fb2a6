"""The loss of Consistency-FM as one weighted velocity residual."""

from __future__ import annotations

import torch

from flowkernels.ops._samples import check_batch_vector, check_like, check_samples
from flowkernels.ops._validate import as_finite
from flowkernels.ops.interpolate import interpolate
from flowkernels.ops.losses import flow_matching

Tensor = torch.Tensor


def consistency_flow_matching(
    v: Tensor,
    v_target: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    end: Tensor,
    *,
    alpha: float = 1e-5,
    reduction: str = "mean",
) -> Tensor:
    """The loss of Consistency-FM (arXiv 2407.02398) within a segment of time that ends at `end`.

    With the endpoint ``f(x, t) = x - (t - end)·v(x, t)`` and two states of one straight line,
    x_t and x_r, ``end ≤ r ≤ t``,

        ``ℓ = ‖f(x_t, t) - f⁻(x_r, r)‖² + α·‖v(x_t, t) - v⁻(x_r, r)‖²``,

    the second term only where r > end: at the segment's end v⁻ belongs to the next segment, and
    the first term asks for ``x_end`` itself. v⁻ is a constant. The states cancel, and both squares
    are completed to one, which is how it is computed and differentiated (docs/siblings.md):

        ``ℓ = W·‖v - v⁻ - β(w - v⁻)‖² + α·(t - r)²/W·‖w - v⁻‖²``,
        ``w = noise - x0``,  ``W = (t - end)² + α``,  ``β = (t - end)(t - r)/W``.

    Args:
        v: [B, ...], velocity at ``x_t = (1 - t)·x0 + t·noise``.
        v_target: [B, ...] of v's shape, the target network's velocity at x_r; gets no gradient.
        x0: [B, ...] of v's shape, data; gets no gradient.
        noise: [B, ...] of v's shape; gets no gradient.
        t: [B], times.
        r: [B], times of the target, nearer to data.
        end: [B], where each sample's segment ends.
        alpha: α above.
        reduction: ``"mean"``, Σ_b ℓ_b / B with ℓ_b the mean over a sample's elements; ``"none"``,
            [B]; ``"sum"``, Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: A shape or device does not fit, alpha is negative, or the reduction is unknown;
            names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import consistency_flow_matching
        >>> x0, noise = torch.randn(2, 3), torch.randn(2, 3)
        >>> t, r, end = torch.tensor([[0.9, 0.4], [0.8, 0.3], [0.5, 0.0]])
        >>> straight = noise - x0
        >>> bool(consistency_flow_matching(straight, straight, x0, noise, t, r, end) < 1e-12)
        True
    """
    check_samples(v, "v")
    for name, value in (("v_target", v_target), ("x0", x0), ("noise", noise)):
        check_like(value, name, v)
    for name, value in (("t", t), ("r", r), ("end", end)):
        check_batch_vector(value, name, v)
    alpha = as_finite(alpha, "alpha")
    if alpha < 0:
        raise ValueError(f"alpha: got {alpha}, need a number of at least 0")
    v_target, x0, noise = v_target.detach(), x0.detach(), noise.detach()
    weight, share, rest = _completed_square(t, r, end, alpha)
    # v⁻ + β(w - v⁻) in the form that the loss takes, noise' - x0': the blend is the noising
    # process itself, at time β from v⁻ to the noise.
    dtype = torch.promote_types(v_target.dtype, noise.dtype)
    blend, _ = interpolate(v_target.to(dtype), share, noise)
    shrunk = x0 * share.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))
    loss = flow_matching(v, shrunk, blend, weight=weight, reduction=reduction)
    if alpha:
        loss = loss + flow_matching(v_target, x0, noise, weight=rest, reduction=reduction)
    return loss


def _completed_square(
    t: Tensor, r: Tensor, end: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """W, β and the constant's weight, each [B]."""
    # In float32 at least: near a segment's end the differences are all that is left of the times.
    dtype = torch.promote_types(t.dtype, torch.float32)
    t, r, end = (time.detach().to(dtype) for time in (t, r, end))
    span, back, inside = t - end, t - r, r > end
    velocity = alpha * inside.to(span.dtype)
    weight = span.square() + velocity
    # At the end of a segment β is 1 also where t is there too, and the weight 0.
    share = torch.where(inside, span * back / weight, torch.ones_like(span))
    rest = torch.where(inside, velocity * back.square() / weight, torch.zeros_like(span))
    return weight, share, rest
