"""The check that each variant passes before it is timed: how far from float64 may it be?

The measure is what PyTorch itself does in the same dtype (the eager peer). The tests hold every
operator to twice its error; here a variant only has to compute the same thing, on one sample whose
largest error is luck, so it may be eight times as far from the float64 truth, plus an allowance
taken from the data, the rounding that adding and removing 0.3 costs in that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Tensor = torch.Tensor

SLACK = 8
# An eager peer this far (in norm) from the truth computes another formula, not a rounded one.
EAGER_RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def allowance(truth: Tensor, dtype: torch.dtype) -> float:
    """``max|(truth + 0.3 - 0.3) - truth|`` in ``dtype``; 2.5e-6 for a single number.

    A loss is a mean of some million terms near 1 in float32: which of two orders of summation lands
    nearer to the truth is luck, and either is within four times this.
    """
    if truth.dim() == 0:
        return 2.5e-6 * max(1.0, abs(float(truth)))
    rounded = truth.to(dtype)
    return float(((rounded + 0.3 - 0.3) - rounded).abs().max()) if truth.numel() else 0.0


def largest_error(found: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; infinite where a value is missing or not finite."""
    difference = (found.double() - truth).abs()
    return float(difference.max()) if torch.isfinite(difference).all() else float("inf")


def relative_error(found: Tensor, truth: Tensor) -> float:
    """``‖found - truth‖ / ‖truth‖``."""
    difference = float(torch.linalg.vector_norm(found.double() - truth))
    scale = float(torch.linalg.vector_norm(truth))
    return difference / scale if scale else difference


def verify(
    found: Mapping[str, Sequence[Tensor]],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
    names: Sequence[str],
) -> dict[str, float]:
    """Check every variant's results against the truth.

    Args:
        found: by variant, its results (outputs, then gradients); ``"eager"`` must be among them.
        truth: the same in float64.
        dtype: what the variants computed in.
        names: of the results, for the message.

    Returns:
        By variant, the largest relative error (in norm) over its results.

    Raises:
        AssertionError: A variant is too far from the truth; says which, where and by how much.
    """
    for variant, results in found.items():
        for index, (name, result, exact) in enumerate(zip(names, results, truth, strict=True)):
            if result.shape != exact.shape:
                raise AssertionError(
                    f"{variant}, {name}: shape {tuple(result.shape)}, need {tuple(exact.shape)}"
                )
            if variant != "ours":  # a peer is only held to computing the same thing
                kind = "relative error"
                error, limit = relative_error(result, exact), EAGER_RELATIVE[dtype]
            else:
                eager = found["eager"][index]
                kind, error = "error", largest_error(result, exact)
                limit = SLACK * largest_error(eager, exact) + 4 * allowance(exact, eager.dtype)
            if not error <= limit:
                raise AssertionError(f"{variant}, {name}: {kind} {error:.2e}, at most {limit:.2e}")
    return {
        variant: max(relative_error(r, exact) for r, exact in zip(results, truth, strict=True))
        for variant, results in found.items()
    }
