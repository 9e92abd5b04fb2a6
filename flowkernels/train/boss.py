"""The recipe of Bellman Optimal Stepsize Straightening: schedules, trajectories, students."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flowkernels.distill import BOSS, TrajectoryPlan, roll, trajectory_plan
from flowkernels.distill.trajectories import ENDS
from flowkernels.ode import Schedule, shifted
from flowkernels.ode.bellman import BellmanSchedules
from flowkernels.train.checkpoint import fingerprint
from flowkernels.train.config import OptimConfig, TrainConfig
from flowkernels.train.data import (
    ImageDataset,
    load_dataset,
    store_trajectories,
    stored_times,
)
from flowkernels.train.errors import UsageError
from flowkernels.train.export import WEIGHTS, TrainedModel
from flowkernels.train.process import StopRequest, exclusive, resolve_device
from flowkernels.train.random_state import seed_everything
from flowkernels.train.scheduling import (
    SCHEDULES,
    ScheduleConfig,
    find_schedules,
)
from flowkernels.train.starting import check_images, load_flow
from flowkernels.train.trainer import Trainer


@dataclass
class StepsOptions:
    """The steps that the students learn to walk in."""

    kind: Literal["bellman", "uniform"] = "bellman"
    """bellman: of the least cost along the teacher's trajectories. uniform: even ones."""
    path: str | None = None
    """bellman: schedules.json of `flowkernels schedule`. None: found at the start of the run."""
    grid: int = 100
    """Steps of the teacher."""
    shift: float = 1.0
    """Time shift of the grid (and of uniform steps); 1 is uniform, SD3 has 3."""
    noises: int = 100
    """bellman: trajectories that the cost is the mean of, where it is found here."""


@dataclass
class TrajectoryOptions:
    """The teacher's trajectories."""

    kind: Literal["stored", "online"] = "stored"
    """stored: generated once, K+1 states each, and read from disk. online: rolled on the way."""
    path: str | None = None
    """stored: the folder. Runs with the same teacher may share one that has the states they need;
    reflow needs the ends alone. None: OUTPUT/trajectories."""
    count: int = 5000
    """stored: how many."""
    shard_size: int = 500
    """stored: how many in one file, and rolled at a time; what a killed run may lose."""
    refresh: int = 1
    """online: every so many updates new ones are rolled; in between the last ones serve again."""
    pool: int = 1
    """online: how many rolls serve."""


@dataclass
class BOSSOptions:
    """Straightening (arXiv 2312.16414): regression on the slope of each of the schedule's steps."""

    path: Literal["teacher", "reflow", "reflow-steps"] = "teacher"
    """teacher: the trajectory's own states. For comparison, the line from noise to endpoint:
    reflow at uniform times, reflow-steps at the schedule's."""
    intervals: Literal["all", "one"] = "all"
    """all steps of each trajectory in an update (batch_size·K network rows), or one of each."""
    weighting: Literal["dt2"] | None = None
    """dt2 weighs each step by its squared length: the loss is then the error of the steps."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the teacher, trained into the student; 1 is none."""
    lora_rank: int | None = None
    """Train low-rank updates of this rank; they are merged into the exported weights. None: train
    the weights themselves."""
    lora_alpha: float | None = None
    """Scale of the updates, times the rank. None: the rank."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean over pixels, or sum over them; Adam's eps and clipping see the difference."""


@dataclass
class BOSSRecipe(TrainConfig):
    """Distil a teacher into students of a few steps by Bellman Optimal Stepsize Straightening.

    The recipe file gives the defaults; options override it:

        flowkernels distill boss --recipe recipes/digits-boss.yaml
        flowkernels distill boss --recipe recipes/digits-boss.yaml --budgets 4 --method.guidance 3

    Schedules and trajectories are made first, once, and then a student for each number of steps,
    in OUTPUT/k2, OUTPUT/k4 and so on. Killed? Run the same command again: every part of it goes on
    from where it was.

    Is it worth it? `flowkernels schedule` predicts the gain of Bellman steps without training.
    """

    output: str = "runs/boss"
    """Folder of the students' runs, of the schedules and the trajectories."""
    recipe: str | None = None
    """YAML file with any of these options."""
    teacher: str = "runs/teacher"
    """Folder of the finished teacher run."""
    budgets: tuple[int, ...] = (2, 4, 6)
    """Numbers of steps K."""
    together: bool = False
    """One student for all of them (in OUTPUT/k2-4-6) instead of one for each, which is better."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=2e-4, max_grad_norm=1.0, warmup=5000, ema_decays=(0.999,)
        )
    )
    steps_of: StepsOptions = field(default_factory=StepsOptions)
    trajectories: TrajectoryOptions = field(default_factory=TrajectoryOptions)
    method: BOSSOptions = field(default_factory=BOSSOptions)

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        super().validate()
        budgets = self.budgets
        if not budgets or min(budgets) < 1 or len(set(budgets)) < len(budgets):
            raise UsageError(f"budgets: got {budgets}, needs different numbers of steps >= 1")
        for name in ("count", "shard_size", "refresh", "pool"):
            value = getattr(self.trajectories, name)
            if value < 1:
                raise UsageError(f"trajectories.{name}: got {value}, needs a whole number >= 1")
        if self.steps_of.kind == "uniform" and self.steps_of.path is not None:
            raise UsageError(
                f"steps_of.path: got {self.steps_of.path!r}, needs no value: the steps are uniform"
            )

    def run(self, console: Console | None = None) -> str:
        """Schedules, trajectories, then every student.

        Returns:
            "finished", or "interrupted" after SIGTERM or SIGINT.

        Raises:
            UsageError: settings that do not fit together, a missing teacher, or missing data.
            RunFailed: see `Trainer.run`.
        """
        students = self.trainers(console or Console(stderr=True))
        trainer = next(students, None)
        # From here on a signal is heard between two students as well.
        with StopRequest() as stop:
            while trainer is not None:
                if trainer.run() == "interrupted":
                    return "interrupted"
                trainer = next(students, None)
                if stop.requested and trainer is not None:
                    return "interrupted"
        return "finished"

    def trainers(self, console: Console) -> Iterator[Trainer]:
        """What `run` runs, one after the other; schedules and trajectories exist by then."""
        self.validate()
        device = resolve_device(self.device)
        teacher = load_flow(self.teacher, device=device)
        images = load_dataset(self.data)
        check_images(teacher, self.teacher, images, self.data.labels, self.method.guidance)
        schedules = self._schedules(teacher, console)
        plan = self._plan(schedules)
        dataset: ImageDataset = images
        if self.trajectories.kind == "stored":
            dataset = self._stored(teacher, images, plan, console)
        for group in [self.budgets] if self.together else [(steps,) for steps in self.budgets]:
            folder = Path(self.output) / f"k{'-'.join(map(str, group))}"
            console.print(f"student of {', '.join(map(str, group))} steps: {folder}")
            settings = dataclasses.replace(
                self, output=str(folder), budgets=group, grid_steps=max(group)
            )
            seed_everything(self.seed)
            chosen = {steps: schedules[steps] for steps in group}
            yield Trainer(self._method(teacher, chosen, plan), settings, dataset)

    def _method(
        self, teacher: TrainedModel, schedules: dict[int, Schedule], plan: TrajectoryPlan
    ) -> BOSS:
        stored = self.trajectories.kind == "stored"
        try:
            return BOSS(
                teacher.network,
                schedule=schedules,
                grid=plan.schedule,
                trajectory_times=plan.times if stored else None,
                refresh=self.trajectories.refresh,
                pool=self.trajectories.pool,
                **dataclasses.asdict(self.method),
            )
        except ValueError as error:
            raise UsageError(str(error)) from error

    # ---- schedules ------------------------------------------------------------------------------

    def _schedules(self, teacher: TrainedModel, console: Console) -> dict[int, Schedule]:
        steps = self.steps_of
        if steps.kind == "uniform":
            try:
                return {K: shifted(K, steps.shift) for K in self.budgets}
            except ValueError as error:
                raise UsageError(f"steps_of: {error}") from error
        path = Path(self.output) / SCHEDULES if steps.path is None else Path(steps.path)
        found = self._saved_schedules(path)
        if found is None:
            found = self._search(teacher, path)
            console.print(str(found.report()), highlight=False, markup=False, soft_wrap=True)
        return {K: found.schedules[K] for K in self.budgets}

    def _saved_schedules(self, path: Path) -> BellmanSchedules | None:
        """Those of the file; None where the run has to make it."""
        ours = self.steps_of.path is None
        if ours and not path.exists():
            return None
        try:
            found = BellmanSchedules.load(path)
        except (OSError, ValueError) as error:
            if ours:
                return None
            raise UsageError(f"steps_of.path: {path}: {' '.join(str(error).split())}") from error
        differing = self._differences(found)
        if differing and ours:
            return None
        if differing:
            raise UsageError(f"steps_of.path: {path} is of another {', '.join(differing)}")
        return found

    def _differences(self, found: BellmanSchedules) -> list[str]:
        """In what saved schedules are not those of this recipe."""
        settings, steps = found.settings, self.steps_of
        same = {
            "teacher": settings.get("teacher") == fingerprint(Path(self.teacher) / WEIGHTS),
            "guidance": settings.get("guidance") == self.method.guidance,
            "grid": found.grid == shifted(steps.grid, steps.shift),
            "budgets": set(self.budgets) <= set(found.schedules),
        }
        return [name for name, agrees in same.items() if not agrees]

    def _search(self, teacher: TrainedModel, path: Path) -> BellmanSchedules:
        config = ScheduleConfig(
            teacher=self.teacher,
            budgets=self.budgets,
            grid=self.steps_of.grid,
            shift=self.steps_of.shift,
            guidance=self.method.guidance,
            noises=self.steps_of.noises,
            seed=self.seed,
        )
        found = find_schedules(config, teacher, resolve_device(self.device))
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        found.plot(path.with_suffix(".png"))
        return found

    # ---- trajectories ---------------------------------------------------------------------------

    def _plan(self, schedules: dict[int, Schedule]) -> TrajectoryPlan:
        """What the students need of the teacher; all that is stored, where that includes it."""
        grid, shift = self.steps_of.grid, self.steps_of.shift
        times = [schedule.times for schedule in schedules.values()]
        if self.method.path != "teacher":
            times = [ENDS]
        try:
            plan = trajectory_plan(grid, shift, times)
        except ValueError as error:
            raise UsageError(f"steps_of: {error}") from error
        if self.trajectories.kind == "stored" and (kept := stored_times(self._folder)) is not None:
            wider = trajectory_plan(grid, shift, [kept])
            if {*plan.times.tolist()} <= {*wider.times.tolist()}:
                return wider
        return plan

    @property
    def _folder(self) -> Path:
        path = self.trajectories.path
        return Path(self.output) / "trajectories" if path is None else Path(path)

    def _stored(
        self,
        teacher: TrainedModel,
        images: ImageDataset,
        plan: TrajectoryPlan,
        console: Console,
    ) -> ImageDataset:
        options, device = self.trajectories, resolve_device(self.device)
        settings = {
            "teacher": fingerprint(Path(self.teacher) / WEIGHTS),
            "grid": plan.schedule.times.tolist(),
            "guidance": self.method.guidance,
            "times": plan.times.tolist(),
            "shape": list(teacher.shape),
            "classes": list(images.classes),
            "count": options.count,
            "shard_size": options.shard_size,
            "seed": self.seed,
        }

        def states(noise: Tensor, conditions: dict[str, Tensor]) -> Tensor:
            guided = self.method.guidance != 1
            return roll(
                teacher.network,
                noise,
                plan,
                guidance=self.method.guidance,
                conditions=conditions,
                uncond=teacher.network.null_conditions(conditions) if guided else None,
            )

        with exclusive(self._folder), Progress(console=console, transient=True) as progress:
            task = progress.add_task("rolling the teacher", total=options.count)
            return store_trajectories(
                self._folder,
                states,
                settings,
                images.labels if self.data.labels else None,
                device,
                lambda done, _: progress.update(task, completed=done),
            )
