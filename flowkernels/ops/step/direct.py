"""The step operators without their checks, for loops that call them thousands of times.

A public call spends its host time on validation. A solver validates once, asks :func:`serves` once
an integration, and then calls the operators outright. What the caller answers for:

- state and stages have one dtype, shape and device and contiguous samples, and no gradient is asked
  for (call inside ``torch.no_grad()`` or on detached tensors);
- ``ks`` is a list with one tensor a stage, or a list of the one tensor [n, *y.shape] that holds
  them all. It may be longer than ``weights``: the first ``len(weights)`` stages count, so that a
  loop hands the same list or buffer to every stage;
- weights are Python floats; a stage of weight 0 is not read;
- dt is a float or a tensor, 0-d or [B], of any dtype that the kernels read (float64 included).
"""

from __future__ import annotations

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import written
from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step import _stages

Tensor = torch.Tensor

_combine = operators.rk_combine_forward.default
_combine_out = operators.rk_combine_out.default
_error = operators.rk_error.default


def serves(y: Tensor, stages: int) -> bool:
    """Whether kernels serve combinations of ``stages`` stages like ``y`` here, and are not switched
    off by :func:`flowkernels.backend`.
    """
    served = stages <= operators.MOST_STAGES and _stages.kernels_read(y, (), None)
    return _library.choose("rk_combine", y.device, served) == "native"


def combine(y: Tensor, ks: list[Tensor], weights: list[float], dt: float | Tensor) -> Tensor:
    """``y + dt·Σ_i weights[i]·ks[i]``."""
    if isinstance(dt, Tensor):
        return _combine(y, ks, weights, None, dt, 0.0)  # type: ignore[no-any-return]
    return _combine(y, ks, weights, None, None, dt)  # type: ignore[no-any-return]


def combine_out(
    y: Tensor, ks: list[Tensor], weights: list[float], dt: float | Tensor, out: Tensor
) -> Tensor:
    """The same, written to ``out``, which may be y or a stage."""
    if isinstance(dt, Tensor):
        _combine_out(y, ks, weights, None, dt, 0.0, out)
    else:
        _combine_out(y, ks, weights, None, None, dt, out)
    written((out,))
    return out


def error_norm(
    ks: list[Tensor],
    weights: list[float],
    dt: float | Tensor,
    y0: Tensor,
    y1: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    *,
    write_error: bool = False,
) -> tuple[Tensor, Tensor]:
    """(error, norm) of :func:`rk_error`; the error is an empty tensor unless it is to be written.

    A tolerance that is a tensor has y0's shape, the dtype that kernels compute in (float32, or
    float64 for float64) and is contiguous.
    """
    step = (dt, 0.0) if isinstance(dt, Tensor) else (None, dt)
    tolerances = _stages.tolerance_arguments(rtol, atol)
    return _error(  # type: ignore[no-any-return]
        ks, weights, None, *step, y0, y1, *tolerances, write_error
    )
