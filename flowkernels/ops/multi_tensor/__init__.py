"""Many tensors in one sweep: gradient norm, AdamW with moving averages, moving averages alone.

These are the operators behind :mod:`flowkernels.optim`, which owns the state and decides which
tensors may be walked together. ``served=True`` says that it has made sure that the kernels can read
these lists; None finds out, and False takes the reference path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import written
from flowkernels.ops.multi_tensor import _operators as operators
from flowkernels.ops.multi_tensor import reference
from flowkernels.ops.multi_tensor._layout import lists_walkable, walkable

__all__ = ["adamw_ema_", "ema_", "grad_norm"]

Tensor = torch.Tensor


def grad_norm(
    grads: Sequence[Tensor], grad_scale: Tensor | None = None, *, served: bool | None = None
) -> Tensor:
    """The global norm ``‖grads‖₂ / |grad_scale|``, the same bits whatever the number of threads.

    Squares are summed in float64 over fixed chunks, the chunks in order. It is finite exactly where
    every gradient is (and the norm fits its dtype), so it is the test for finiteness too.

    Args:
        grads: At least one tensor, all on one device, of any floating-point dtypes.
        grad_scale: 0-d tensor on that device: what the loss was multiplied by. None is 1.
        served: The kernels can read all of them: float32, bfloat16 or float16, dense in memory.
            None: finds out.

    Returns:
        0-d float32 (float64 where a gradient is), on the device: no host sync.

    Raises:
        ValueError: ``grads`` is empty.

    Example:
        >>> import torch
        >>> grad_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not grads:
        raise ValueError("grads: got no tensor, need at least one")
    if served is None:
        served = all(walkable(grad) for grad in grads)
    if _library.choose("grad_norm", grads[0].device, served) == "reference":
        return reference.grad_norm(grads, grad_scale)
    return operators.grad_norm.default(grads, grad_scale)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decays: Sequence[float] = (),
    skipped: Tensor | None = None,
    norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = True,
    served: bool | None = None,
) -> None:
    """One AdamW step of many parameters in place, with their averages and low-precision copies.

    The formula stands in :mod:`flowkernels.ops.multi_tensor.reference` (arXiv 1711.05101).

    Args:
        params: On one device. Every list has one tensor a parameter, in its shape and strides.
        grads: Any floating-point dtypes; multiplied by ``grad_scale`` as they come.
        exp_avgs: First moments, float32; empty where β1 = 0.
        exp_avg_sqs: Second moments, float32.
        emas: Averages, float32, one list after the other: ``len(ema_decays)·len(params)`` tensors.
        copies: Written with the new parameters in their own dtype; empty for none.
        steps: 0-d float32: steps taken so far, advanced by one.
        lr: Number, or tensor of one element on the device.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, per unit of ``lr``.
        ema_decays: One for each average.
        skipped: 0-d int64; counts one where the step is skipped.
        norm: :func:`grad_norm` of the step (of all its parameters, these or more).
        grad_scale: As for :func:`grad_norm`.
        max_grad_norm: Gradients are multiplied by ``min(1, max_grad_norm / (norm + 1e-6))``.
        skip_nonfinite: Change nothing where ``norm`` is not finite.
        served: The kernels can read all lists: dtypes as above, one dense layout a parameter.
            None: finds out. False takes the reference path, which serves any layout, and float64
            with float64 state.
    """
    if not params:
        return
    if served is None:
        served = lists_walkable(list(params), grads, exp_avgs, exp_avg_sqs, emas, copies)
    lr_tensor, rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    reference_path = _library.choose("adamw_ema_", params[0].device, served) == "reference"
    implementation = reference.adamw_ema_ if reference_path else operators.adamw_ema_.default
    implementation(
        params, grads, exp_avgs, exp_avg_sqs, emas, copies, steps, skipped, norm, grad_scale,
        lr_tensor, rate, beta1, beta2, eps, weight_decay,
        ema_decays, max_grad_norm, skip_nonfinite,
    )  # fmt: skip
    if not reference_path:
        written((*params, *emas, *copies))


def ema_(
    params: Sequence[Tensor],
    emas: Sequence[Tensor],
    ema_decays: Sequence[float],
    *,
    norm: Tensor | None = None,
    served: bool | None = None,
) -> None:
    """``ema_k = lerp(ema_k, param, 1 - decay_k)`` for many parameters and averages, in place.

    Args:
        params: On one device, any floating-point dtypes.
        emas: float32, one average after the other: ``len(ema_decays)·len(params)`` tensors.
        ema_decays: One for each average.
        norm: If given, and not finite, nothing changes (the step was skipped).
        served: As for :func:`adamw_ema_`.
    """
    if not params or not ema_decays:
        return
    if served is None:
        served = lists_walkable(list(params), emas)
    if _library.choose("ema_", params[0].device, served) == "reference":
        reference.ema_(params, emas, ema_decays, norm)
    else:
        operators.ema_.default(params, emas, ema_decays, norm)
        written(emas)


for _name in __all__:
    _library.register_function(
        _name, "flowkernels.ops.multi_tensor", native=("cpu", "cuda"), triton=False
    )
