"""Draw images from a finished run into a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flowkernels.train.config import check_guidance, check_seed
from flowkernels.train.errors import UsageError
from flowkernels.train.export import load_model
from flowkernels.train.pictures import save_grid
from flowkernels.train.process import resolve_device


@dataclass
class SampleConfig:
    """Draw images from a finished run into a PNG, one column per class.

    Examples:

        flowkernels sample --run runs/digits-fgm
        flowkernels sample --run runs/digits-teacher --steps 50 --labels 3 8 --rows 4
    """

    recipe: str | None = None
    """YAML file with any of these options."""
    run: str = "runs/digits-fgm"
    """Folder of a finished run (weights.safetensors and model.json)."""
    output: str | None = None
    """PNG to write. None: <run>/samples.png."""
    steps: int = 1
    """Euler steps from noise to image; a one-step generator takes 1."""
    labels: tuple[int, ...] = ()
    """Classes to draw, by number. Empty: the first ten. Not for unconditional models."""
    rows: int = 8
    """Images per class."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none. Not for one-step generators."""
    seed: int = 0
    """Seed of the noises."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""


def sample_images(config: SampleConfig) -> Path:
    """Write the PNG that the configuration asks for.

    Returns:
        Its path.

    Raises:
        UsageError: a setting the model cannot serve, or a run that is missing or damaged.
    """
    for name in ("steps", "rows"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name}: got {getattr(config, name)}, needs a whole number >= 1")
    check_seed(config.seed)
    check_guidance(config.guidance)
    device = resolve_device(config.device)
    model = load_model(config.run, device)
    labels = None
    columns = 8
    if model.num_classes:
        classes = config.labels or tuple(range(min(model.num_classes, 10)))
        if not all(0 <= label < model.num_classes for label in classes):
            raise UsageError(f"labels: got {classes}, needs classes 0 to {model.num_classes - 1}")
        columns = len(classes)
        labels = torch.tensor(classes, device=device).repeat(config.rows)
    elif config.labels:
        raise UsageError(f"labels: got {config.labels}, but the model in {config.run} has none")
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn((config.rows * columns, *model.shape), generator=generator).to(device)
    images = model.generate(noise, config.steps, labels, config.guidance)
    path = Path(config.run) / "samples.png" if config.output is None else Path(config.output)
    if path.suffix.lower() != ".png":
        raise UsageError(f"output: got {str(path)!r}, needs a name that ends in .png")
    save_grid(path, images, columns)
    return path
