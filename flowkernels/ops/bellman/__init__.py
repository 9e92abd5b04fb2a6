"""One step of a teacher's trajectory, with what the Bellman cost needs of it."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import FusedFunction, apply, written
from flowkernels.ops._samples import check_like, check_samples, kernels_read_samples, tracked
from flowkernels.ops._validate import as_number
from flowkernels.ops.bellman import _operators as operators
from flowkernels.ops.bellman import reference

__all__ = ["bellman_step"]

Tensor = torch.Tensor
Step = tuple[Tensor, Tensor, Tensor | None]


def bellman_step(
    x: Tensor,
    v: Tensor,
    dt: float,
    previous: Tensor | None = None,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    out: Step | None = None,
) -> Step:
    """An Euler step that also gives the velocity and its increment, in one pass.

    ``velocity = v_uncond + guidance·(v - v_uncond)`` (v itself without ``v_uncond``),
    ``x_next = x + dt·velocity``, ``increment = velocity - previous``.

    Args:
        x: [B, ...], the state. Samples that are not contiguous take the reference path.
        v: [B, ...] of x's shape, the velocity (under guidance, the conditional one).
        dt: A number, ``t_next - t``: negative when sampling.
        previous: [B, ...] of x's shape, the velocity of the step before; None at the first one.
        v_uncond: [B, ...] of x's shape, the velocity without conditions.
        guidance: Scale of the guidance; used with ``v_uncond`` only.
        out: Where to write the three results, of their shapes and dtypes; the first may be x, the
            second ``previous``; the third is None where ``previous`` is. Not differentiable.

    Returns:
        (x_next, velocity, increment): x_next in the dtype that x, v and v_uncond promote to, the
        others in float32 (float64 for a velocity in float64); increment None without ``previous``.

    Raises:
        TypeError: An operand is no floating-point tensor, or dt no number.
        ValueError: A shape, dtype or device does not fit; names the argument.

    Example:
        >>> import torch
        >>> x, v = torch.ones(1, 1), torch.full((1, 1), 4.0)
        >>> bellman_step(x, v, -0.25, previous=torch.full((1, 1), 3.0))
        (tensor([[0.]]), tensor([[4.]]), tensor([[1.]]))

    Source: arXiv 2312.16414.
    """
    check_samples(x, "x")
    for name, value in (("v", v), ("v_uncond", v_uncond), ("previous", previous)):
        if value is not None or name == "v":
            check_like(value, name, x)
    dt = as_number(dt, "dt")
    guidance = 1.0 if v_uncond is None else as_number(guidance, "guidance")
    if out is not None:
        _check_out(out, x, v, v_uncond, previous)
    served = kernels_read_samples(x, v, v_uncond, previous, *(out or ()))
    backend = _library.choose("bellman_step", x.device, served)
    if backend == "reference":
        result = reference.bellman_step(x, v, dt, previous, v_uncond, guidance)
        return result if out is None else _copied(result, out)
    if out is not None:
        operators.bellman_step_out(backend, x, v, v_uncond, previous, dt, guidance, *out)
        written(each for each in out if each is not None)
        return out
    if tracked(x, v, v_uncond, previous):
        x_next, velocity, increment = apply(
            BellmanStep, backend, x, v, v_uncond, previous, dt, guidance
        )
    else:
        x_next, velocity, increment = operators.bellman_step_forward(
            backend, x, v, v_uncond, previous, dt, guidance
        )
    return x_next, velocity, None if previous is None else increment


class BellmanStep(FusedFunction):
    """Saves nothing but numbers: the step is linear. Its backward is a handful of torch's own
    operators, for nothing trains through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        v: Tensor,
        v_uncond: Tensor | None,
        previous: Tensor | None,
        dt: float,
        guidance: float,
    ) -> Any:
        ctx.dt, ctx.guidance = dt, guidance
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (v, v_uncond, previous))
        ctx.x_dtype = x.dtype
        return operators.bellman_step_forward(backend, x, v, v_uncond, previous, dt, guidance)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_velocity: Tensor, grad_increment: Tensor) -> Any:
        _, need_x, *needed, _, _ = ctx.needs_input_grad
        # Summed in float32, rounded once to each operand's dtype.
        total = ctx.dt * grad_x.float() + grad_velocity
        if ctx.dtypes[2] is not None:
            total = total + grad_increment
        guided = ctx.dtypes[1] is not None
        gradients = (
            lambda: ctx.guidance * total if guided else total,
            lambda: (1 - ctx.guidance) * total,
            lambda: -grad_increment,
        )
        found = [
            gradient().to(dtype) if need and dtype is not None else None
            for gradient, need, dtype in zip(gradients, needed, ctx.dtypes, strict=True)
        ]
        return (None, grad_x.to(ctx.x_dtype) if need_x else None, *found, None, None)


def _check_out(
    out: Step, x: Tensor, v: Tensor, v_uncond: Tensor | None, previous: Tensor | None
) -> None:
    if (out[2] is None) is not (previous is None):
        raise ValueError("out: its third tensor takes the increment, need it with previous alone")
    velocity = reference.velocity_dtype(v, v_uncond)
    dtypes = (reference.state_dtype(x, v, v_uncond), velocity, velocity)
    for index, (tensor, dtype) in enumerate(zip(out, dtypes, strict=True)):
        if tensor is None:
            continue
        check_like(tensor, f"out[{index}]", x)
        if tensor.dtype != dtype:
            raise ValueError(f"out[{index}]: got dtype {tensor.dtype}, need {dtype}")
    if torch.is_grad_enabled():
        operands = (x, v, v_uncond, previous, *out)
        if any(each is not None and each.requires_grad for each in operands):
            raise ValueError(
                "out: is given while a gradient is asked for, need out=None or torch.no_grad()"
            )


def _copied(result: Step, out: Step) -> Step:
    for source, target in zip(result, out, strict=True):
        if target is not None and source is not None:
            target.copy_(source)
    return out


_library.register_function("bellman_step", "flowkernels.ops.bellman")
