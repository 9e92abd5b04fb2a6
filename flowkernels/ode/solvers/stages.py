"""What every Runge–Kutta step is made of: stage sums, error norms, the times of the stages.

Without gradients a stage sum is one kernel, and so is an error norm. With gradients, tangents,
complex states, other norms and tolerances by element it is plain PyTorch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import torch

from flowkernels.ode.solvers.problem import Problem
from flowkernels.ode.tableaus import Tableau
from flowkernels.ops import _library
from flowkernels.ops._autograd import transforms_tensors
from flowkernels.ops._samples import per_sample
from flowkernels.ops.step import _operators as operators

Tensor = torch.Tensor

_KERNEL_DTYPES = (*_library.KERNEL_DTYPES, torch.float64)
_combine = operators.rk_combine_forward.default
_combine_out = operators.rk_combine_out.default
_error = operators.rk_error.default
_SINGLE, _BITS = struct.Struct("<f"), struct.Struct("<i")


class Sums:
    """Stage sums and error norms over the states of one problem."""

    def __init__(self, problem: Problem) -> None:
        y0 = problem.y0
        self.problem = problem
        served = y0.dtype in _KERNEL_DTYPES and not transforms_tensors()
        self.kernels = _library.choose("rk_combine", y0.device, served) != "reference"
        self.compute = torch.promote_types(y0.dtype, torch.float32)
        self.half = y0.dtype != self.compute
        simple = problem.norm is None and problem.packing is None
        self.fused_norm = (
            simple and not isinstance(problem.rtol, Tensor) and not isinstance(problem.atol, Tensor)
        )

    def combine(
        self,
        y: Tensor,
        ks: Sequence[Tensor],
        weights: Sequence[float],
        dt: float | Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """``y + dt·Σ_i weights[i]·ks[i]``; dt a number or a tensor, 0-d or [B].

        ``out`` is where the result may be written: it is returned where it was.
        """
        if len(ks) == 1 and not isinstance(dt, Tensor):
            (k,) = ks  # half a kernel's host time, differentiable, and read at any strides
            if out is None or not self.kernels or k.requires_grad or y.requires_grad:
                return torch.add(y, k, alpha=weights[0] * dt)
            return torch.add(y, k, alpha=weights[0] * dt, out=out)
        if self.plain(y, *ks) or (isinstance(dt, Tensor) and dt.requires_grad):
            return self._differentiable(y, ks, weights, dt)
        return self.fused(y, ks, weights, dt, out)

    def plain(self, *tensors: Tensor) -> bool:
        """Whether the kernels do not serve a sum over these tensors."""
        if not self.kernels:
            return True
        graded = torch.is_grad_enabled()
        for tensor in tensors:
            if not tensor.is_contiguous() or (graded and tensor.requires_grad):
                return True
        return False

    def fused(
        self,
        y: Tensor,
        ks: Sequence[Tensor],
        weights: Sequence[float],
        dt: float | Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """:meth:`combine` of operands that are not :meth:`plain`."""
        if isinstance(dt, Tensor):
            return _combine(y, ks, weights, None, dt, 0.0)
        if len(ks) == 1:
            return self.combine(y, ks, weights, dt, out)
        if out is not None:
            _combine_out(y, ks, weights, None, None, dt, out)
            return out
        return _combine(y, ks, weights, None, None, dt)

    def _differentiable(
        self, y: Tensor, ks: Sequence[Tensor], weights: Sequence[float], dt: float | Tensor
    ) -> Tensor:
        if self.half:
            total = self._differentiable_sum(y.to(self.compute), ks, weights, dt)
            return total.to(y.dtype)
        return self._differentiable_sum(y, ks, weights, dt)

    def _differentiable_sum(
        self, y: Tensor, ks: Sequence[Tensor], weights: Sequence[float], dt: float | Tensor
    ) -> Tensor:
        terms = [(k.to(self.compute), w) for k, w in zip(ks, weights, strict=True) if w != 0.0]
        if not terms:
            return y
        # The sum first: its roundings are of the size of a step, not of the state.
        total = terms[0][0] * terms[0][1]
        for k, w in terms[1:]:
            total = torch.add(total, k, alpha=w)
        if isinstance(dt, Tensor):
            return y + self.column(dt) * total
        return torch.add(y, total, alpha=dt)

    def column(self, values: Tensor) -> Tensor:
        """A number for each sample, or one for all, against states."""
        values = values.to(self.problem.time_dtype)
        return per_sample(values, self.problem.y0) if values.dim() == 1 else values

    def error_ratio(
        self,
        ks: Sequence[Tensor],
        weights: Sequence[float],
        dt: float | Tensor,
        y0: Tensor,
        y1: Tensor,
    ) -> float | Tensor:
        """The error's norm over the tolerance: a number where dt is one, else dt's shape."""
        if y0.numel() == 0:
            return torch.zeros_like(dt) if isinstance(dt, Tensor) else 0.0
        if not self.fused_norm or self.plain(y0, y1, *ks):
            return self._ratio(ks, weights, dt, y0, y1)
        vector, number = (dt, 0.0) if isinstance(dt, Tensor) else (None, dt)
        _, norm = _error(
            ks, weights, None, vector, number, y0, y1,
            None, None, self.problem.rtol, self.problem.atol, False,
        )  # fmt: skip
        return norm.item() if vector is None else norm

    def _ratio(
        self,
        ks: Sequence[Tensor],
        weights: Sequence[float],
        dt: float | Tensor,
        y0: Tensor,
        y1: Tensor,
    ) -> float | Tensor:
        """Any norm, tolerances and tuples, in plain PyTorch."""
        error = _weighted([k.to(self.compute) for k in ks], weights)
        error = error * (self.column(dt) if isinstance(dt, Tensor) else dt)
        ratio = self.norm(
            self.relative(error, y0, y1), rows=isinstance(dt, Tensor) and dt.dim() > 0
        )
        return ratio if isinstance(dt, Tensor) else float(ratio)

    def relative(self, error: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        """``error / (atol + rtol·max(|y0|, |y1|))``."""
        largest = torch.maximum(y0.abs(), y1.abs()).to(self.compute.to_real())
        return error / (self.problem.atol + self.problem.rtol * largest)

    def norm(self, y: Tensor, rows: bool) -> Tensor:
        """The problem's norm of a state, or of each of its samples."""
        problem = self.problem
        if y.numel() == 0:
            return y.new_zeros(y.shape[:1] if rows else (), dtype=self.compute.to_real())
        if not rows or problem.norm is not None:
            return abs(problem.norm_of(y))
        parts = (y,) if problem.packing is None else problem.packing.unpack(y)
        norms = [part.abs().square().reshape(len(part), -1).mean(1).sqrt() for part in parts]
        return norms[0] if len(norms) == 1 else torch.stack(norms).amax(0)


def _weighted(ks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_i weights[i]·ks[i], without gradients."""
    total = None
    for k, w in zip(ks, weights, strict=True):
        if w == 0.0:
            continue
        if total is None:
            total = torch.mul(k, w)
        else:
            total.add_(k, alpha=w)
    return torch.zeros_like(ks[0]) if total is None else total


def runge_kutta(
    sums: Sums,
    tableau: Tableau,
    slope: Callable[[Tensor, Tensor], Tensor],
    times: Sequence[Tensor],
    y: Tensor,
    first: Tensor,
    dt: float | Tensor,
    *,
    copy: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One step: (y₁, stages).

    Args:
        sums: of the problem.
        tableau: the method.
        slope: dy/dt at the caller's time.
        times: of the stages after the first.
        y: the state.
        first: the slope there.
        dt: of the caller's time, signed.
        copy: keep copies of what ``slope`` returns, which it will overwrite.
        out: where y₁ may be written; it is y₁ then.
    """
    ks, at = [first], y
    plain = sums.plain(y, first) or (isinstance(dt, Tensor) and dt.requires_grad)
    for row, time in zip(tableau.rows, times, strict=True):
        at = sums.combine(y, ks, row, dt) if plain else sums.fused(y, ks, row, dt)
        k = slope(time, at)
        plain = plain or k.requires_grad or not k.is_contiguous()
        ks.append(k.clone() if copy else k)
    if tableau.ends_with_solution:
        return at, ks
    if plain:
        return sums.combine(y, ks, tableau.solution, dt), ks
    return sums.fused(y, ks, tableau.solution, dt, out), ks


def share_memory(ks: Sequence[Tensor]) -> bool:
    """Whether a right-hand side hands out one buffer again and again."""
    try:
        return len({k.data_ptr() for k in ks}) < len(ks)
    except RuntimeError:  # a tracer's tensors have no memory
        return False


def stage_times(
    tableau: Tableau, t0: float, dt: float, t1: float, sign: int, like: Tensor, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The caller's times of the stages after the first, the last ones just before t₁.

    A right-hand side may jump at the end of a step: the step is to see this side of it.
    """
    before = previous(t1, dtype)
    values = [sign * (before if c == 1.0 else t0 + c * dt) for c in tableau.nodes]
    return torch.tensor(values, dtype=dtype, device=like.device).unbind(0)


def previous(t: float, dtype: torch.dtype) -> float:
    """The number before t in ``dtype``, after rounding t to it."""
    if dtype == torch.float64:
        return math.nextafter(t, -math.inf)
    (bits,) = _BITS.unpack(_SINGLE.pack(t))
    bits = bits - 1 if bits > 0 else bits + 1 if bits < 0 else 1 - 2**31
    return _SINGLE.unpack(_BITS.pack(bits))[0]


def shifted(t: Tensor, up: bool) -> Tensor:
    """The neighbour of each time, with t's gradient."""
    with torch.no_grad():
        step = torch.nextafter(t, t.new_tensor(math.inf if up else -math.inf)) - t
    return t + step
