"""The finished flow that a run begins with: a teacher, or weights to go on from."""

from __future__ import annotations

import torch

from flowkernels.train.data import ImageDataset
from flowkernels.train.errors import UsageError
from flowkernels.train.export import TrainedModel, load_model


def load_flow(
    folder: str, option: str = "teacher", device: torch.device | str = "cpu"
) -> TrainedModel:
    """A finished run that holds a flow.

    Raises:
        UsageError: it is missing, damaged, or a student; `option` named the folder.
    """
    model = load_model(folder, device)
    if not model.is_flow:
        raise UsageError(f"{option}: {folder} holds a student of few steps, not a flow")
    return model


def check_images(
    model: TrainedModel, folder: str, dataset: ImageDataset, labels: bool, guidance: float = 1.0
) -> None:
    """Whether a run on a dataset can begin with a flow.

    Args:
        model: the flow.
        folder: where it came from.
        dataset: the run's images.
        labels: whether their classes are used.
        guidance: the run's `method.guidance`.

    Raises:
        UsageError: the flow is of other images or classes, or guidance has no classes to guide to.
    """
    classes = len(dataset.classes) if labels else 0
    if (model.shape, model.num_classes) != (dataset.shape, classes):
        raise UsageError(
            f"data: images {dataset.shape} of {classes} classes, but the model in {folder} makes "
            f"{model.shape} of {model.num_classes}"
        )
    if guidance != 1 and not classes:
        raise UsageError(
            f"method.guidance: got {guidance}, needs 1.0 for a teacher without classes"
        )
