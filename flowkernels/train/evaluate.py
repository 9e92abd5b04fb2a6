"""How good are the samples? Class accuracy, Fréchet distance, time; as a table and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowkernels.ode import Schedule, uniform
from flowkernels.ode.bellman import BellmanSchedules
from flowkernels.train.classifier import Classifier, cached_classifier
from flowkernels.train.config import check_guidance, check_seed
from flowkernels.train.data import ImageDataset, load_dataset
from flowkernels.train.errors import UsageError
from flowkernels.train.export import MODEL, TrainedModel, load_model
from flowkernels.train.files import write_json
from flowkernels.train.frechet import frechet_distance
from flowkernels.train.pictures import save_grid
from flowkernels.train.process import resolve_device

_BATCH = 500
# Rows that the table is made for.
_METHODS = ("student", "FGM", "BOSS", "SCFlow")


@dataclass
class EvaluateConfig:
    """Compare a teacher at several step counts with its students, on the same noises.

    flowkernels evaluate --recipe recipes/digits-evaluate.yaml

    flowkernels evaluate --recipe recipes/digits-boss-evaluate.yaml

    flowkernels evaluate --recipe recipes/digits-scflow-evaluate.yaml

    flowkernels evaluate --teacher runs/my-teacher --student runs/my-student --output runs/judged
    """

    recipe: str | None = None
    """YAML file with any of these options."""
    teacher: str = "runs/digits-teacher"
    """Folder of the finished teacher run."""
    student: str | None = "runs/digits-fgm"
    """Folder of the finished one-step student run. None: no such student."""
    students: tuple[str, ...] = ()
    """Folders of further finished students, of any method, or folders of such runs (OUTPUT of
    distill boss). Each is judged at the steps it was made for."""
    student_steps: tuple[int, ...] = (1, 2, 4, 8)
    """Step counts of students that take any (distill scflow)."""
    missing: Literal["error", "skip"] = "error"
    """skip: leave out those of `students` that are not finished, and say so."""
    schedules: str | None = None
    """schedules.json of `flowkernels schedule`: the teacher at those steps, untrained, too."""
    output: str = "runs/digits-evaluate"
    """Folder for results.json, samples.png and the classifier that judges."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Step counts of the teacher."""
    samples: int = 2000
    """Generated images per row of the table."""
    reference_steps: int | None = None
    """Steps of the teacher, 100 say, to whose images every row is compared noise by noise. None:
    no paired error."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the teacher; 1 is none."""
    seed: int = 0
    """Seed of the noises and of the classifier."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        if self.samples < 2:
            raise UsageError(f"samples: got {self.samples}, needs at least 2")
        if not self.steps or min(self.steps) < 1:
            raise UsageError(f"steps: got {self.steps}, needs step counts >= 1")
        check_seed(self.seed)
        check_guidance(self.guidance)
        few = self.student_steps
        if not few or min(few) < 1:
            raise UsageError(f"student_steps: got {few}, needs step counts >= 1")
        reference = self.reference_steps
        if reference is not None and reference < 1:
            raise UsageError(f"reference_steps: got {reference}, needs a step count >= 1")


@dataclass
class Row:
    """One line of the table."""

    name: str
    steps: int | None
    """Network evaluations per image; None for real images."""
    accuracy: float
    """Share of images that the classifier puts into the class asked for. NaN without classes."""
    frechet: float
    """Fréchet distance to all real images, in the classifier's features. NaN where an image is not
    finite."""
    seconds_per_1000: float | None
    """Time to generate 1,000 images."""
    paired_error: float | None = None
    """Root mean squared difference, of values in [-1, 1], to the teacher's images of the same
    noises at `reference_steps`."""


def evaluate(config: EvaluateConfig, console: Console | None = None) -> list[Row]:
    """Judge a teacher and its students by a classifier that has seen only real images.

    Every row uses the same noises and labels. The first row is the floor: the Fréchet distance
    between two random halves of the real images. Between finite sets of the same law the distance
    is not zero but about proportional to 1/n + 1/m, so the larger sets of the other rows have a
    lower floor; the table's caption gives it.

    Returns:
        The rows; also written to `<output>/results.json`, with `<output>/samples.png`: for the same
        noises, the teacher at its most steps, at one step, and the students.

    Raises:
        UsageError: a run is missing or damaged, or the two are of different images.
    """
    config.validate()
    console = console or Console()
    device = resolve_device(config.device)
    teacher = load_model(config.teacher, device)
    student = None if config.student is None else load_model(config.student, device)
    folders = _student_folders(config, console)
    few = [load_model(folder, device) for folder in folders]
    for model in [*few, *([] if student is None else [student])]:
        if model.shape != teacher.shape:
            raise UsageError(f"student: makes images {model.shape}, the teacher {teacher.shape}")
        if model.num_classes != teacher.num_classes:
            raise UsageError(
                f"student: has {model.num_classes} classes, the teacher {teacher.num_classes}"
            )
    schedules = _schedules(config.schedules)
    dataset = load_dataset(teacher.data)
    if len(dataset) < 4:
        raise UsageError(f"data: {len(dataset)} images, needs 4 for two halves to compare")
    with console.status("training the classifier on real images"):
        judge = cached_classifier(config.output, dataset, config.seed)
        rows = [_real(judge, dataset, config.seed)]
    real_features, _ = judge.judge(_all_images(dataset))
    noise, labels = _noises(config, teacher, device)

    reference: Tensor | None = None

    def measure(
        name: str,
        model: TrainedModel,
        steps: int,
        guidance: float = 1.0,
        schedule: Schedule | None = None,
    ) -> Tensor:
        with console.status(f"{name}, {steps} step{'s' if steps > 1 else ''}"):
            images, seconds = _timed(
                lambda n, c: model.generate(n, steps, c, guidance, schedule), noise, labels, device
            )
            features, predicted = judge.judge(images)
        right = distance = float("nan")
        if bool(images.isfinite().all()):
            if labels is not None:
                right = float((predicted == labels.cpu()).double().mean())
            distance = frechet_distance(features.numpy(), real_features.numpy())
        paired = None if reference is None else float((images - reference).square().mean().sqrt())
        speed = 1000 * seconds / config.samples
        rows.append(Row(name, steps, right, distance, speed, paired))
        return images

    if config.reference_steps is not None:
        reference = measure("teacher", teacher, config.reference_steps, config.guidance)
    for steps in config.steps:
        if steps != config.reference_steps:
            measure("teacher", teacher, steps, config.guidance)
    for steps, schedule in schedules.items():
        measure("teacher, Bellman steps", teacher, steps, config.guidance, schedule)
    if student is not None:
        measure("student", student, 1)
    methods = [model.info["method"] for model in few if not model.schedules]
    for folder, model in zip(folders, few, strict=True):
        for steps in _steps(model, config):
            name = _name(model, steps)
            several = methods.count(name) > 1
            measure(f"{name}, {folder.name}" if several else name, model, steps)
    floor = rows[0].frechet * _size_bias(len(dataset), config.samples)
    _write(
        config, rows, floor, teacher, [*few, *([] if student is None else [student])], noise, labels
    )
    console.print(_table(rows, config, floor))
    return rows


def _student_folders(config: EvaluateConfig, console: Console) -> list[Path]:
    """Each run's folder: those given, or the runs that they hold."""
    found = []
    for folder in map(Path, config.students):
        runs = [folder] if (folder / MODEL).is_file() else sorted(folder.glob(f"k*/{MODEL}"))
        if not runs:
            message = f"students: {folder} holds no finished student (model.json)"
            if config.missing == "error":
                raise UsageError(message)
            console.print(f"{message}: left out", highlight=False, markup=False, soft_wrap=True)
        found += [run if run == folder else run.parent for run in runs]
    return found


def _steps(model: TrainedModel, config: EvaluateConfig) -> tuple[int, ...]:
    """The step counts at which a student is judged."""
    return (1,) if model.one_step else tuple(model.schedules) or config.student_steps


def _schedules(path: str | None) -> dict[int, Schedule]:
    if path is None:
        return {}
    try:
        return BellmanSchedules.load(path).schedules
    except (OSError, ValueError) as error:
        raise UsageError(f"schedules: {path}: {' '.join(str(error).split())}") from error


def _name(model: TrainedModel, steps: int) -> str:
    """What a student is called in the table."""
    if not model.schedules:
        return str(model.info["method"])
    path = model.info["schedules"]["path"]
    if path != "teacher":
        return "reflow" if path == "reflow" else "reflow, at the steps"
    even = torch.allclose(model.schedules[steps].times, uniform(steps).times)
    return "straightened, even steps" if even else "BOSS"


def _size_bias(real: int, samples: int) -> float:
    """(1/n + 1/m) of the generated rows over that of two halves of the real images."""
    return (1 / samples + 1 / real) / (1 / (real // 2) + 1 / (real - real // 2))


def _noises(
    config: EvaluateConfig, model: TrainedModel, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn((config.samples, *model.shape), generator=generator).to(device)
    if not model.num_classes:
        return noise, None
    return noise, torch.arange(config.samples, device=device) % model.num_classes


def _timed(
    generate: Callable[[Tensor, Tensor | None], Tensor],
    noise: Tensor,
    labels: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Images of all noises on the CPU, and the seconds that took after a small warm-up."""

    def part(rows: slice) -> Tensor:
        return generate(noise[rows], None if labels is None else labels[rows])

    def settle() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    part(slice(0, 1))
    start = settle()
    images = [part(slice(i, i + _BATCH)) for i in range(0, len(noise), _BATCH)]
    seconds = settle() - start
    return torch.cat(images).float().cpu(), seconds


def _all_images(dataset: ImageDataset) -> Tensor:
    return dataset.images(torch.arange(len(dataset)))


def _real(judge: Classifier, dataset: ImageDataset, seed: int) -> Row:
    """The floor: one random half of the real images against the other."""
    features, predicted = judge.judge(_all_images(dataset))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    first, second = features[order[:half]].numpy(), features[order[half:]].numpy()
    accuracy = float((predicted == dataset.labels).double().mean())
    return Row("real vs real", None, accuracy, frechet_distance(first, second), None)


def _table(rows: list[Row], config: EvaluateConfig, floor: float) -> Table:
    table = Table(
        title=f"{config.samples} samples a row, the same noises",
        caption=f"real vs real: two halves; for sets as large as the others', about {floor:.2f}",
    )
    table.add_column("images")
    paired = config.reference_steps is not None
    headings = ["steps", "class accuracy", "Fréchet distance", "s / 1,000 images"]
    for heading in [*headings, *(["paired error"] if paired else [])]:
        table.add_column(heading, justify="right")
    for row in rows:
        seconds = "" if row.seconds_per_1000 is None else f"{row.seconds_per_1000:.3f}"
        steps = "" if row.steps is None else str(row.steps)
        style = "bold" if row.name in _METHODS else None
        cells = [row.name, steps, f"{row.accuracy:.1%}", f"{row.frechet:.2f}", seconds]
        if paired:
            cells.append("" if row.paired_error is None else f"{row.paired_error:.3f}")
        table.add_row(*cells, style=style)
    return table


def _write(
    config: EvaluateConfig,
    rows: list[Row],
    floor: float,
    teacher: TrainedModel,
    students: list[TrainedModel],
    noise: Tensor,
    labels: Tensor | None,
) -> None:
    folder = Path(config.output)
    result = {
        "config": asdict(config),
        "frechet_floor": floor,
        # JSON has no NaN: what is not there is null.
        "rows": [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows],
    }
    write_json(folder / "results.json", result)
    columns = min(20, len(noise))
    few = noise[:columns]
    classes = None if labels is None else labels[:columns]
    strips = [teacher.generate(few, n, classes, config.guidance) for n in (max(config.steps), 1)]
    for student in students:
        strips += [student.generate(few, n, classes) for n in _steps(student, config)]
    save_grid(folder / "samples.png", torch.cat(strips).cpu(), columns)
