"""Step size control: what the adaptive solvers' options say, on the host and on the device.

After a step of error ratio r (norm of the error over its tolerance) and a method of order p

    dt ← dt · clip(safety·r^(-1/p), dfactor, ifactor)

where dfactor is 1 after an accepted step (Hairer, Nørsett and Wanner, Solving Ordinary Differential
Equations I, II.4).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from flowkernels.ode.solvers.problem import Problem
from flowkernels.ode.solvers.stages import Sums
from flowkernels.ode.tableaus import Tableau
from flowkernels.ops.step.reference import Limits

Tensor = torch.Tensor


@dataclass
class Controller:
    """The options of an adaptive solver.

    Attributes:
        order: of the method.
        min_step, max_step: bounds of dt; a step of at most ``min_step`` is always accepted.
        first_step: dt of the first step; None to choose it (see :func:`first_step`).
        safety, ifactor, dfactor: see above.
        max_num_steps: between two output times.
        step_t, jump_t: ascending times to step on; at those of ``jump_t`` the slope jumps.
        dtype: of times on the device.
    """

    order: int
    min_step: float
    max_step: float
    first_step: float | None
    safety: float
    ifactor: float
    dfactor: float
    max_num_steps: int
    step_t: Tensor
    jump_t: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, problem: Problem, tableau: Tableau) -> Controller:
        """Reads the problem's options; warns of those that are left."""
        options = dict(problem.options)
        for name in ("per_sample", "sync_every"):
            options.pop(name, None)
        first = options.pop("first_step", None)
        start = problem.t[0].detach()
        steps, jumps = (
            _times_from(options.pop(name, None), start, problem) for name in ("step_t", "jump_t")
        )
        dtype = options.pop("dtype", torch.float64)
        made = cls(
            order=tableau.order,
            min_step=float(options.pop("min_step", 0.0)),
            max_step=float(options.pop("max_step", math.inf)),
            first_step=None if first is None else float(first),
            safety=float(options.pop("safety", 0.9)),
            ifactor=float(options.pop("ifactor", 10.0)),
            dfactor=float(options.pop("dfactor", 0.2)),
            max_num_steps=int(options.pop("max_num_steps", 2**31 - 1)),
            step_t=steps,
            jump_t=jumps,
            dtype=torch.promote_types(dtype, problem.dtype.to_real()),
        )
        if len(set(steps.tolist()) | set(jumps.tolist())) < len(steps) + len(jumps):
            raise ValueError(
                "`step_t` and `jump_t` must not have any repeated elements between them."
            )
        if options:
            warnings.warn(f"{tableau.name}: Unexpected arguments {options}", stacklevel=5)
        return made

    def next_size(self, dt: float, ratio: float) -> float:
        """dt of the next step, after one of error ratio ``ratio``."""
        if ratio == 0.0:
            factor = self.ifactor
        elif math.isnan(ratio):
            return math.nan
        else:
            least = 1.0 if ratio < 1.0 else self.dfactor
            factor = min(self.ifactor, max(self.safety / ratio ** (1.0 / self.order), least))
        return self.bounded(dt * factor)

    def bounded(self, dt: float) -> float:
        return min(max(dt, self.min_step), self.max_step)

    def limits(self, problem: Problem) -> Limits:
        """What bounds steps that tensors control, to the last output time."""
        return Limits(
            self.order, self.safety, self.ifactor, self.dfactor, self.min_step, self.max_step,
            problem.t[-1].item(), problem.sign,
        )  # fmt: skip


def _times_from(values: Any, start: Tensor, problem: Problem) -> Tensor:
    """The times from the start on, in order."""
    if values is None:
        return torch.empty(0, dtype=torch.float64, device=problem.y0.device)
    times = torch.as_tensor(values, dtype=torch.float64, device=problem.y0.device)
    return times[times >= start.to(torch.float64)].sort().values


def first_step(
    problem: Problem, sums: Sums, t0: Tensor, slope0: Tensor, order: int, slope: Any
) -> Tensor:
    """A first step from the sizes of y, its slope and that slope's change: 0-d, or [B].

    (Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, II.4.) One more call of
    the right-hand side.

    Args:
        problem: in normal form.
        sums: of the problem.
        t0: τ, 0-d or [B].
        slope0: there.
        order: of the method.
        slope: of (τ, y).
    """
    rows = t0.dim() > 0
    with torch.no_grad():
        y0 = problem.y0.detach()
        f0 = slope0.detach().to(sums.compute)
        wide = y0.to(sums.compute)
        scale = problem.atol + wide.abs() * problem.rtol
        d0, d1 = sums.norm(wide / scale, rows), sums.norm(f0 / scale, rows)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        y1 = sums.combine(y0, (slope0.detach(),), (1.0,), problem.sign * h0)
        f1 = slope(t0 + h0, y1).detach().to(sums.compute)
        d2 = sums.norm((f1 - f0) / scale, rows) / h0
        small = (d1 <= 1e-15) & (d2 <= 1e-15)
        h1 = (0.01 / torch.maximum(d1, d2)) ** (1.0 / order)
        h1 = torch.where(small, torch.clamp(h0 * 1e-3, min=1e-6), h1)
        return torch.minimum(100 * h0, h1)
