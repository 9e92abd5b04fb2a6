"""The teacher's own trajectories, and which of their states a student is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowkernels.ode import Schedule, sample, shifted
from flowkernels.ode.sample import Velocity

# Times closer than this are one time: a schedule from a file and the grid it was chosen on.
TOLERANCE = 1e-9
# All that reflow needs: the noise and the endpoint.
ENDS = torch.tensor([1.0, 0.0], dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class TrajectoryPlan:
    """How a teacher is rolled, and which states are kept.

    Attributes:
        schedule: the teacher's steps: a fine grid, and in it every time that is kept.
        kept: [S] indices of the kept states in `schedule.times`; the first is the noise, the last
            the endpoint.
    """

    schedule: Schedule
    kept: tuple[int, ...]

    @property
    def times(self) -> Tensor:
        """float64 [S], the times of the kept states, from 1 to 0."""
        return self.schedule.times[list(self.kept)]


def trajectory_plan(grid: int | Schedule, shift: float, times: Iterable[Tensor]) -> TrajectoryPlan:
    """A plan that keeps the states at all given times.

    A time that is not on the grid becomes a stop of its own beside the grid's, so that every
    state is the teacher's at exactly that time.

    Args:
        grid: the teacher's steps, uniform before the shift; or their times.
        shift: time shift of the grid.
        times: float64 vectors of times in [0, 1].

    Raises:
        ValueError: `grid` or `shift` is none.

    Example:
        >>> plan = trajectory_plan(4, 1.0, [torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)])
        >>> plan.schedule.times.tolist(), plan.kept
        ([1.0, 0.75, 0.6, 0.5, 0.25, 0.0], (0, 2, 5))
    """
    if isinstance(grid, Schedule) and shift != 1:
        raise ValueError(f"shift is {shift}; it must be 1 where grid is a Schedule")
    fine = grid if isinstance(grid, Schedule) else _grid(grid, shift)
    wanted = torch.cat([torch.as_tensor(each, dtype=torch.float64) for each in times])
    off_grid = [float(time) for time in wanted if (fine.times - time).abs().min() > TOLERANCE]
    if off_grid:
        merged = sorted({*fine.times.tolist(), *_distinct(off_grid)}, reverse=True)
        fine = Schedule(merged, origin=f"{fine.origin} and {len(merged) - len(fine.times)} more")
    return TrajectoryPlan(fine, tuple(sorted(set(positions(fine.times, wanted)))))


def positions(times: Tensor, wanted: Tensor) -> list[int]:
    """The index in `times` of every wanted time.

    Raises:
        ValueError: one of them is not there.
    """
    found = []
    for time in wanted.tolist():
        distance = (times - time).abs()
        index = int(distance.argmin())
        if distance[index] > TOLERANCE:
            kept = ", ".join(f"{value:.4g}" for value in times.tolist())
            raise ValueError(f"no state at t = {time:.6g}: the trajectories have {kept}")
        found.append(index)
    return found


def roll(
    velocity: Velocity,
    noise: Tensor,
    plan: TrajectoryPlan,
    *,
    guidance: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The teacher's Euler trajectories from noise, without a graph.

    Args:
        velocity: `f(x, t, **conditions)`.
        noise: [B, ...].
        plan: the steps and the kept states, S of them.
        guidance: scale of the guidance; 1 is none.
        conditions: keyword tensors [B, ...].
        uncond: their unconditional counterparts, for guidance.

    Returns:
        [B, S, ...] states at `plan.times`.

    Example:
        >>> plan = trajectory_plan(4, 1.0, [torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)])
        >>> roll(lambda x, t: torch.ones_like(x), torch.zeros(1, 1), plan)[0, :, 0]
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    states = noise.new_empty((len(noise), len(plan.kept), *noise.shape[1:]))
    states[:, 0] = noise
    slots = {step: slot for slot, step in enumerate(plan.kept)}

    def keep(step: int, _: float, x: Tensor) -> None:
        slot = slots.get(step + 1)
        if slot is not None:
            states[:, slot] = x

    sample(
        velocity,
        noise,
        plan.schedule,
        guidance=guidance,
        conditions=conditions,
        uncond=uncond,
        callback=keep,
    )
    return states


class TrajectoryPool:
    """Trajectories rolled now and then, and drawn from in between.

    Args:
        refresh: a call in so many rolls new trajectories; the others use what is there.
        size: how many rolls are kept; the oldest is dropped.
    """

    def __init__(self, refresh: int, size: int) -> None:
        self.refresh = refresh
        self.size = size
        self.calls = 0
        self.rolls: list[tuple[Tensor, dict[str, Tensor]]] = []

    def draw(
        self, count: int, make: Callable[[], tuple[Tensor, dict[str, Tensor]]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`count` trajectories [count, S, ...] with their conditions.

        Args:
            count: how many.
            make: rolls new ones.
        """
        fresh = self.calls % self.refresh == 0
        self.calls += 1
        if self.refresh == self.size == 1:
            return make()
        if fresh:
            self.rolls = [*self.rolls, make()][-self.size :]
        roll_of = torch.randint(len(self.rolls), (count,)).tolist()
        chosen = [
            (states, conditions, int(torch.randint(len(states), ())))
            for states, conditions in (self.rolls[index] for index in roll_of)
        ]
        drawn = torch.stack([states[row] for states, _, row in chosen])
        return drawn, {
            name: torch.stack([conditions[name][row] for _, conditions, row in chosen])
            for name in chosen[0][1]
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: the count of calls and the trajectories."""
        return {
            "calls": self.calls,
            "rolls": [{"states": states, "conditions": dict(c)} for states, c in self.rolls],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore it, on a device."""
        self.calls = int(state["calls"])
        self.rolls = [
            (
                entry["states"].to(device),
                {name: value.to(device) for name, value in entry["conditions"].items()},
            )
            for entry in state["rolls"]
        ]


def _grid(steps: int, shift: float) -> Schedule:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"grid is {steps!r}; it must be an int of at least 1, or a Schedule")
    return shifted(steps, shift)


def _distinct(times: list[float]) -> list[float]:
    """Times that are further apart than the tolerance."""
    kept: list[float] = []
    for time in sorted(times):
        if not kept or time - kept[-1] > TOLERANCE:
            kept.append(time)
    return kept
