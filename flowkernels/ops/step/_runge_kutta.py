"""rk_combine and rk_error: the stages of any explicit solver, in one pass over memory each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import FusedFunction, apply, written
from flowkernels.ops._samples import tracked, wants_gradient
from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step import _stages, reference

Tensor = torch.Tensor


def rk_combine(
    y: Tensor,
    ks: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor,
    dt: float | Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """One combination of a Runge–Kutta or multistep solver: ``y + dt·Σ_i weights[i]·ks[i]``.

    Args:
        y: The state, of any shape; [B, ...] where dt is a vector. float64 has kernels of its own,
            complex states and samples that are not contiguous take the reference path.
        ks: The stages: a sequence of tensors of y's shape, or one tensor [n, *y.shape]. Read where
            they lie; a stage whose weight is the number 0 is not read.
        weights: n numbers, or a tensor [n], read on its device.
        dt: A number, or a floating-point tensor, 0-d or [B], read on its device.
        out: Where to write the result, of its shape and dtype; may be y or a stage itself. Not
            differentiable.

    Returns:
        y's shape, in the dtype that y and the stages promote to; float32 arithmetic (float64 for
        float64), rounded once.

    Raises:
        TypeError: An operand is no floating-point or complex tensor, dt or a weight no number.
        ValueError: A shape, length, dtype or device does not fit, or ``out`` overlaps an operand
            in part or is given where a gradient is asked for; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ode import rk_combine
        >>> y, k = torch.ones(1, 2), torch.full((1, 2), 4.0)
        >>> rk_combine(y, [k, -k], [0.75, 0.25], -0.5)
        tensor([[0., 0.]])
    """
    _stages.check_state(y, "y")
    stages = _stages.check_stages(ks, y)
    numbers, vector = _stages.check_weights(weights, ks, y)
    dt = _stages.check_dt(dt, y)
    differentiable = (y, dt if isinstance(dt, Tensor) else None, vector, *stages)
    if out is not None:
        _stages.check_out(out, y, stages, wants_gradient(*differentiable))
    served = (
        _stages.kernels_read(y, stages, out)
        and len(ks) <= operators.MOST_STAGES
        and not wants_gradient(vector)
        and not (isinstance(dt, Tensor) and dt.device != y.device)
    )
    backend = _library.choose("rk_combine", y.device, served)
    if backend == "reference":
        result = reference.rk_combine(y, ks, numbers if vector is None else vector, dt)
        return result if out is None else out.copy_(result)
    differentiate = tracked(*differentiable)
    step = _stages.step_arguments(dt, y)
    if out is not None:
        operators.rk_combine_out(backend, y, stages, numbers, vector, *step, out)
        written((out,))
        return out
    if differentiate:
        return apply(RKCombine, backend, numbers, vector, y, *step, *stages)
    return operators.rk_combine_forward(backend, y, stages, numbers, vector, *step)


def rk_error(
    ks: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor,
    dt: float | Tensor,
    y0: Tensor,
    y1: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The error of an embedded Runge–Kutta step and its weighted root mean square, in one pass.

    ``error = dt·Σ_i weights[i]·ks[i]``,
    ``norm = √mean((|error| / (atol + rtol·max(|y0|, |y1|)))²)``: the step is good where norm ≤ 1.
    Sums run in a fixed order, whatever the number of threads. (Hairer, Nørsett and Wanner, Solving
    Ordinary Differential Equations I, II.4.)

    Args:
        ks: The stages: a sequence of tensors of y0's shape, or one tensor [n, *y0.shape].
        weights: n numbers, or a tensor [n]: differences of the two solutions' weights. A stage
            whose weight is the number 0 is not read.
        dt: A number, or a floating-point tensor, 0-d or [B].
        y0: The state before the step, of any shape; [B, ...] where dt is a vector.
        y1: The state after it, of y0's shape.
        rtol: Relative tolerance: a number, or a tensor that broadcasts against y0.
        atol: Absolute tolerance, likewise.

    Returns:
        (error, norm): error of y0's shape in the dtype that the stages promote to; norm, of the
        error before rounding, 0-d, or [B] where dt is: one for each sample; float32, or float64
        where an operand is. Differentiable, by the reference formula.

    Raises:
        TypeError: An operand is no floating-point or complex tensor, dt or a weight no number.
        ValueError: A shape, length or device does not fit; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ode import rk_error
        >>> y, k = torch.ones(1, 2), torch.full((1, 2), 4.0)
        >>> rk_error([k, k], [0.5, -0.25], -0.5, y, y, 0.0, 0.25)
        (tensor([[-0.5000, -0.5000]]), tensor(2.))
    """
    _stages.check_state(y0, "y0")
    _stages.check_operand(y1, "y1", y0)
    stages = _stages.check_stages(ks, y0)
    numbers, vector = _stages.check_weights(weights, ks, y0)
    dt = _stages.check_dt(dt, y0)
    rtol, atol = (
        _stages.check_tolerance(rtol, "rtol", y0),
        _stages.check_tolerance(atol, "atol", y0),
    )
    tensors = [each for each in (dt, rtol, atol, vector) if isinstance(each, Tensor)]
    served = (
        not wants_gradient(y0, y1, *stages, *tensors)
        and len(ks) <= operators.MOST_STAGES
        and _stages.kernels_read(y0, stages, y1)
        and _stages.kernels_read_tolerance(rtol, y0)
        and _stages.kernels_read_tolerance(atol, y0)
    )
    backend = _library.choose("rk_error", y0.device, served)
    if backend == "reference":
        weights = numbers if vector is None else vector
        return reference.rk_error(ks, weights, dt, y0, y1, rtol, atol)
    tracked(y0, y1, *stages, constants=tuple(tensors))
    step = _stages.step_arguments(dt, y0)
    tolerances = _stages.tolerance_arguments(rtol, atol)
    return operators.rk_error(backend, stages, numbers, vector, *step, y0, y1, *tolerances, True)


class RKCombine(FusedFunction):
    """Gradients are multiples of grad: they are PyTorch's own operators, differentiable again.

    grad_y = grad,  grad_k_i = dt·weights_i·grad,  grad_dt = Σ grad·Σ_i weights_i·k_i

    The stages are saved only where dt asks for a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        weights: list[float],
        vector: Tensor | None,
        y: Tensor,
        dt: Tensor | None,
        dt_value: float,
        *stages: Tensor,
    ) -> Tensor:
        keeps = dt is not None and dt.requires_grad
        ctx.save_for_backward(vector, dt, *(stages if keeps else ()))
        ctx.weights, ctx.dt_value = weights, dt_value
        ctx.dtypes = (y.dtype, *(stage.dtype for stage in stages))
        ctx.stacked = _stages.is_stacked(stages, y)
        return operators.rk_combine_forward(backend, y, list(stages), weights, vector, dt, dt_value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        vector, dt, *stages = ctx.saved_tensors
        weights = ctx.weights if vector is None else vector.unbind(0)
        _, _, _, needs_y, needs_dt, _, *needed = ctx.needs_input_grad
        y_dtype, *dtypes = ctx.dtypes
        compute = torch.promote_types(grad.dtype, torch.float32)
        if dt is None:
            scaled, factors = grad, [ctx.dt_value * weight for weight in weights]
        else:
            scaled = grad.to(compute) * reference.step_of(dt, grad, compute)
            factors = [w.to(compute) for w in weights] if vector is not None else weights
        if ctx.stacked:
            found = [_stacked_gradient(scaled, factors).to(dtypes[0]) if needed[0] else None]
        else:
            # A weight that is the number 0 left its stage unread: no gradient.
            found = [
                (scaled * factor).to(dtype)
                if need and (isinstance(factor, Tensor) or factor != 0)
                else None
                for factor, need, dtype in zip(factors, needed, dtypes, strict=True)
            ]
        grad_dt = None
        if needs_dt:
            grad_dt = _dt_gradient(grad.to(compute), dt, stages, ctx.stacked, weights, vector)
        return (None, None, None, grad.to(y_dtype) if needs_y else None, grad_dt, None, *found)


def _stacked_gradient(scaled: Tensor, factors: Sequence[float | Tensor]) -> Tensor:
    """[n, ...]: the gradients of stages that lie in one tensor."""
    if factors and isinstance(factors[0], Tensor):
        column = torch.stack([torch.as_tensor(factor) for factor in factors])
    else:
        compute = torch.promote_types(scaled.dtype, torch.float32)
        column = torch.tensor(factors, dtype=compute, device=scaled.device)
    return column.reshape(-1, *(1,) * scaled.dim()) * scaled


def _dt_gradient(
    grad: Tensor,
    dt: Tensor,
    stages: Sequence[Tensor],
    stacked: bool,
    weights: Sequence[float],
    vector: Tensor | None,
) -> Tensor:
    ks = stages[0] if stacked else stages
    total = reference.weighted_sum(
        reference.stages_of(ks), weights if vector is None else vector, grad.dtype
    )
    product = grad * total
    if dt.dim() == 1:
        product = product.flatten(1).sum(1) if product.dim() > 1 else product
        return product.to(dt.dtype)
    return product.sum().to(dt.dtype)


for _name in ("rk_combine", "rk_error"):
    _library.register_function(_name, "flowkernels.ode", native=("cpu", "cuda"), triton=False)
