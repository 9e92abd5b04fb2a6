"""Where Bellman steps pay: an exact teacher of bent paths, straightened on several schedules.

    python -m bench.straightening            a table, in a minute or two
    python -m bench.straightening --tiny     the same in seconds, meaningless

Every student starts as the exact teacher plus a correction, sees the same stored trajectories and
takes the same number of updates. Errors are root mean squares to the teacher's endpoint, noise by
noise, over noises that no student has seen. Deterministic for one thread.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowkernels.distill import BOSS
from flowkernels.nn import GaussianMixture
from flowkernels.ode import Schedule, bellman_schedule, sample, uniform


@dataclass(frozen=True)
class Experiment:
    """Sizes of one run."""

    grid: int = 100
    budgets: tuple[int, ...] = (2, 4, 6, 8)
    trajectories: int = 8192
    updates: int = 600
    batch: int = 256
    test: int = 4096
    width: int = 128


TINY = Experiment(grid=10, budgets=(2,), trajectories=64, updates=3, batch=16, test=64, width=8)


class Corrected(nn.Module):
    """The exact velocity and a learned correction, zero at first."""

    frequencies: Tensor

    def __init__(self, teacher: nn.Module, dimension: int, width: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.register_buffer("frequencies", torch.tensor([1.0, 2.0, 4.0, 8.0]))
        sizes = [dimension + 9, width, width, width]
        layers = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(sizes)]
        last = nn.Linear(width, dimension)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*itertools.chain(*layers), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        features = torch.cat([x, t[:, None], angles.sin(), angles.cos()], 1)
        correction: Tensor = self.layers(features)
        return self.teacher(x, t) + correction


def ring(modes: int, radius: float, deviation: float) -> GaussianMixture:
    """Modes on a circle: the narrower, the sharper the paths bend where they choose one."""
    angles = torch.arange(modes) * (2 * math.pi / modes)
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(means, deviation, dtype=torch.float32)


def straightened(
    teacher: GaussianMixture, schedule: Schedule, path: str, sizes: Experiment
) -> nn.Module:
    """A student of one schedule."""
    torch.manual_seed(0)
    student = Corrected(teacher, 2, sizes.width)
    method = BOSS(teacher, schedule=schedule, student=student, grid=sizes.grid, path=path)
    states = method.rolled(torch.randn(sizes.trajectories, 2), {})
    optimizer = torch.optim.Adam(student.layers.parameters(), 3e-3)
    for update in range(sizes.updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / sizes.updates)
        rows = torch.randint(len(states), (sizes.batch,))
        optimizer.zero_grad()
        (loss,) = method.losses({"trajectory": states[rows]}).values()
        torch.autograd.backward(loss)
        optimizer.step()
    return student


def errors(teacher: GaussianMixture, sizes: Experiment) -> list[list[str]]:
    """Rows of the table: K, the predicted gain, and the paired errors."""
    torch.manual_seed(1)
    found = bellman_schedule(teacher, torch.randn(400, 2), grid=sizes.grid, budgets=sizes.budgets)
    noise = torch.randn(sizes.test, 2)
    truth = sample(teacher, noise, uniform(sizes.grid))

    def error(network: nn.Module, schedule: Schedule) -> str:
        return f"{(sample(network, noise, schedule) - truth).square().mean().sqrt():.3f}"

    report, rows = found.report(), []
    reflow = straightened(teacher, uniform(max(sizes.budgets)), "reflow", sizes)
    for K in sizes.budgets:
        even, best = uniform(K), found.schedules[K]
        rows.append([
            str(K), f"{report[K].gain:.2f}", error(teacher, even), error(teacher, best),
            error(reflow, even),
            error(straightened(teacher, even, "teacher", sizes), even),
            error(straightened(teacher, best, "teacher", sizes), best),
        ])  # fmt: skip
    return rows


HEADINGS = ("K", "predicted gain", "teacher, even", "teacher, Bellman", "reflow, even",
            "straightened, even", "BOSS")  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [HEADINGS, ["---:"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    sizes = TINY if parser.parse_args().tiny else Experiment()
    torch.set_num_threads(1)
    for deviation in (0.5, 0.1, 0.02):
        print(f"\n8 modes of deviation {deviation:g} on a circle of radius 2\n")
        print(table(errors(ring(8, 2.0, deviation), sizes)), flush=True)


if __name__ == "__main__":
    main()
