"""The minibatch standard deviation: what a sample's neighbours tell a discriminator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-4
"""Added to the variance of features of unit size. Not the usual 1e-8: R1 differentiates the root
twice, and its second derivative at equal samples is `1/(size·√EPS)`."""


class MinibatchStd(nn.Module):
    """Appends one channel: how much the features vary among the samples of a group.

        `s_g = mean_CHW √(var_{b in g}(x) + 1e-4)`

    with the unbiased variance, the same number for every sample of a group and every position. A
    generator that collapses makes it small. A group is `group_size` neighbours in the batch; where
    that does not divide the batch, groups are as even as can be, none larger (5 by fours: 3 and
    2). A sample alone has s = 0.01.

    **Groups never cross `segments`.** A discriminator that met real and fake samples in one
    group would see in every real sample's logit how the fake ones vary.

    Args:
        group_size: the most samples in a group.

    Example:
        >>> MinibatchStd(4)(torch.randn(5, 8, 2, 2)).shape
        torch.Size([5, 9, 2, 2])

    Source: arXiv 1710.10196 (section 3), grouped as in arXiv 1912.04958.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor, segments: Sequence[int] | None = None) -> Tensor:
        """[B, C, H, W] to [B, C + 1, H, W]; `segments` are the sizes of parts kept apart."""
        parts = x.split(list(segments)) if segments is not None else [x]
        std = torch.cat([self._std(part) for part in parts])
        return torch.cat([x, std.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)

    def _std(self, x: Tensor) -> Tensor:
        """[B] in at least float32: one number per sample, of its own group."""
        x = x if x.dtype == torch.float64 else x.float()
        batch = len(x)
        if not batch:
            return x.new_zeros(0)
        groups = -(-batch // self.group_size)
        # Not divmod: torch.compile has none for a batch of unknown size.
        size, larger = batch // groups, batch % groups
        if not larger:
            return _group_std(x, size)
        # The first `larger` groups have one sample more than the others.
        front = larger * (size + 1)
        return torch.cat([_group_std(x[:front], size + 1), _group_std(x[front:], size)])


def _group_std(x: Tensor, size: int) -> Tensor:
    """[groups·size, C, H, W] to [groups·size]."""
    if size == 1:
        return x.new_full((len(x),), EPS**0.5)
    std = (x.unflatten(0, (-1, size)).var(dim=1) + EPS).sqrt().flatten(1).mean(dim=1)
    return std.repeat_interleave(size)
