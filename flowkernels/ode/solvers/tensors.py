"""Adaptive Runge–Kutta steps controlled on the device: one dt for all samples, or one for each.

Time, step size, error ratio and acceptance are tensors, 0-d or [B]; a step enqueues work and reads
nothing back. What was decided is written into a record a step, and the host looks at the records
later: every ``sync_every`` steps, or by default on CUDA at the previous step's while this one runs.
Only then does it know which output times were passed, and interpolates them from the steps it kept.
Samples that are past the last output time stand still: their steps have dt = 0 at their last time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from flowkernels.ode.solvers.controller import Controller, first_step
from flowkernels.ode.solvers.fused import FusedSteps, Taken
from flowkernels.ode.solvers.problem import Problem
from flowkernels.ode.solvers.stages import Sums, runge_kutta, share_memory, shifted
from flowkernels.ode.tableaus import Tableau
from flowkernels.ops._autograd import transforms_tensors
from flowkernels.ops.step.reference import ACCEPTED, MOVING, STUCK, next_sizes

Tensor = torch.Tensor


def wants_tensors(problem: Problem) -> bool:
    """Whether the device controls the steps: where each sample has its own, or by ``sync_every``.

    Events, callbacks, times to stop at and gradients through the solver take a look every step:
    the host controls those.
    """
    if problem.options.get("per_sample"):
        _check_per_sample(problem)
        return True
    every = problem.options.get("sync_every")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"sync_every: got {every!r}, need an integer of at least 1")
    late = every is None and problem.y0.device.type == "cuda"
    stops = problem.options.get("step_t") is not None or problem.options.get("jump_t") is not None
    graded = torch.is_grad_enabled() and (problem.y0.requires_grad or problem.t.requires_grad)
    graded = graded or transforms_tensors()
    looks = stops or graded or problem.event_fn is not None or bool(problem.callbacks)
    return (late or (every or 1) > 1) and not looks


def _check_per_sample(problem: Problem) -> None:
    y0 = problem.y0
    if y0.dim() == 0:
        raise ValueError("y0: got a tensor with no dimension, need [B, ...] for per_sample")
    if problem.event_fn is not None:
        raise ValueError("event_fn: per_sample has no events, need one solve for each sample")


class TensorAdaptive:
    """Steps until the records show that every output time is passed."""

    def __init__(self, problem: Problem, tableau: Tableau) -> None:
        self.problem, self.tableau = problem, tableau
        self.sums = Sums(problem)
        self.control = Controller.of(problem, tableau)
        self.rows = problem.y0.shape[:1] if problem.options.get("per_sample") else ()
        stops = torch.cat([self.control.step_t, self.control.jump_t])
        order = stops.argsort()
        infinity = stops.new_full((1,), torch.inf)
        self.stops = torch.cat([stops[order], infinity]).to(self.control.dtype)
        self.jumps = order >= len(self.control.step_t)
        self.copy = False

    def integrate(self) -> Tensor:
        """The states at the output times, stacked."""
        problem = self.problem
        if len(problem.t) == 1:
            return torch.stack([problem.y0])
        self.outputs = [problem.y0, *(torch.zeros_like(problem.y0) for _ in problem.t[1:])]
        self.out_times = problem.t.to(self.control.dtype)
        self.host_times = self.out_times.tolist()
        self.limits = self.control.limits(problem)
        self._begin()
        self.take: Callable[[], Taken] = FusedSteps(self).take if self._fuses() else self.step
        every = self._every()
        kept: deque[Taken] = deque()
        while self.pending:
            kept.append(self.take())
            if every is None:
                if len(kept) > 1:
                    self._look([kept.popleft()])
            elif len(kept) >= every:
                self._look(list(kept))
                kept.clear()
        return torch.stack(self.outputs)

    def integrate_until_event(self) -> tuple[Tensor, Tensor]:
        raise ValueError("event_fn: per_sample has no events, need one solve for each sample")

    def _watched(self) -> bool:
        """Whether more than numbers comes of a step: gradients, callbacks, times to stop at."""
        graded = torch.is_grad_enabled() and (
            self.slope.requires_grad or self.y.requires_grad or self.t.requires_grad
        )
        return graded or bool(self.problem.callbacks) or len(self.stops) > 1

    def _fuses(self) -> bool:
        """Whether kernels serve all of a step: the norm is theirs, times are float64."""
        kernels = self.sums.fused_norm and not self.sums.plain(self.y, self.slope)
        return (
            kernels
            and self.y.numel() > 0
            and self.control.dtype == torch.float64
            and not self._watched()
        )

    def _every(self) -> int | None:
        """How many steps a look; None for one a step, a step late."""
        if self._watched():
            return 1
        every = self.problem.options.get("sync_every")
        if every is None and self.y.device.type == "cuda":
            return None
        return 1 if every is None else int(every)

    # On the device -------------------------------------------------------------------------------

    def _begin(self) -> None:
        problem, control = self.problem, self.control
        self.y = problem.y0
        self.t = problem.t[0].to(control.dtype).expand(self.rows)
        self.slope = self.slope_at(self.t, self.y)
        count = self.rows[0] if self.rows else 1
        self.pending = count * (len(problem.t) - 1)
        # Since the last output, on the host.
        self.taken = torch.zeros(count, dtype=torch.int64, device="cpu")
        if control.first_step is not None:
            self.dt = torch.full_like(self.t.detach(), control.first_step)
        else:
            t, slope = self.t.detach(), self.slope.clone()
            found = first_step(problem, self.sums, t, slope, control.order, self.slope_at)
            self.dt = found.to(control.dtype)
        self.dt = self.dt.contiguous()

    def slope_at(self, tau: Tensor, y: Tensor) -> Tensor:
        return self.problem.slope(self.problem.user_time(tau.to(self.problem.time_dtype)), y)

    def step(self) -> Taken:
        """Take one step for all rows, of dt = 0 for those that are done; nothing is read back."""
        control, limits, t, y = self.control, self.limits, self.t, self.y
        with torch.no_grad():
            size = torch.where(torch.isfinite(self.dt), self.dt, control.min_step)
            size = size.clamp(control.min_step, control.max_step)
            moving = t < limits.end
        self.problem.notify("callback_step", t, y, size)
        sign = self.problem.sign
        t1, dt, on_stop = self._stopped(t, size)
        stuck = moving & ~(t1.detach() > t.detach())
        dt = torch.where(moving, dt, 0.0)
        t1 = torch.where(moving, t1, t)
        y1, ks = self._stages(t, dt, t1)
        with torch.no_grad():
            step = dt.detach()
            ratio = self.sums.error_ratio(
                [k.detach() for k in ks], self.tableau.error, step, y.detach(), y1.detach()
            )
            assert isinstance(ratio, Tensor)
            accepted = moving & ((ratio <= 1.0) | (step <= control.min_step))
            self.dt = torch.where(moving, next_sizes(step, ratio, limits), self.dt)
            flags = accepted + float(MOVING) * moving + float(STUCK) * stuck
            record = torch.stack(
                [t.detach(), t1.detach(), sign * step, size, ratio.to(t.dtype), flags]
            )
        taken = Taken(y, ks, t, sign * dt, record, self.send(record))
        self._commit(accepted, y1, ks[-1], t1, on_stop)
        return taken

    def _stopped(self, t: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(t₁, dt, rows that end on a time given): steps end on those times."""
        t1 = t + dt
        if len(self.stops) == 1:
            return t1, dt, None
        index = torch.searchsorted(self.stops, t.detach().contiguous(), right=True)
        stop = self.stops[index]
        ends = stop <= t1.detach()
        jumps = torch.cat([self.jumps, self.jumps.new_zeros(1)])[index]
        return torch.where(ends, stop, t1), torch.where(ends, stop - t, dt), ends & jumps

    def _stages(self, t: Tensor, dt: Tensor, t1: Tensor) -> tuple[Tensor, list[Tensor]]:
        problem, dtype = self.problem, self.problem.time_dtype
        before = problem.user_time(shifted(t1.to(dtype), up=False))
        times = [
            before if c == 1.0 else problem.user_time((t + c * dt).to(dtype))
            for c in self.tableau.nodes
        ]
        y1, ks = runge_kutta(
            self.sums, self.tableau, problem.slope, times, self.y, self.slope,
            problem.sign * dt, copy=self.copy,
        )  # fmt: skip
        if not self.copy and share_memory(ks):
            # The right-hand side overwrites what it returned before: again, on copies.
            self.copy = True
            self.slope = self.slope_at(t, self.y).clone()
            return self._stages(t, dt, t1)
        return y1, ks

    def _commit(
        self, accepted: Tensor, y1: Tensor, slope: Tensor, t1: Tensor, on_stop: Tensor | None
    ) -> None:
        column = accepted.reshape(-1, *(1,) * (y1.dim() - 1)) if self.rows else accepted
        if on_stop is not None:
            again = accepted & on_stop
            if bool(again.any()):
                after = torch.where(again, shifted(t1.to(self.problem.time_dtype), up=True), t1)
                fresh = self.slope_at(after, torch.where(column, y1, self.y))
                rows = again.reshape(column.shape)
                slope = torch.where(rows, fresh, slope)
        self.y = torch.where(column, y1, self.y)
        self.slope = torch.where(column, slope, self.slope)
        self.t = torch.where(accepted, t1, self.t)

    def send(self, record: Tensor) -> Any:
        """Start the copy of a record to the host where the host will look a step late."""
        if record.device.type != "cuda":
            return None
        host = torch.empty(record.shape, dtype=record.dtype, device="cpu", pin_memory=True)
        host.copy_(record, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    # On the host ---------------------------------------------------------------------------------

    def _look(self, kept: list[Taken]) -> None:
        """Read the records of some steps; write the outputs that they passed."""
        if kept[-1].copied is None:
            records = torch.stack([each.record for each in kept])
        else:
            kept[-1].copied[1].synchronize()
            records = torch.stack([each.copied[0] for each in kept])
        for taken, record in zip(kept, records.reshape(len(kept), 6, -1), strict=True):
            if self.pending:
                self._read(taken, record)

    def _read(self, taken: Taken, record: Tensor) -> None:
        t0, t1, _, size, _, flags = record.unbind(0)
        accepted, moving = flags % 2 == ACCEPTED, flags % 4 >= MOVING
        stuck = flags >= STUCK
        if bool(stuck.any()):
            y = taken.y if not self.rows else taken.y[stuck.nonzero()[0, 0].to(taken.y.device)]
            if not torch.isfinite(y).all():
                raise AssertionError(f"non-finite values in state `y`: {y}")
            raise AssertionError(f"underflow in dt {size[stuck][0].item()}")
        self.taken += moving
        passed = torch.zeros_like(accepted)
        for index in range(1, len(self.host_times)):
            t = self.host_times[index]
            here = accepted & (t0 < t) & (t <= t1)
            if bool(here.any()):
                self._write(index, taken, here)
                self.pending -= int(here.sum())
                passed |= here
        self.taken[passed] = 0
        most = self.control.max_num_steps
        over = (self.taken >= most) & moving & (t1 < self.host_times[-1])
        if bool(over.any()):
            raise AssertionError(f"max_num_steps exceeded ({int(self.taken[over].max())}>={most})")

    def _write(self, index: int, taken: Taken, here: Tensor) -> None:
        """One output time, interpolated for the samples that passed it in this step."""
        t = self.out_times[index]
        if not self.rows:
            self.outputs[index] = self._interpolated(taken.y, taken.ks, taken.t, taken.dt, t)
            return
        if bool(here.all()):
            self.outputs[index] = self._interpolated(taken.y, taken.ks, taken.t, taken.dt, t)
            return
        which = here.nonzero().squeeze(1).to(taken.y.device)
        values = self._interpolated(
            taken.y[which], [k[which] for k in taken.ks], taken.t[which], taken.dt[which], t
        )
        self.outputs[index] = self.outputs[index].index_copy(0, which, values)

    def _interpolated(
        self, y: Tensor, ks: list[Tensor], t0: Tensor, dt: Tensor, t: Tensor
    ) -> Tensor:
        x = self.problem.sign * (t - t0) / dt
        power = dt * x
        for weights in self.tableau.interpolant:
            y = self.sums.combine(y, ks, weights, power)
            power = power * x
        return y
