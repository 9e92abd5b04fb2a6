"""From a teacher and some noises to its schedules: roll, cost, path, and how sure they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels.ode.bellman.cost import BellmanAccumulator, bellman_cost
from flowkernels.ode.bellman.gram import row_count
from flowkernels.ode.bellman.path import (
    checked_budgets,
    checked_discount,
    schedules_of,
    warn_of_rises,
)
from flowkernels.ode.bellman.result import (
    BellmanSchedules,
    Endpoint,
    Stability,
    even_stops,
    total_cost,
)
from flowkernels.ode.sample import Velocity, guided, null_conditions, sample, velocity_pair
from flowkernels.ode.schedule import Schedule, shifted, uniform
from flowkernels.ops._validate import as_number, check_choice

METHODS = ("euler", "heun")
# Increments of a micro-batch where its size is left to us.
MICRO_BATCH_BYTES = 2 << 30


def bellman_schedule(
    velocity: Velocity,
    noise: Tensor,
    *,
    grid: int | Schedule = 100,
    budgets: Iterable[int] = (2, 4, 6, 8),
    guidance: float | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    shift: float = 1.0,
    method: str = "euler",
    power: float = 2,
    discount: float = 1.0,
    bootstrap: int = 200,
    seed: int = 0,
    endpoints: bool = False,
    micro_batch: int | None = None,
    progress: bool = False,
) -> BellmanSchedules:
    """The best Euler schedules of a teacher: it is rolled on a fine grid, every jump is priced.

    `sample(velocity, noise, result.schedules[K])` then samples in K steps. `report()` of the result
    says what the schedules are expected to buy: the sum of jump costs along each, against that of
    even steps, and how much of it depends on which noises were drawn.

    Memory: (N-1)·micro_batch·D float32 numbers beside the network's own (twice that for Heun's
    method), and 16·N² bytes for each noise; 7.3 GiB and 16 MB for a grid of 100 and 100 noises of
    3×256×256 in one micro-batch, 2 GiB by default.

    Args:
        velocity: `f(x, t, **conditions)`, x [B, ...], t [B] float32; in evaluation mode.
        noise: [M, ...], the states at t = 1; about 100. float32: a state in a lower dtype drifts.
        grid: N, the teacher's steps, uniform before the shift; or a Schedule, whatever its times.
        budgets: numbers K of steps, each from 1 to N.
        guidance: scale of the guidance at which the student or sampler will run; None or 1: none.
        conditions: keyword tensors for the velocity, each [M, ...].
        uncond: the same keywords for the unconditional half; where left out, what
            `velocity.null_conditions(conditions)` gives.
        shift: time shift of the grid (3 for SD3); even steps are even before the shift too.
        method: of the teacher's steps, "euler" or "heun" (twice the calls; its residuals are
            part of the cost).
        power: of the error's norm in the cost.
        discount: on the cost of later steps; above 1 (GITS: 1.15) they count for more, which suits
            samplers that are not trained for the schedule (docs/bellman.md).
        bootstrap: how many times the noises are resampled; 0 for none.
        seed: of the resampling.
        endpoints: also sample the noises in K steps, along each schedule and along even steps, and
            report how far both end from the teacher: what the schedules are worth to a sampler
            that is not trained for them.
        micro_batch: noises rolled at a time; by default as many as 2 GiB of increments hold.
        progress: show a progress bar.

    Returns:
        A `BellmanSchedules`: `schedules` (K → Schedule), `cost`, `report()`, `plot(path)`,
        `save(path)`, `load(path)`.

    Raises:
        TypeError: noise or a condition is no tensor, a budget or the grid no number of steps.
        ValueError: guidance without conditions, conditions of another batch, a velocity that is not
            finite, an unknown method, a K that the grid does not have.

    Example:
        >>> from flowkernels.ode import bellman_schedule
        >>> velocity = lambda x, t: x * t.view(-1, 1) ** 4  # bends near the noise
        >>> found = bellman_schedule(velocity, torch.randn(8, 2), grid=20, budgets=[2, 4])
        >>> [round(t, 2) for t in found.schedules[4].times.tolist()]
        [1.0, 0.9, 0.75, 0.5, 0.0]
        >>> found.report()[4].gain > 2  # the cost of even steps over that of these
        True

    Source: arXiv 2312.16414.
    """
    noise, times = _checked_noise(noise), _grid_of(grid, shift)
    wanted = checked_budgets(budgets, times.steps)
    check_choice(method, "method", METHODS)
    conditions = _checked_conditions(conditions, len(noise))
    scale = 1.0 if guidance is None else as_number(guidance, "guidance")
    if scale == 1:
        uncond = None
    elif not conditions:
        raise ValueError(f"guidance: got {scale}, need conditions to guide by")
    elif uncond is None:
        uncond = null_conditions(velocity, conditions)
    bootstrap, discount = _count(bootstrap, "bootstrap", least=0), checked_discount(discount)

    accumulator = BellmanAccumulator(times, residuals=method != "euler")
    teacher = _Teacher(velocity, noise, conditions, uncond, scale)
    batches = _micro_batches(noise, times.steps, method, micro_batch)
    ends = []
    for rows in _progress(batches, progress):
        end = teacher.roll(rows, accumulator, method)
        if endpoints:
            ends.append(end)

    per_sample = bellman_cost(accumulator, times, power=power, per_sample=True)
    cost = per_sample.mean(0)
    if not cost.isfinite().all():
        raise ValueError("velocity: gave values that are not finite along the trajectories")
    found = schedules_of(cost.numpy(), times, wanted, discount)
    warn_of_rises("bellman_schedule", found)
    return BellmanSchedules(
        grid=times,
        schedules=dict(found),
        stops=found.stops,
        cost=cost,
        samples=len(noise),
        rises=found.rises,
        stability=stability_of(per_sample, times, found.stops, discount, bootstrap, seed),
        endpoints=teacher.endpoints(batches, ends, found, times) if endpoints else {},
        settings={
            "method": method, "guidance": scale, "shift": float(shift), "power": float(power),
            "discount": discount, "bootstrap": bootstrap, "seed": seed,
        },
    )  # fmt: skip


class _Teacher:
    """A velocity with all that it is called with."""

    def __init__(
        self,
        velocity: Velocity,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        guidance: float,
    ) -> None:
        self._velocity, self._noise, self._guidance = velocity, noise, guidance
        self._conditions, self._uncond = conditions, uncond

    def _inputs(self, rows: slice) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        part = {name: value[rows] for name, value in self._conditions.items()}
        if self._uncond is None:
            return part, None
        return part, {name: value[rows] for name, value in self._uncond.items()}

    @torch.no_grad()
    def roll(self, rows: slice, accumulator: BellmanAccumulator, method: str) -> Tensor:
        """One micro-batch from t = 1 to 0; every velocity goes into the accumulator."""
        conditions, uncond = self._inputs(rows)
        guidance = self._guidance

        def pair(state: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
            time = torch.full((len(state),), t, device=state.device, dtype=torch.float32)
            return velocity_pair(self._velocity, state, time, conditions, uncond)

        x = self._noise[rows]
        for t, t_next in itertools.pairwise(accumulator.times.tolist()):
            now = pair(x, t)
            if method == "euler":
                x = accumulator.step(x, now[0], v_uncond=now[1], guidance=guidance)
                continue
            h, v = t_next - t, guided(now, guidance)
            residual = guided(pair(x + h * v, t_next), guidance).sub(v).mul_(h / 2)
            accumulator.add(v, residual)
            x = x + h * v + residual
        return x

    def endpoints(
        self,
        batches: Sequence[slice],
        ends: Sequence[Tensor],
        schedules: Mapping[int, Schedule],
        grid: Schedule,
    ) -> dict[int, Endpoint]:
        """Root mean square distances of K-step samples from the ends of the teacher's rolls."""

        def error(schedule: Schedule) -> float:
            total = 0.0
            for rows, end in zip(batches, ends, strict=True):
                conditions, uncond = self._inputs(rows)
                x = sample(
                    self._velocity,
                    self._noise[rows],
                    schedule,
                    guidance=None if uncond is None else self._guidance,
                    conditions=conditions,
                    uncond=uncond,
                )
                total += float((x - end).double().square().sum())
            return (total / len(self._noise)) ** 0.5

        return {
            K: Endpoint(error(schedule), error(Schedule(grid.times[even_stops(K, grid.steps)])))
            for K, schedule in schedules.items()
        }


def stability_of(
    per_sample: Tensor,
    grid: Schedule,
    stops: Mapping[int, list[int]],
    discount: float,
    resamples: int,
    seed: int,
) -> dict[int, Stability]:
    """How the schedules and their gains vary when the samples are drawn again.

    Each resample draws as many samples with replacement, and its schedules are priced on the
    samples that it left out, so that a gain is never measured where its schedule was chosen.

    Args:
        per_sample: [B, N+1, N+1], costs of each sample.
        grid: the times.
        stops: K → indices of the schedule from all samples.
        discount: of the path search.
        resamples: how many; none where there are fewer than two samples.
        seed: of the resampling.
    """
    B = len(per_sample)
    if resamples == 0 or B < 2:
        return {}
    generator = torch.Generator().manual_seed(seed)
    flat, size = per_sample.flatten(1), per_sample.shape[1:]
    found: dict[int, list[tuple[list[int], float]]] = {K: [] for K in stops}
    for _ in range(resamples):
        drawn = torch.randint(B, (B,), generator=generator).bincount(minlength=B)
        cost = (drawn.double() / B @ flat).view(size)
        left_out = (drawn == 0).double()
        # All drawn once: nothing is left out, and the samples themselves have to do.
        rest = (left_out / left_out.sum() @ flat).view(size) if left_out.any() else cost
        for K, path in schedules_of(cost.numpy(), grid, list(stops), discount).stops.items():
            even = total_cost(rest, even_stops(K, grid.steps))
            found[K].append((path, _gain(even, total_cost(rest, path))))
    return {K: _stability(found[K], stops[K], grid) for K in stops}


def _stability(
    found: list[tuple[list[int], float]], chosen: list[int], grid: Schedule
) -> Stability:
    paths = torch.tensor([path for path, _ in found])
    gains = torch.tensor([gain for _, gain in found], dtype=torch.float64).sort().values
    last = len(gains) - 1
    return Stability(
        agreement=float((paths == torch.tensor(chosen)).all(1).double().mean()),
        spread=float(grid.times[paths].std(0, correction=0).max()),
        gain_low=float(gains[round(0.05 * last)]),
        gain_high=float(gains[round(0.95 * last)]),
    )


def _gain(even: float, best: float) -> float:
    if best > 0:
        return even / best
    return float("inf") if even > 0 else 1.0


def _micro_batches(noise: Tensor, steps: int, method: str, micro_batch: int | None) -> list[slice]:
    if micro_batch is None:
        itemsize = 8 if noise.dtype == torch.float64 else 4
        a_sample = row_count(steps, method != "euler") * noise[0].numel() * itemsize
        micro_batch = max(1, MICRO_BATCH_BYTES // max(1, a_sample))
    size = _count(micro_batch, "micro_batch", least=1)
    # Of one size, as nearly as can be: the accumulator keeps its memory between equal ones.
    batches = -(-len(noise) // size)
    size = -(-len(noise) // batches)
    return [slice(start, start + size) for start in range(0, len(noise), size)]


def _grid_of(grid: Any, shift: float) -> Schedule:
    if isinstance(grid, Schedule):
        if shift != 1:
            raise ValueError(f"shift: got {shift}, need 1 where grid is a Schedule")
        return grid
    steps = _count(grid, "grid", least=1)
    return uniform(steps) if shift == 1 else shifted(steps, shift)


def _count(value: Any, name: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, need an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, need at least {least}")
    return value


def _checked_noise(noise: Any) -> Tensor:
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"noise: got {type(noise).__name__}, need a floating-point tensor [M, ...]")
    if noise.dim() == 0 or noise.numel() == 0:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, need [M, ...] with M at least 1")
    return noise


def _checked_conditions(conditions: Mapping[str, Tensor] | None, batch: int) -> dict[str, Tensor]:
    checked = dict(conditions or {})
    for name, value in checked.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"conditions[{name!r}]: got {type(value).__name__}, need a tensor")
        if value.dim() == 0 or len(value) != batch:
            raise ValueError(
                f"conditions[{name!r}]: got shape {tuple(value.shape)}, need [{batch}, ...]"
            )
    return checked


def _progress(batches: list[slice], show: bool) -> Iterable[slice]:
    if not show:
        return batches
    from rich.progress import track

    return track(batches, description="rolling the teacher")
