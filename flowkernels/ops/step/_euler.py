"""euler_step: guidance and the Euler update in one pass."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import FusedFunction, apply, mask_of, scatter, written
from flowkernels.ops._samples import (
    alike,
    check_batch_vector,
    check_like,
    check_samples,
    kernels_read_samples,
    per_sample,
    readable_samples,
    tracked,
    wants_gradient,
)
from flowkernels.ops._validate import as_number, check_tensor
from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step import reference

Tensor = torch.Tensor


def euler_step(
    x: Tensor,
    v: Tensor,
    dt: float | Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """One Euler step with guidance: ``x + dt·(v_uncond + guidance·(v - v_uncond))``.

    Without ``v_uncond`` it is ``x + dt·v``. dt is ``t_next - t``: negative when sampling, from
    noise at t = 1 to data at t = 0. (Guidance: arXiv 2207.12598.)

    Args:
        x: [B, ...], the state. Samples that are not contiguous take the reference path.
        v: [B, ...] of x's shape, the velocity (under guidance, the conditional one).
        dt: A number, or a floating-point tensor, 0-d or [B], read on its device.
        v_uncond: [B, ...] of x's shape, the velocity without conditions.
        guidance: Scale of the guidance; used with ``v_uncond`` only.
        out: Where to write the result, of the result's shape and dtype; may be x itself. Not
            differentiable.

    Returns:
        [B, ...] in the dtype that x, v and v_uncond promote to; float32 arithmetic, rounded once.

    Raises:
        TypeError: An operand is no floating-point tensor, or dt neither number nor tensor.
        ValueError: A shape, dtype or device does not fit, or ``out`` overlaps an operand in part
            or is given where a gradient is asked for; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ode import euler_step
        >>> euler_step(torch.ones(1, 2), torch.full((1, 2), 4.0), -0.25)
        tensor([[0., 0.]])
    """
    plain = v is not None and alike(x, v, v_uncond)
    if not plain:
        check_samples(x, "x")
        check_like(v, "v", x)
        if v_uncond is not None:
            check_like(v_uncond, "v_uncond", x)
    guidance = 1.0 if v_uncond is None else as_number(guidance, "guidance")
    dt_needs_grad = False
    if isinstance(dt, Tensor):
        if dt.dim() == 0 and dt.device.type == "cpu" != x.device.type:
            dt = float(dt)  # a number of the host's, as torch's own operators take it: no sync
        else:
            _check_dt(dt, x)
            dt_needs_grad = dt.requires_grad and torch.is_grad_enabled()
    elif isinstance(dt, bool) or not isinstance(dt, (int, float)):
        raise TypeError(f"dt: got {type(dt).__name__}, need a number or a tensor, 0-d or [B]")
    if out is not None:
        _check_out(out, x, v, v_uncond, dt_needs_grad or wants_gradient(x, v, v_uncond))
    read = (plain and out is None) or kernels_read_samples(x, v, v_uncond, out)
    backend = _library.choose("euler_step", x.device, read and not dt_needs_grad)
    if backend == "reference":
        result = reference.euler_step(x, v, dt, v_uncond, guidance)
        return result if out is None else out.copy_(result)
    differentiate = tracked(x, v, v_uncond, constants=(dt,))
    if not isinstance(dt, Tensor) and torch.compiler.is_compiling():
        # A number would be a constant of the graph, and each step of a sampler a recompile.
        dt = x.new_zeros((), dtype=torch.float32) + float(dt)
    arguments: tuple[Tensor | None, float, float]
    if isinstance(dt, Tensor):
        arguments = (dt.float() if dt.dtype == torch.float64 else dt, 0.0, guidance)
    else:
        arguments = (None, dt, guidance)
    if out is not None:
        operators.euler_step_out(backend, x, v, v_uncond, *arguments, out, None)
        written((out,))
        return out
    if differentiate:
        return apply(EulerStep, backend, x, v, v_uncond, *arguments)
    return operators.euler_step_forward(backend, x, v, v_uncond, *arguments)


def guided_euler_step(
    x: Tensor, v: Tensor, dt: float, guidance: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A guided step, and the batch that the next call of the velocity is on, in one pass.

    Args:
        x: [B, ...].
        v: [2B, ...], the velocity with conditions, then the one without.
        dt: As in :func:`euler_step`.
        guidance: As there.
        out: As there; None where x has to stay as it is.

    Returns:
        x' = ``euler_step(x, v[:B], dt, v_uncond=v[B:], guidance=guidance)`` and ``cat([x', x'])``.
    """
    batch = x.shape[0]
    v_cond, v_uncond = v.split_with_sizes((batch, batch))
    # Halves of one sample may each be contiguous where v is not, and `twice` takes v's strides.
    if alike(x, v_cond, v_uncond, out) and v.is_contiguous() and not torch.compiler.is_compiling():
        backend = _library.choose("euler_step", x.device, True)
        if backend != "reference" and not tracked(x, v):
            out = torch.empty_like(x) if out is None else out
            twice = torch.empty_like(v)
            operators.euler_step_out(backend, x, v_cond, v_uncond, None, dt, guidance, out, twice)
            return out, twice
    x = euler_step(x, v_cond, dt, v_uncond=v_uncond, guidance=guidance)
    return x, torch.cat((x, x))


class EulerStep(FusedFunction):
    """Saves dt alone: the step is linear in x and the velocities."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        v: Tensor,
        v_uncond: Tensor | None,
        dt: Tensor | None,
        dt_value: float,
        guidance: float,
    ) -> Tensor:
        ctx.save_for_backward(dt)
        ctx.backend, ctx.dt_value, ctx.guidance = backend, dt_value, guidance
        ctx.dtypes = (x.dtype, v.dtype, v.dtype if v_uncond is None else v_uncond.dtype)
        return operators.euler_step_forward(backend, x, v, v_uncond, dt, dt_value, guidance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (dt,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]
        velocities = needed[1:]
        if torch.is_grad_enabled():
            step: Any = ctx.dt_value
            if dt is not None:  # in float32 at least, as the kernels have it
                step = dt.to(torch.promote_types(dt.dtype, torch.float32))
                step = per_sample(step, grad) if step.dim() else step
            factors = (ctx.guidance, 1.0 - ctx.guidance)
            found = [
                step * factor * grad
                for factor, need in zip(factors, velocities, strict=True)
                if need
            ]
        elif any(velocities):
            found = operators.euler_step_backward(
                ctx.backend,
                readable_samples(grad),
                dt,
                ctx.dt_value,
                ctx.guidance,
                mask_of(velocities),
            )
        else:
            found = []
        gradients = [grad if needed[0] else None, *scatter(found, velocities)]
        cast = [
            None if each is None else each.to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (None, *cast, None, None, None)


def _check_dt(dt: Tensor, x: Tensor) -> None:
    if dt.dim() == 0:
        check_tensor(dt, "dt", x)
    else:
        check_batch_vector(dt, "dt", x)


def _check_out(
    out: Tensor, x: Tensor, v: Tensor, v_uncond: Tensor | None, differentiate: bool
) -> None:
    check_like(out, "out", x)
    dtype = reference.result_dtype(x, v, v_uncond)
    if out.dtype != dtype:
        raise ValueError(f"out: got dtype {out.dtype}, need {dtype}")
    if out.shape[0] > 1 and out.stride(0) == 0:
        raise ValueError("out: its samples share memory, need a tensor of its own elements")
    if type(out) is Tensor and not torch.compiler.is_compiling():  # not a tracer's
        for operand in (x, v, v_uncond):
            if operand is not None and operand is not out and partly_shared(out, operand):
                raise ValueError("out: overlaps an operand in part, need none of its memory or all")
    if differentiate or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "out: is given while a gradient is asked for, need out=None or torch.no_grad()"
        )


def partly_shared(out: Tensor, operand: Tensor) -> bool:
    """Whether elements of the two lie in the same memory, but not each in its counterpart's.

    As torch's own check: only where both are dense, so that ranges of memory tell.
    """
    if not (out.is_contiguous() and operand.is_contiguous()) or out.numel() == 0:
        return False
    start, other = out.data_ptr(), operand.data_ptr()
    if start == other and out.dtype == operand.dtype:
        return False
    return start < other + operand.nbytes and other < start + out.nbytes


_library.register_function("euler_step", "flowkernels.ode")
