"""Contrastive flow matching: loss and gradient in one pass over memory."""

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
    kernels_read_samples,
    tracked,
)
from flowkernels.ops._validate import as_finite, check_choice
from flowkernels.ops.contrastive import _operators as operators
from flowkernels.ops.contrastive import reference
from flowkernels.ops.contrastive._autograd import CONTRASTIVE

__all__ = ["contrastive_flow_matching"]

Tensor = torch.Tensor


def contrastive_flow_matching(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    negatives: Tensor,
    *,
    lam: float = 0.05,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of contrastive flow matching (arXiv 2506.05350), ``‖v - u‖² - lam·‖v - ũ‖²``.

    ``u = noise - x0`` is a sample's own velocity and ``ũ_b = u[negatives_b]`` that of another item
    of the batch: ``ℓ_b = mean over the sample's elements of (v - u)² - lam·(v - ũ)²``. It equals
    ``(1 - lam)·‖v - (u - lam·ũ)/(1 - lam)‖²`` plus a constant, so it can be negative. Gradient to
    v, with n elements a sample: ``2·weight_b·((v - u) - lam·(v - ũ))/(n·B)``.

    Args:
        v: [B, ...], predicted velocity. Samples that are not contiguous take the reference path.
        x0: [B, ...] of v's shape, data. It or noise asking for a gradient, which is collected
            from the samples that an item is the negative of, takes the reference path.
        noise: [B, ...] of v's shape.
        negatives: [B] integers in [0, B), which item each sample is held away from. They are taken
            as they are: an item that is its own negative has the loss ``(1 - lam)·‖v - u‖²``,
            flow matching with a smaller weight. The example draws others only.
        lam: λ above; the loss has no minimum from 1 on.
        weight: [B], a factor for each sample's loss; None is 1. One that requires grad takes the
            reference path.
        reduction: ``"mean"``, Σ_b weight_b·ℓ_b / B (NaN for an empty batch); ``"none"``, [B];
            ``"sum"``, Σ_b Σ_elements.

    Returns:
        0-d, or [B] for ``"none"``; at least float32, accumulated in float32 or better.

    Raises:
        TypeError: An operand is no floating-point tensor, or ``negatives`` no integer tensor.
        ValueError: A shape or device does not fit, the reduction is unknown, or a negative lies
            outside the batch; names the argument. Where the host would have to wait for the
            indices (on a GPU) or cannot see them (under torch.compile), such a sample's loss and
            gradient are NaN instead.

    Example:
        >>> import torch
        >>> from flowkernels.losses import contrastive_flow_matching
        >>> B = 4
        >>> v, x0, noise = torch.randn(3, B, 5).unbind()
        >>> negatives = (torch.arange(B) + torch.randint(1, B, (B,))) % B
        >>> contrastive_flow_matching(v, x0, noise, negatives).shape
        torch.Size([])
    """
    check_samples(v, "v")
    check_like(x0, "x0", v)
    check_like(noise, "noise", v)
    negatives = _checked_negatives(negatives, v)
    lam = as_finite(lam, "lam")
    check_choice(reduction, "reduction", REDUCTIONS)
    if weight is not None:
        check_batch_vector(weight, "weight", v)
    served = kernels_read_samples(v, x0, noise, weight)
    served = served and not (needs_grad(x0) or needs_grad(noise) or needs_grad(weight))
    backend = _library.choose("contrastive_flow_matching", v.device, served)
    if backend == "reference":
        return reference.contrastive_flow_matching(v, x0, noise, negatives, weight, lam, reduction)
    code = REDUCTIONS.index(reduction)
    if tracked(v, constants=(x0, noise, weight)):
        return CONTRASTIVE(backend, v, x0, noise, negatives, weight, lam, code)
    return operators.contrastive_forward(backend, v, x0, noise, negatives, weight, lam, code, 0)[0]


def _checked_negatives(negatives: Any, like: Tensor) -> Tensor:
    """[B] int64 on the device of ``like``, in [0, B) where a look costs the host no wait."""
    if not isinstance(negatives, Tensor):
        raise TypeError(f"negatives: got {type(negatives).__name__}, need a torch.Tensor")
    dtype = negatives.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"negatives: got dtype {dtype}, need an integer dtype")
    if negatives.device != like.device:
        raise ValueError(
            f"negatives: is on {negatives.device}, need {like.device} like the first argument"
        )
    batch = like.shape[0]
    if negatives.dim() != 1 or negatives.shape[0] != batch:
        raise ValueError(
            f"negatives: got shape {tuple(negatives.shape)}, need [B] with B = {batch}"
        )
    # Bytes would be taken for a mask where they index a tensor.
    indices: Tensor = negatives if dtype == torch.int64 else negatives.long()
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return indices
    least, most = (int(index) for index in torch.aminmax(indices))
    if least < 0 or most >= batch:
        wrong = least if least < 0 else most
        raise ValueError(f"negatives: got an index of {wrong}, need 0 to {batch - 1}")
    return indices


for _name in __all__:
    _library.register_function(_name, "flowkernels.losses")
