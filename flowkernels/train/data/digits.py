"""scikit-learn's bundled handwritten digits: 1,797 greys of 8x8, with nothing to download."""

from __future__ import annotations

import torch

from flowkernels.train.data.dataset import TensorDataset
from flowkernels.train.errors import DataError


def load_digits(split: str = "all") -> TensorDataset:
    """The digits, level 0 at -1 and level 16 at +1.

    Args:
        split: "all"; "test" is every fifth image, "train" the others.

    Example:
        >>> dataset = load_digits()
        >>> len(dataset), dataset.shape
        (1797, (1, 8, 8))
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits

        bunch = sklearn_digits()
    except (ImportError, OSError) as error:
        raise DataError(f"digits: scikit-learn's bundled digits cannot be read: {error}") from error
    levels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    if split != "all":
        is_test = torch.arange(len(labels)) % 5 == 4
        chosen = is_test if split == "test" else ~is_test
        levels, labels = levels[chosen], labels[chosen]
    return TensorDataset(levels, labels, tuple(str(i) for i in range(10)), maximum=16)
