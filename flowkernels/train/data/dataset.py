"""What the loader asks of a dataset."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ImageDataset(Protocol):
    """Images of one size with a class each."""

    shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: tuple[str, ...]
    """Names of the classes; a label is an index into them."""

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """Images [n, C, H, W], float32 in [-1, 1], on the CPU."""
        ...

    @property
    def labels(self) -> Tensor:
        """Class of every image, [N] int64, on the CPU."""
        ...


class TensorDataset:
    """A dataset held in memory as bytes, each value a level from 0 to `levels`.

    Args:
        levels_u8: [N, C, H, W] uint8.
        labels: [N] int64.
        classes: their names.
        maximum: the level that becomes +1; level 0 becomes -1.
    """

    def __init__(
        self, levels_u8: Tensor, labels: Tensor, classes: tuple[str, ...], maximum: int = 255
    ) -> None:
        self._levels = levels_u8
        self._labels = labels
        self._maximum = maximum
        self.classes = classes
        channels, height, width = levels_u8.shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """Class of every image, [N] int64."""
        return self._labels

    def images(self, indices: Tensor) -> Tensor:
        """Images [n, C, H, W], float32 in [-1, 1]."""
        return self._levels[indices].to(torch.float32) * (2.0 / self._maximum) - 1.0
