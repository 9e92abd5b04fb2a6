"""Solvers on a fixed grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from flowkernels.ode.solvers.events import find_event
from flowkernels.ode.solvers.problem import Outputs, Problem, require
from flowkernels.ode.solvers.stages import Sums, runge_kutta, share_memory, shifted
from flowkernels.ode.tableaus import Tableau
from flowkernels.ops._autograd import transforms_tensors

Tensor = torch.Tensor
Times = Sequence[Tensor]
MOST_EVENT_STEPS = 20000


class Stepper(Protocol):
    """Takes one step of a fixed grid."""

    name: str
    nodes: tuple[float, ...]

    def step(
        self, times: Times, y: Tensor, dt: float | Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y₁, slope at the start), from the caller's times of all stages and its signed step.

        ``out`` is where y₁ may be written.
        """
        ...


class RungeKutta:
    """An explicit Runge–Kutta step."""

    def __init__(self, problem: Problem, sums: Sums, tableau: Tableau) -> None:
        self.problem, self.sums, self.tableau = problem, sums, tableau
        self.name, self.nodes = tableau.name, tableau.nodes
        self._copy = False

    def step(
        self, times: Times, y: Tensor, dt: float | Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        slope = self.problem.slope
        first = slope(times[0], y)
        if not self.nodes:
            return self.sums.combine(y, (first,), (1.0,), dt, out), first
        y1, ks = runge_kutta(
            self.sums, self.tableau, slope, times[1:], y,
            first.clone() if self._copy else first, dt, copy=self._copy,
            out=out,
        )  # fmt: skip
        if not self._copy and share_memory(ks):
            self._copy = True
            return self.step(times, y, dt, out)
        return y1, ks[0]


class FixedGrid:
    """Steps along a grid; output between its points is interpolated.

    Args:
        problem: in normal form; its options are read here.
        make: builds the stepper, and takes its own options out of those left.
    """

    def __init__(
        self, problem: Problem, make: Callable[[Problem, Sums, dict[str, Any]], Stepper]
    ) -> None:
        self.problem, self.sums = problem, Sums(problem)
        options = dict(problem.options)
        self.step_size = options.pop("step_size", None)
        self.grid_constructor = options.pop("grid_constructor", None)
        self.interp = options.pop("interp", "linear")
        self.perturb = options.pop("perturb", False)
        self.stepper = make(problem, self.sums, options)
        if self.interp not in ("linear", "cubic"):
            raise ValueError(f"Unknown interpolation method {self.interp}")
        if options:
            warnings.warn(f"{self.stepper.name}: Unexpected arguments {options}", stacklevel=4)
        if self.step_size is not None and self.grid_constructor is not None:
            raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")

    def integrate(self) -> Tensor:
        """The states at the output times, stacked."""
        problem = self.problem
        out_times, outputs = problem.t, Outputs(problem.y0, len(problem.t))
        if len(out_times) == 1:
            return outputs.stacked()
        grid = self._grid()
        ends = (grid[0] == out_times[0]) & (grid[-1] == out_times[-1])
        require(ends, "the grid must begin and end with the first and last of t")
        steps = grid[1:] - grid[:-1]
        times = self._stage_times(grid, steps)
        graded = grid.requires_grad or out_times.requires_grad or transforms_tensors()
        points: Any = grid if graded else grid.tolist()
        sizes: Any = steps * problem.sign
        sizes = sizes.unbind(0) if graded else sizes.tolist()
        values, wanted = grid.tolist(), out_times.tolist()
        notify = problem.callbacks.get("callback_step")
        y, at = problem.y0, 1
        for index, dt in enumerate(sizes):
            if notify is not None:
                notify(grid[index], y, steps[index])
            end = values[index + 1]
            exact = at < len(wanted) and end == wanted[at]
            y1, first = self.stepper.step(times[index], y, dt, outputs.room if exact else None)
            while at < len(wanted) and end >= wanted[at]:
                # A cubic has a slope there, which is the gradient to the time.
                if end == wanted[at] and not (graded and self.interp == "cubic"):
                    outputs.append(y1)
                else:
                    inside = self._interpolant(points[index], points[index + 1], y, first, y1, dt)
                    outputs.append(inside(out_times[at] if graded else wanted[at]))
                at += 1
            y = y1
        return outputs.stacked()

    def integrate_until_event(self) -> tuple[Tensor, Tensor]:
        """(time, [y0, y there]) of the first zero of the event function."""
        problem, event = self.problem, self.problem.event_fn
        assert event is not None
        require(
            self.step_size is not None,
            "Event handling for fixed step solvers currently requires `step_size` to be provided "
            "in options.",
        )
        # float64 whatever the state: twenty thousand float32 additions would drift.
        start = t0 = problem.t[0].to(torch.float64)
        dt, y = self.step_size, problem.y0
        sign = torch.sign(event(t0, y))
        for count in range(1, MOST_EVENT_STEPS + 1):
            t1 = start + count * dt
            grid = torch.stack([t0, t1])
            times = self._stage_times(grid, grid[1:] - grid[:-1])[0]
            y1, first = self.stepper.step(times, y, problem.sign * dt)
            if torch.sign(event(t1, y1)) != sign:
                inside = self._interpolant(t0, t1, y, first, y1, problem.sign * dt)
                tolerance = problem.atol
                if isinstance(tolerance, Tensor):
                    tolerance = float(tolerance.min())
                found, state = find_event(inside, sign, t0, t1, event, tolerance)
                return found, torch.stack([problem.y0, state])
            t0, y = t1, y1
        raise RuntimeError(f"Reached maximum number of iterations {MOST_EVENT_STEPS}.")

    def _grid(self) -> Tensor:
        t = self.problem.t
        if self.grid_constructor is not None:
            return self.grid_constructor(self.problem.slope, self.problem.y0, t).to(t.device)
        if self.step_size is None:
            return t
        count = math.ceil(((t[-1] - t[0]) / self.step_size + 1).item())
        steps = torch.arange(0, count, dtype=t.dtype, device=t.device) * self.step_size
        return torch.cat([(steps + t[0])[:-1], t[-1:]])

    def _stage_times(self, grid: Tensor, steps: Tensor) -> list[Times]:
        """The caller's times of all stages of all steps."""
        columns = [grid[:-1]]
        columns += [grid[1:] if c == 1.0 else grid[:-1] + steps * c for c in self.stepper.nodes]
        columns = [column.to(self.problem.time_dtype) for column in columns]
        if self.perturb:
            # Just inside the step, on both ends: the slope may jump at points of the grid.
            columns = [
                shifted(column, up=index == 0) if index == 0 or c == 1.0 else column
                for index, (column, c) in enumerate(
                    zip(columns, (0.0, *self.stepper.nodes), strict=True)
                )
            ]
        table = [self.problem.user_time(column).unbind(0) for column in columns]
        return list(zip(*table, strict=True))

    def _interpolant(
        self, t0: Any, t1: Any, y0: Tensor, first: Tensor, y1: Tensor, dt: float | Tensor
    ) -> Callable[[Any], Tensor]:
        """A function of τ between t0 and t1: linear, or cubic with the slopes at both ends."""
        if self.interp == "linear":
            return lambda t: y0 + ((t - t0) / (t1 - t0)) * (y1 - y0)
        end = (
            t1
            if isinstance(t1, Tensor)
            else torch.tensor(t1, dtype=torch.float64, device=y0.device)
        )
        last = self.problem.slope(self.problem.user_time(end.to(self.problem.time_dtype)), y1)

        def cubic(t: Any) -> Tensor:
            x = (t - t0) / (t1 - t0)
            rest = 1 - x
            values = (1 + 2 * x) * rest * rest * y0 + x * x * (3 - 2 * x) * y1
            return values + dt * (x * rest * rest * first - x * x * rest * last)

        return cubic
