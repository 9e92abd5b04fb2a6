"""Bellman schedules of a finished teacher: found, reported, saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from flowkernels.ode import bellman_schedule
from flowkernels.train.checkpoint import fingerprint
from flowkernels.train.config import check_seed
from flowkernels.train.errors import UsageError
from flowkernels.train.export import WEIGHTS, TrainedModel
from flowkernels.train.process import resolve_device
from flowkernels.train.starting import load_flow

if TYPE_CHECKING:
    from flowkernels.ode.bellman import BellmanSchedules

SCHEDULES = "schedules.json"


@dataclass
class ScheduleConfig:
    """Find the Bellman schedules of a teacher, and what they should buy over even steps.

        flowkernels schedule --recipe recipes/digits-schedule.yaml
        flowkernels schedule --teacher runs/my-teacher --guidance 4.5 --budgets 4 8

    It takes as many network evaluations as sampling the noises on the whole grid once, and no
    training: look at the predicted gain before you distil. Near 1, even steps are as good.

    Writes OUTPUT/schedules.json (for distill boss) and OUTPUT/schedules.png.
    """

    recipe: str | None = None
    """YAML file with any of these options."""
    teacher: str = "runs/teacher"
    """Folder of the finished teacher run."""
    output: str = "runs/schedule"
    """Folder for schedules.json and schedules.png."""
    budgets: tuple[int, ...] = (2, 4, 6, 8)
    """Numbers of steps K, a schedule for each."""
    grid: int = 100
    """Steps of the teacher, of which the schedules are made."""
    shift: float = 1.0
    """Time shift of the grid; 1 is uniform, SD3 has 3."""
    guidance: float = 1.0
    """Classifier-free guidance scale at which the student will be deployed; 1 is none."""
    noises: int = 100
    """Trajectories that the cost is the mean of."""
    power: float = 2.0
    """Power of the error's norm in the cost: 2 as in BOSS, 1 as in GITS."""
    discount: float = 1.0
    """On the cost of later steps: 1 as in BOSS, 1.15 as in GITS."""
    endpoints: bool = False
    """Also sample in K steps, untrained, along the schedules and along even steps: how far both end
    from the teacher."""
    bootstrap: int = 200
    """Resamples of the noises, for the confidence of schedules and gains."""
    seed: int = 0
    """Seed of the noises and of the resampling."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        if not self.budgets:
            raise UsageError("budgets: got none, needs numbers of steps")
        if self.noises < 1:
            raise UsageError(f"noises: got {self.noises}, needs a whole number >= 1")


def schedule(config: ScheduleConfig, console: Console | None = None) -> BellmanSchedules:
    """Do what the configuration asks for; print the report.

    Raises:
        UsageError: a missing or damaged run, or a setting that makes no sense.
    """
    config.validate()
    console = console or Console()
    device = resolve_device(config.device)
    teacher = load_flow(config.teacher, device=device)
    with console.status("rolling the teacher"):
        found = find_schedules(config, teacher, device)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / SCHEDULES)
    found.plot(folder / "schedules.png")
    console.print(str(found.report()), highlight=False, markup=False, soft_wrap=True)
    console.print()
    for steps, each in found.schedules.items():
        times = " ".join(f"{time:.2f}" for time in each.times.tolist())
        console.print(f"{steps:5d} steps: {times}", highlight=False, markup=False)
    return found


def find_schedules(
    config: ScheduleConfig, teacher: TrainedModel, device: torch.device
) -> BellmanSchedules:
    """The schedules of a loaded teacher; their settings hold the fingerprint of its weights.

    Raises:
        UsageError: a setting that the search refuses.
    """
    check_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn((config.noises, *teacher.shape), generator=generator).to(device)
    conditions: dict[str, Tensor] = {}
    if teacher.num_classes:
        conditions["labels"] = torch.arange(config.noises, device=device) % teacher.num_classes
    try:
        found = bellman_schedule(
            teacher.network,
            noise,
            grid=config.grid,
            budgets=config.budgets,
            guidance=config.guidance,
            conditions=conditions,
            shift=config.shift,
            power=config.power,
            discount=config.discount,
            bootstrap=config.bootstrap,
            endpoints=config.endpoints,
            seed=config.seed,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    settings = {**found.settings, "teacher": fingerprint(Path(config.teacher) / WEIGHTS)}
    return dataclasses.replace(found, settings=settings)
