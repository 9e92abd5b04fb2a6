"""Adaptive Runge–Kutta steps controlled by the host: one look at the error a step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from flowkernels.ode.solvers.controller import Controller, first_step
from flowkernels.ode.solvers.events import find_event
from flowkernels.ode.solvers.problem import Outputs, Problem
from flowkernels.ode.solvers.stages import (
    Sums,
    runge_kutta,
    share_memory,
    shifted,
    stage_times,
)
from flowkernels.ode.tableaus import Tableau
from flowkernels.ops._autograd import transforms_tensors

Tensor = torch.Tensor


class Interval(NamedTuple):
    """An accepted step: what its interpolant needs.

    ``start`` is t0 as a tensor where a gradient runs through it, ``size`` dt likewise.
    """

    t0: float
    t1: float
    dt: float
    y0: Tensor
    y1: Tensor
    ks: list[Tensor]
    start: Tensor | None
    size: Tensor | None


class HostAdaptive:
    """Steps until the output times are passed; the states there are interpolated."""

    def __init__(self, problem: Problem, tableau: Tableau) -> None:
        self.problem, self.tableau = problem, tableau
        self.sums = Sums(problem)
        self.control = control = Controller.of(problem, tableau)
        self.stops = sorted(
            [(t, False) for t in control.step_t.tolist()]
            + [(t, True) for t in control.jump_t.tolist()]
        )
        self.copy = False
        self.unsure = True  # whether the state has to be looked at for infinities

    def integrate(self) -> Tensor:
        """The states at the output times, stacked."""
        problem = self.problem
        times = problem.t.tolist()
        outputs = Outputs(problem.y0, len(times))
        if len(times) > 1:
            self._begin(times[0])
            graded = problem.t.unbind(0) if self._graded() else None
            for index, t in enumerate(times[1:], 1):
                interval = self._advance(t)
                at = None if graded is None else graded[index]
                outputs.append(self.interpolate(interval, t, at, outputs.room))
        return outputs.stacked()

    def intervals(self) -> Iterator[Interval]:
        """The accepted steps until the last output time."""
        times = self.problem.t.tolist()
        self._begin(times[0])
        end, taken = times[-1], 0
        while end > self.t:
            self._check_count(taken)
            taken += 1
            if self._step():
                assert self.last is not None
                yield self.last

    def integrate_until_event(self) -> tuple[Tensor, Tensor]:
        """(time, [y0, y there]) of the first zero of the event function."""
        problem, event = self.problem, self.problem.event_fn
        assert event is not None
        self._begin(problem.t.tolist()[0])
        value = event(self._tensor(self.t), self.y)
        if value == 0:
            return self._tensor(self.t), torch.stack([problem.y0, self.y])
        sign, taken = torch.sign(value), 0
        while torch.sign(event(self._tensor(self.t), self.y)) == sign:
            self._check_count(taken)
            self._step()
            taken += 1
        interval = self.last
        assert interval is not None
        tolerance = problem.atol
        if isinstance(tolerance, Tensor):
            tolerance = float(tolerance.min())
        ends = self._tensor(interval.t0), self._tensor(interval.t1)

        def inside(t: Tensor) -> Tensor:
            return self.interpolate(interval, float(t))

        found, state = find_event(inside, sign, *ends, event, tolerance)
        return found, torch.stack([problem.y0, state])

    def interpolate(
        self,
        interval: Interval,
        t: float,
        graded: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The state at a time of an accepted step.

        ``graded`` is t where a gradient is asked of it, ``out`` where the state may be written.
        """
        sign = self.problem.sign
        if graded is None and interval.start is None and interval.size is None:
            if t == interval.t1:
                return interval.y1
            weights = self.tableau.weights_at((t - interval.t0) / interval.dt)
            return self.sums.combine(interval.y0, interval.ks, weights, sign * interval.dt, out)
        dt = interval.dt if interval.size is None else interval.size
        start = interval.t0 if interval.start is None else interval.start
        x = ((t if graded is None else graded) - start) / dt
        y, power = interval.y0, x
        for row in self.tableau.interpolant:
            y = self.sums.combine(y, interval.ks, row, sign * dt * power)
            power = power * x
        return y

    # Steps ----------------------------------------------------------------------------------------

    def _begin(self, t0: float) -> None:
        problem, control = self.problem, self.control
        self.t, self.y = t0, problem.y0
        start = problem.t[0]
        self.start: Tensor | None = start.to(torch.float64) if self._graded() else None
        self.slope = problem.slope(self._time(t0, self.start), self.y)
        if control.first_step is not None:
            self.dt = control.first_step
        else:
            at = torch.tensor(t0, dtype=torch.float64, device=self.y.device)
            before = self.slope if self.slope.requires_grad else self.slope.clone()
            again: list[Tensor] = []

            def slope(tau: Tensor, y: Tensor) -> Tensor:
                again.append(problem.slope(problem.user_time(tau.to(problem.time_dtype)), y))
                return again[0]

            self.dt = float(first_step(problem, self.sums, at, before, control.order, slope))
            if share_memory([self.slope, again[0]]):
                self.copy, self.slope = True, before
        self.next_stop = bisect.bisect(self.stops, (t0, True))
        self.last: Interval | None = None

    def _graded(self) -> bool:
        """Whether gradients or tangents run through the times."""
        return self.problem.t.requires_grad or transforms_tensors()

    def _advance(self, t: float) -> Interval:
        """Steps until t is passed; the step that it lies in."""
        taken = 0
        while t > self.t:
            self._check_count(taken)
            self._step()
            taken += 1
        assert self.last is not None
        return self.last

    def _check_count(self, taken: int) -> None:
        most = self.control.max_num_steps
        if taken >= most:
            raise AssertionError(f"max_num_steps exceeded ({taken}>={most})")

    def _step(self) -> bool:
        """One attempt; whether it was accepted."""
        problem, control, t0, y0 = self.problem, self.control, self.t, self.y
        dt = control.bounded(self.dt if math.isfinite(self.dt) else control.min_step)
        notify = bool(problem.callbacks)
        if notify:
            problem.notify("callback_step", t0, y0, dt)
        t1 = t0 + dt
        if not t1 > t0:
            raise AssertionError(f"underflow in dt {dt}")
        if self.unsure:
            if not torch.isfinite(y0).all():
                raise AssertionError(f"non-finite values in state `y`: {y0}")
            self.unsure = False
        size, stop = None, self._stop_within(t0, t1)
        if stop is not None:
            t1 = stop[0]
            dt = t1 - t0
            if self.start is not None:
                size = t1 - self.start
        y1, ks = self._stages(t0, dt, t1, size)
        ratio = self._ratio(ks, dt, y0, y1)
        accepted = ratio <= 1.0 or dt <= control.min_step
        self.unsure = not math.isfinite(ratio)
        if notify:
            name = "callback_accept_step" if accepted else "callback_reject_step"
            problem.notify(name, t0, y0, dt)
        if accepted:
            self.last = Interval(t0, t1, dt, y0, y1, ks, self.start, size)
            self.t, self.y, self.slope = t1, y1, ks[-1]
            if stop is not None:
                self._pass(stop)
            elif self.start is not None:
                self.start = self.start + dt
        self.dt = control.next_size(dt, ratio)
        return accepted

    def _stop_within(self, t0: float, t1: float) -> tuple[float, bool] | None:
        """The next time to step on, and whether the slope jumps there, if this step reaches it."""
        while self.next_stop < len(self.stops):
            stop = self.stops[self.next_stop]
            if stop[0] > t0:
                return stop if stop[0] <= t1 else None
            self.next_stop += 1
        return None

    def _pass(self, stop: tuple[float, bool]) -> None:
        t, jump = stop
        self.start = None  # the time of a stop is given: no gradient runs through it
        if jump:
            problem = self.problem
            after = torch.tensor(t, dtype=problem.time_dtype, device=self.y.device)
            self.slope = problem.slope(problem.user_time(shifted(after, up=True)), self.y)
            if self.copy:
                self.slope = self.slope.clone()

    def _stages(
        self, t0: float, dt: float, t1: float, size: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        problem, tableau = self.problem, self.tableau
        if self.start is None:
            times: Any = stage_times(tableau, t0, dt, t1, problem.sign, self.y, problem.time_dtype)
        else:
            times = self._graded_times(dt if size is None else size, None if size is None else t1)
        step = problem.sign * (dt if size is None else size)
        y1, ks = runge_kutta(
            self.sums, tableau, problem.slope, times, self.y, self.slope, step, copy=self.copy
        )
        if not self.copy and share_memory(ks):
            # The right-hand side overwrites what it returned before: again, on copies.
            self.copy = True
            self.slope = problem.slope(self._time(t0, self.start), self.y).clone()
            return self._stages(t0, dt, t1, size)
        return y1, ks

    def _graded_times(self, dt: float | Tensor, end: float | None) -> list[Tensor]:
        """As :func:`stage_times`, with the gradient of the step's start."""
        assert self.start is not None
        dtype, found = self.problem.time_dtype, []
        for c in self.tableau.nodes:
            if c == 1.0 and end is not None:
                time = self.start.new_tensor(end, dtype=dtype)
            else:
                time = (self.start + c * dt).to(dtype)
            found.append(self.problem.user_time(shifted(time, up=False) if c == 1.0 else time))
        return found

    def _ratio(self, ks: list[Tensor], dt: float, y0: Tensor, y1: Tensor) -> float:
        if y1.requires_grad or ks[-1].requires_grad:
            with torch.no_grad():
                return self._ratio([k.detach() for k in ks], dt, y0.detach(), y1.detach())
        return self.sums.error_ratio(ks, self.tableau.error, dt, y0, y1)  # type: ignore[return-value]

    def _tensor(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=torch.float64, device=self.y.device)

    def _time(self, t: float, graded: Tensor | None) -> Tensor:
        """The caller's time, in the dtype that the right-hand side is given."""
        dtype = self.problem.time_dtype
        if graded is not None:
            return self.problem.user_time(graded.to(dtype))
        return torch.tensor(self.problem.sign * t, dtype=dtype, device=self.y.device)


def dense_coefficients(
    solver: HostAdaptive, each: Callable[[Interval], None] | None = None
) -> tuple[list[float], list[Tensor]]:
    """(τ at the steps' ends, coefficients [5, ...] of each step's quartic in x)."""
    times, coefficients = [solver.problem.t.tolist()[0]], []
    weights = torch.tensor(solver.tableau.interpolant, dtype=torch.float64, device="cpu")
    for interval in solver.intervals():
        stages = torch.stack(interval.ks)
        table = weights.to(device=stages.device, dtype=stages.dtype)
        with torch.autocast(stages.device.type, enabled=False):
            terms = torch.tensordot(table, stages, 1) * (solver.problem.sign * interval.dt)
        coefficients.append(torch.cat([interval.y0.unsqueeze(0), terms]))
        times.append(interval.t1)
        if each is not None:
            each(interval)
    return times, coefficients
