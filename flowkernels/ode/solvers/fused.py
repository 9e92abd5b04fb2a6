"""Adaptive steps in few launches: the device decides, and selects what it goes on from.

A step of s stages is s launches beside the right-hand side's (s + 1 where the last stage is not at
y₁), for dopri5 and tsit5 seven:

    rk_begin     the state and slope that the last step left, and this one's first stage sum
    rk_combine   the other stage sums
    rk_control   error, norm, acceptance, and the plan of the next step: t, dt, its stages' times

On CUDA a copy of the record to the host follows, which nothing waits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flowkernels.ode.solvers.stages import share_memory
from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step.reference import SIZE, START, STEP, plan_step

if TYPE_CHECKING:
    from flowkernels.ode.solvers.tensors import TensorAdaptive

Tensor = torch.Tensor

_combine = operators.rk_combine_forward.default
_control = operators.rk_control.default
_begin = operators.rk_begin.default


class Taken(NamedTuple):
    """A step as it was taken: what its interpolant needs, and its record on the way to the host.

    ``dt`` is the caller's, signed.
    """

    y: Tensor
    ks: list[Tensor]
    t: Tensor
    dt: Tensor
    record: Tensor
    copied: Any


class FusedSteps:
    """Takes the steps of a solver that has begun and that asks nothing more of them."""

    def __init__(self, solver: TensorAdaptive) -> None:
        self.solver, self.problem, self.tableau = solver, solver.problem, solver.tableau
        self.limits = list(solver.limits)
        self.nodes = list(self.tableau.nodes)
        t, size = solver.t.detach().contiguous(), solver.dt
        self.plan, self.times = plan_step(
            t, size, self.nodes, solver.limits, self.problem.time_dtype
        )
        self.tickets = torch.zeros(t.shape, dtype=torch.int32, device=t.device)
        self.previous: tuple[Tensor, ...] | None = None

    def take(self) -> Taken:
        """One step for all rows, of dt = 0 for those that are done; nothing is read back."""
        solver, problem, tableau, dt = self.solver, self.problem, self.tableau, self.plan[STEP]
        if self.previous is None:
            y, slope = solver.y, solver.slope
            at = _combine(y, [slope], tableau.rows[0], None, dt, 0.0)
        else:
            y, slope, at = _begin(*self.previous, dt, tableau.rows[0][0])
        ks = self._stages(y, slope, at, dt)
        if ks is None:
            return self._leave(y, slope)
        y1 = ks.pop()
        record, plan, accepted, times = _control(
            ks, tableau.error, dt, self.plan, y, y1,
            problem.rtol, problem.atol, self.nodes, self.limits, self.tickets,
        )  # fmt: skip
        taken = Taken(y, ks, self.plan[START], dt, record, solver.send(record))
        self.previous = (y, y1, ks[0], ks[-1], accepted)
        self.plan, self.times = plan, times
        return taken

    def _stages(self, y: Tensor, slope: Tensor, at: Tensor, dt: Tensor) -> list[Tensor] | None:
        """The stages, and after them y₁; None where a gradient came up."""
        solver, tableau = self.solver, self.tableau
        ks = [slope]
        for row, time in zip(tableau.rows, self.times.unbind(0), strict=True):
            if len(ks) > 1:
                at = _combine(y, ks, row, None, dt, 0.0)
            k = self.problem.slope(time, at)
            if k.requires_grad and torch.is_grad_enabled():
                return None
            ks.append(k.clone() if solver.copy else k.contiguous())
        if not solver.copy and share_memory(ks):
            # The right-hand side overwrites what it returned before: again, on copies.
            solver.copy = True
            slope = solver.slope_at(self.plan[START], y).clone()
            at = _combine(y, [slope], tableau.rows[0], None, dt, 0.0)
            return self._stages(y, slope, at, dt)
        if not tableau.ends_with_solution:
            at = _combine(y, ks, tableau.solution, None, dt, 0.0)
        return [*ks, at]

    def _leave(self, y: Tensor, slope: Tensor) -> Taken:
        """This step again, and all that follow, in plain PyTorch: they are differentiable."""
        solver = self.solver
        solver.y, solver.slope = y, slope
        solver.t, solver.dt = self.plan[START], self.plan[SIZE]
        solver.take = solver.step
        return solver.step()
