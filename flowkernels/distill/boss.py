"""Bellman Optimal Stepsize Straightening: a flow model learns to walk in a few long steps.

The maths is in docs/boss.md: what the loss does and does not promise, the weights, guidance, and
when a Bellman schedule does not help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.distill import low_rank
from flowkernels.distill.method import (
    Method,
    NullConditions,
    Phase,
    check_reduction,
    evaluating,
    is_number,
    null_conditions_of,
    scaled,
    split_batch,
    standard_normal_like,
    trainable,
)
from flowkernels.distill.trajectories import ENDS, TrajectoryPool, positions, roll, trajectory_plan
from flowkernels.losses import flow_matching, interpolate, straightening
from flowkernels.ode import Schedule, bellman_schedule, sample

PATHS = ("teacher", "reflow", "reflow-steps")
INTERVALS = ("all", "one")

Times = Schedule | Tensor | Sequence[float]


class BOSS(Method):
    """Straightens a teacher's trajectories along a schedule of K steps.

    The teacher is rolled from noise on a fine grid; x_k is its state at the schedule's time τ_k.
    The student, a copy of the teacher, is trained where the steps begin and nowhere else:

        `L = mean over samples and k of ‖v_θ(x_k, τ_k) - (x_{k+1} - x_k)/(τ_{k+1} - τ_k)‖²`.

    At zero loss its K Euler steps land on the teacher's states, the endpoint included. Guidance
    is baked in: trajectories are guided, and the student is called once per step without it.

    A batch holds "x0", of which shape and conditions are taken and fresh trajectories are rolled;
    or "trajectory" [B, S, ...], stored states at `trajectory_times`. Where they hold the same
    states, both train the same student.

    Args:
        teacher: velocity network `f(x, t, **conditions)`; its weights are frozen here.
        schedule: the student's steps: a Schedule, its times, or a dict K → Schedule for one
            student that serves several K (they compete where they start from the same states;
            a student for each K is better).
        budgets: in place of `schedule`: K, or several, whose Bellman schedules are found here
            from `noise`.
        noise: [M, ...], about 100 noises, for `budgets` only.
        conditions: keyword tensors [M, ...] beside `noise`.
        student: network to train; by default a copy of the teacher.
        grid: the teacher's steps, or their Schedule. A τ_k that is not among them is added.
        shift: time shift of the grid (3 for SD3).
        guidance: scale of the teacher's guidance.
        path: "teacher", as above. The others are what BOSS is compared with, on the straight line
            from noise to the teacher's endpoint: "reflow" regresses its slope at uniform times,
            "reflow-steps" at the schedule's τ_k.
        intervals: "all" intervals of each trajectory in every update (the student then sees
            B·K states), or "one" of each, drawn.
        weighting: None, or "dt2": (τ_{k+1} - τ_k)², which makes each term the squared error of the
            step itself, what the Bellman cost is made of.
        refresh: a batch in so many rolls new trajectories; in between those of the last `pool`
            rolls are drawn again.
        pool: how many rolls are kept.
        lora_rank: train an update of this rank of every linear layer in place of the weights.
        lora_alpha: its scale, times the rank; by default the rank.
        trajectory_times: times of the states in batch["trajectory"]; by default those of the
            schedules, together and in falling order, or the two ends for reflow.
        reduction: "mean" over elements and batch, or "sum" over a sample's elements and mean
            over the batch.
        null_conditions: makes the unconditional inputs of a dict of conditions; by default the
            teacher's method of that name. Used where `guidance` is not 1.

    Attributes:
        schedules: K → Schedule.
        plan: the teacher's steps and which of its states are kept.
        bellman: the search behind `budgets` (`report()`, `plot(path)`), else None.

    Raises:
        ValueError: an option out of its range, by name; a schedule whose states the stored
            trajectories do not have.

    Example:
        >>> from flowkernels.nn import MMDiT, MMDiTConfig
        >>> from flowkernels.ode import uniform
        >>> teacher = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
        >>> method = BOSS(teacher, schedule=uniform(2), grid=10)
        >>> batch = {"x0": torch.randn(2, 4, 4, 4), "labels": torch.tensor([0, 2])}
        >>> sorted(method.losses(batch))
        ['straightening']
        >>> method.generate(torch.randn(1, 4, 4, 4), 2, labels=torch.tensor([1])).shape
        torch.Size([1, 4, 4, 4])

    Source: arXiv 2312.16414; arXiv 2209.03003 for reflow.
    """

    deploy = "student"
    starts: Tensor
    ends: Tensor
    t: Tensor
    dt: Tensor
    chance: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        *,
        schedule: Times | Mapping[int, Schedule] | None = None,
        budgets: int | Iterable[int] | None = None,
        noise: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        student: nn.Module | None = None,
        grid: int | Schedule = 100,
        shift: float = 1.0,
        guidance: float = 1.0,
        path: str = "teacher",
        intervals: str = "all",
        weighting: str | None = None,
        refresh: int = 1,
        pool: int = 1,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        trajectory_times: Tensor | Sequence[float] | None = None,
        reduction: str = "mean",
        null_conditions: NullConditions | None = None,
    ) -> None:
        super().__init__()
        _check_options(guidance, path, intervals, weighting, refresh, pool, lora_alpha)
        check_reduction(reduction)
        self.student = trainable(student, teacher, "student")
        self.teacher = teacher.requires_grad_(False).eval()
        self.guidance = guidance
        self.path = path
        self.intervals = intervals
        self.weighting = weighting
        self.reduction = reduction
        self.lora_rank = lora_rank
        self._pool = TrajectoryPool(refresh, pool)
        self._null_conditions = (
            null_conditions_of(teacher, null_conditions, "guidance") if guidance != 1 else None
        )
        self.bellman = None
        if (schedule is None) == (budgets is None):
            raise ValueError("schedule or budgets: one of the two must be given, and only one")
        if budgets is not None:
            self.bellman = self._search(budgets, noise, conditions, grid, shift)
            schedule = self.bellman.schedules
        self.schedules = _as_schedules(schedule)
        straight = path == "teacher"
        wanted = [each.times for each in self.schedules.values()] if straight else [ENDS]
        if trajectory_times is not None:
            wanted = [torch.as_tensor(trajectory_times, dtype=torch.float64)]
        self.plan = trajectory_plan(grid, shift, wanted)
        self._register_intervals()
        if lora_rank is not None:
            low_rank.adapt(self.student, lora_rank, lora_alpha)

    def _search(
        self,
        budgets: int | Iterable[int],
        noise: Tensor | None,
        conditions: Mapping[str, Tensor] | None,
        grid: int | Schedule,
        shift: float,
    ) -> Any:
        if noise is None:
            raise ValueError("budgets needs noise: about 100 states at t = 1 to roll it from")
        return bellman_schedule(
            self.teacher,
            noise,
            grid=grid,
            budgets=[budgets] if isinstance(budgets, int) else budgets,
            guidance=self.guidance,
            conditions=conditions,
            uncond=self._uncond(conditions or {}),
            shift=shift,
        )

    def _register_intervals(self) -> None:
        """Every interval of every schedule: which stored states it joins, when, how likely."""
        kept = self.plan.times
        starts, ends, t, dt, chance = [], [], [], [], []
        for schedule in self.schedules.values():
            # On the line between the ends no state in between is needed.
            stops = [0] * len(schedule.times)
            if self.path == "teacher":
                stops = positions(kept, schedule.times)
            starts += stops[:-1]
            ends += stops[1:]
            t.append(schedule.times[:-1])
            dt.append(schedule.times.diff())
            chance += [1 / schedule.steps] * schedule.steps
        share = torch.tensor(chance, dtype=torch.float64) / len(self.schedules)
        buffers = {
            "starts": torch.tensor(starts),
            "ends": torch.tensor(ends),
            "t": torch.cat(t).float(),
            "dt": torch.cat(dt).float(),
            "chance": share.float(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def train(self, mode: bool = True) -> BOSS:
        """Sets the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def phases(self) -> tuple[Phase, ...]:
        """One phase, "student"."""
        return (Phase("student", ("student",)),)

    def losses(self, batch: Mapping[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        """{"straightening": loss}, or {"reflow": loss} on the line; see `Method.losses`.

        Raises:
            ValueError: batch["trajectory"] has another number of states than `plan.times`.
        """
        self.wants("student", phase)
        states, conditions = self._trajectories(batch)
        interval = self._intervals(len(states))
        rows = torch.arange(len(states), device=states.device)
        if self.intervals == "all":
            repeats = len(self.starts)
            rows = rows.repeat_interleave(repeats)
            conditions = {n: c.repeat_interleave(repeats, 0) for n, c in conditions.items()}
        if self.path == "teacher":
            loss = self._straightening(states, rows, interval, conditions)
        else:
            loss = self._reflow(states, rows, interval, conditions)
        name = "straightening" if self.path == "teacher" else "reflow"
        return {name: scaled(loss, self.reduction, len(rows))}

    def generate(
        self, noise: Tensor, steps: int, network: nn.Module | None = None, **conditions: Tensor
    ) -> Tensor:
        """Samples in `steps` Euler steps of the schedule of that many; see `Method.generate`.

        Raises:
            ValueError: there is no schedule of that many steps.
        """
        if steps not in self.schedules:
            known = ", ".join(map(str, self.schedules))
            raise ValueError(f"steps is {steps}; this student samples in {known}")
        network = self.deployed(network)
        with evaluating(network):
            return sample(network, noise, self.schedules[steps], conditions=conditions)

    def merged(self, network: nn.Module) -> nn.Module:
        """The network as it is shipped: with its low-rank updates added to the weights."""
        return network if self.lora_rank is None else low_rank.merged(network)

    def rolled(self, noise: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The teacher's states [B, S, ...] at `plan.times`, from noise [B, ...]."""
        with evaluating(self.teacher):
            return roll(
                self.teacher,
                noise,
                self.plan,
                guidance=self.guidance,
                conditions=conditions,
                uncond=self._uncond(conditions),
            )

    def get_extra_state(self) -> dict[str, Any]:
        """The trajectories at hand and the steps, for a bitwise resume."""
        times = [schedule.times for schedule in self.schedules.values()]
        return {"pool": self._pool.state_dict(), "times": times}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores them.

        Raises:
            ValueError: the state is of a student of other steps.
        """
        times = [schedule.times for schedule in self.schedules.values()]
        saved = state["times"]
        if len(times) != len(saved) or not all(map(torch.equal, times, saved)):
            raise ValueError("schedule: the state is of a student of other steps")
        self._pool.load_state_dict(state["pool"], self.starts.device)

    # ---- what is regressed on -------------------------------------------------------------------

    def _trajectories(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """States [B, S, ...] and conditions: the batch's own, or rolled."""
        if "trajectory" not in batch:
            x0, conditions = split_batch(batch)

            def make() -> tuple[Tensor, dict[str, Tensor]]:
                return self.rolled(standard_normal_like(x0), conditions), conditions

            return self._pool.draw(len(x0), make)
        states = batch["trajectory"]
        if states.dim() < 2 or states.shape[1] != len(self.plan.kept):
            raise ValueError(
                f"batch['trajectory'] has shape {tuple(states.shape)}; it needs [B, S, ...] with "
                f"the S = {len(self.plan.kept)} states of trajectory_times"
            )
        rest = {name: value for name, value in batch.items() if name != "trajectory"}
        _, conditions = split_batch({**rest, "x0": states[:, -1]})
        return states, conditions

    def _intervals(self, batch: int) -> Tensor:
        """The interval of each row, an index into `starts`."""
        if self.intervals == "all":
            return torch.arange(len(self.starts), device=self.starts.device).repeat(batch)
        return torch.multinomial(self.chance, batch, replacement=True)

    def _weight(self, interval: Tensor) -> Tensor | None:
        """A row's share in the mean: each schedule's intervals together count the same."""
        uneven = self.intervals == "all" and len(self.schedules) > 1
        if not uneven and self.weighting is None:
            return None
        weight = self.chance * len(self.chance) if uneven else torch.ones_like(self.chance)
        if self.weighting == "dt2":
            weight = weight * self.dt.square()
        return weight[interval]

    def _straightening(
        self, states: Tensor, rows: Tensor, interval: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        x_start = states[rows, self.starts[interval]]
        x_end = states[rows, self.ends[interval]]
        velocity = self.student(x_start, self.t[interval], **conditions)
        return straightening(
            velocity,
            x_start,
            x_end,
            self.dt[interval],
            weight=self._weight(interval),
            reduction=self.reduction,
        )

    def _reflow(
        self, states: Tensor, rows: Tensor, interval: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """Flow matching between each noise and its own endpoint."""
        noise, endpoint = states[rows, 0], states[rows, -1]
        at_steps = self.path == "reflow-steps"
        t = self.t[interval] if at_steps else torch.rand(len(rows), device=states.device)
        x_t, _ = interpolate(endpoint, t, noise)
        velocity = self.student(x_t, t, **conditions)
        weight = self._weight(interval) if at_steps else None
        return flow_matching(velocity, endpoint, noise, weight=weight, reduction=self.reduction)

    def _uncond(self, conditions: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        return None if self._null_conditions is None else self._null_conditions(conditions)


def _as_schedules(schedule: Times | Mapping[int, Schedule] | None) -> dict[int, Schedule]:
    """K → Schedule, by rising K."""
    if isinstance(schedule, Mapping):
        found = dict(sorted(schedule.items()))
        for steps, each in found.items():
            if not isinstance(each, Schedule) or each.steps != steps:
                raise ValueError(f"schedule[{steps!r}] is {each!r}; it must be {steps} steps")
        if not found:
            raise ValueError("schedule is empty; it needs one K at least")
        return found
    if not isinstance(schedule, Schedule):
        try:
            schedule = Schedule(schedule)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"schedule: {error}") from None
    return {schedule.steps: schedule}


def _check_options(
    guidance: float,
    path: str,
    intervals: str,
    weighting: str | None,
    refresh: int,
    pool: int,
    lora_alpha: float | None,
) -> None:
    if not is_number(guidance):
        raise ValueError(f"guidance is {guidance!r}; it must be a finite number")
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(PATHS)}")
    if intervals not in INTERVALS:
        raise ValueError(f"intervals is {intervals!r}; it must be 'all' or 'one'")
    if weighting not in (None, "dt2"):
        raise ValueError(f"weighting is {weighting!r}; it must be None or 'dt2'")
    if weighting is not None and path == "reflow":
        raise ValueError("weighting is 'dt2', but reflow at uniform times has no steps to weigh by")
    for name, value in (("refresh", refresh), ("pool", pool)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")
    if lora_alpha is not None and not is_number(lora_alpha):
        raise ValueError(f"lora_alpha is {lora_alpha!r}; it must be None or a finite number")
