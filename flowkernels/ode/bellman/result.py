"""What `bellman_schedule` found: schedules, their price, a report, a picture, a file."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkernels.ode.schedule import Schedule


class Stability(NamedTuple):
    """How one schedule varies over resamples of the noises.

    Attributes:
        agreement: share of resamples that give exactly this schedule.
        spread: standard deviation, in t, of its most uncertain stop.
        gain_low, gain_high: 5 % and 95 % of the gain over even steps, each resample's schedule
            priced on the samples that it did not see.
    """

    agreement: float
    spread: float
    gain_low: float
    gain_high: float


class Endpoint(NamedTuple):
    """How far K untrained Euler steps end from the teacher: root of the mean squared norm.

    Attributes:
        error: along the Bellman schedule.
        even_error: along K even steps.
    """

    error: float
    even_error: float


class BudgetReport(NamedTuple):
    """One row of the report.

    Attributes:
        steps: K.
        cost: sum of jump costs along the Bellman schedule.
        even_cost: along K even steps of the grid.
        gain: even_cost / cost.
        rises: whether fewer steps cost less.
        stability: None where there was no bootstrap.
        endpoint: None where endpoints were not compared.
    """

    steps: int
    cost: float
    even_cost: float
    gain: float
    rises: bool
    stability: Stability | None
    endpoint: Endpoint | None = None


class BellmanReport(dict[int, BudgetReport]):
    """K → its row; `str()` is the table."""

    title: str = ""

    def __str__(self) -> str:
        lines = [self.title, ""] if self.title else []
        stable = any(row.stability for row in self.values())
        ends = any(row.endpoint for row in self.values())
        lines.append(
            "    K   cost      even steps   gain   "
            + (" 5-95 % held out   same   spread" if stable else "")
            + ("   endpoint  even steps" if ends else "")
        )
        lines += [_line(row) for row in self.values()]
        rises = [str(row.steps) for row in self.values() if row.rises]
        if rises:
            lines.append(f"At K = {', '.join(rises)} fewer steps cost less: use those.")
        small = [str(row.steps) for row in self.values() if row.gain < 1.1]
        if small:
            lines.append(
                f"At K = {', '.join(small)} even steps cost nearly as little: expect nothing of "
                "the schedule there."
            )
        worse = [
            str(row.steps)
            for row in self.values()
            if row.endpoint and row.endpoint.error > row.endpoint.even_error
        ]
        if worse:
            lines.append(
                f"At K = {', '.join(worse)} untrained samples end farther from the teacher's than "
                "with even steps: straighten there, or sample on even steps."
            )
        return "\n".join(lines)


def _line(row: BudgetReport) -> str:
    text = f"{row.steps:5d}   {row.cost:<9.4g} {row.even_cost:<9.4g}    {row.gain:<7.4g}"
    if row.stability is not None:
        interval = f"{row.stability.gain_low:.3g} to {row.stability.gain_high:.3g}"
        text += f" {interval:<17} {row.stability.agreement:4.0%}   {row.stability.spread:<6.3f}"
    if row.endpoint is not None:
        text += f"   {row.endpoint.error:<9.4g} {row.endpoint.even_error:.4g}"
    return text.rstrip()


@dataclass(frozen=True)
class BellmanSchedules:
    """Schedules from a teacher's trajectories.

    Attributes:
        grid: the N times that the teacher walked.
        schedules: K → Schedule.
        stops: K → indices of its times in the grid.
        cost: float64 [N+1, N+1], the mean cost of the jump from time j to time k.
        samples: trajectories that it is the mean of.
        rises: those K for which fewer steps cost less.
        stability: K → Stability; empty without a bootstrap.
        endpoints: K → Endpoint; empty where they were not compared.
        settings: how they were made: method, guidance, shift, power, discount, bootstrap, seed.
    """

    grid: Schedule
    schedules: dict[int, Schedule]
    stops: dict[int, list[int]]
    cost: Tensor
    samples: int
    rises: tuple[int, ...] = ()
    stability: dict[int, Stability] = field(default_factory=dict)
    endpoints: dict[int, Endpoint] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def report(self) -> BellmanReport:
        """What each schedule is expected to buy; print it for the table.

        The gain is that of the summed cost of the jumps, each from the teacher's own state. It is
        what the search minimises and what straightening starts from; errors of successive jumps
        add up with signs, so that the endpoint of an untrained sampler need not improve as much,
        or at all (docs/bellman.md).
        """
        report = BellmanReport()
        report.title = (
            f"Bellman schedules from {self.samples} trajectories of {self.grid.steps} "
            f"{self.settings.get('method', 'euler')} steps ({self.grid.origin}, guidance "
            f"{self.settings.get('guidance', 1.0):g})"
        )
        for K, stops in self.stops.items():
            cost = total_cost(self.cost, stops)
            even = total_cost(self.cost, even_stops(K, self.grid.steps))
            gain = even / cost if cost > 0 else math.inf if even > 0 else 1.0
            stability = self.stability.get(K)
            report[K] = BudgetReport(
                K, cost, even, gain, K in self.rises, stability, self.endpoints.get(K)
            )
        return report

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the cost of every jump with the schedules in it, and their times, into a file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from flowkernels.ode.bellman.plot import draw

        draw(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON: into a file beside it first, which then takes its place."""
        value = asdict(self) | {
            "grid": json.loads(self.grid.to_json()),
            "schedules": {K: json.loads(s.to_json()) for K, s in self.schedules.items()},
            "cost": self.cost.tolist(),
            # JSON has no infinity: a gain over a cost of zero.
            "stability": {
                K: [value if math.isfinite(value) else None for value in stability]
                for K, stability in self.stability.items()
            },
        }
        _write(Path(path), json.dumps(value, allow_nan=False))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> BellmanSchedules:
        """The inverse of `save`.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            value = json.loads(Path(path).read_text())
            schedules = {int(K): _schedule(s) for K, s in value["schedules"].items()}
            return BellmanSchedules(
                grid=_schedule(value["grid"]),
                schedules=schedules,
                stops={int(K): [int(i) for i in stops] for K, stops in value["stops"].items()},
                cost=torch.tensor(value["cost"], dtype=torch.float64, device="cpu"),
                samples=int(value["samples"]),
                rises=tuple(map(int, value["rises"])),
                stability={
                    int(K): Stability(*(math.inf if v is None else float(v) for v in values))
                    for K, values in value["stability"].items()
                },
                endpoints={
                    int(K): Endpoint(*map(float, errors))
                    for K, errors in value["endpoints"].items()
                },
                settings=dict(value["settings"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"path: {path} holds no Bellman schedules: {error!r}") from None


def _schedule(value: Any) -> Schedule:
    return Schedule.from_json(json.dumps(value))


def _write(path: Path, text: str) -> None:
    """Whole or not at all, whatever happens in between."""
    handle, name = tempfile.mkstemp(dir=path.parent or ".", prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def even_stops(K: int, steps: int) -> list[int]:
    """The grid's indices nearest to K even steps."""
    return [round(i * steps / K) for i in range(K + 1)]


def total_cost(cost: Tensor, stops: Sequence[int]) -> float:
    """The sum of jump costs along a path."""
    return float(cost[list(stops[:-1]), list(stops[1:])].sum())
