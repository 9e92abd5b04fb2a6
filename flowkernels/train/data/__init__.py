"""Real images from local paths, and the loader that deals them out."""

from __future__ import annotations

from flowkernels.train.config import DataConfig
from flowkernels.train.data.cifar import load_cifar10
from flowkernels.train.data.dataset import ImageDataset, TensorDataset
from flowkernels.train.data.digits import load_digits
from flowkernels.train.data.folder import FolderDataset
from flowkernels.train.data.loader import Loader
from flowkernels.train.data.trajectories import (
    TrajectoryDataset,
    store_trajectories,
    stored_times,
)

__all__ = [
    "FolderDataset",
    "ImageDataset",
    "Loader",
    "TensorDataset",
    "TrajectoryDataset",
    "load_cifar10",
    "load_dataset",
    "load_digits",
    "store_trajectories",
    "stored_times",
]


def load_dataset(config: DataConfig) -> ImageDataset:
    """The dataset that a configuration names.

    Raises:
        DataError: a file or folder is missing or damaged; one line that names it.
        UsageError: settings that do not fit together.
    """
    config.validate()
    if config.kind == "digits":
        return load_digits(config.split)
    assert config.path is not None  # validate() has seen to it
    if config.kind == "cifar10":
        return load_cifar10(config.path, config.split)
    assert config.image_size is not None
    return FolderDataset(config.path, config.image_size, config.channels)
