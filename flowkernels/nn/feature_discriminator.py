"""A discriminator that looks through the teacher's eyes: heads on features of its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.nn.discriminator import SILU_GAIN, Discriminator, check_segments, init_weight
from flowkernels.nn.mmdit import MMDiT
from flowkernels.ops import modulated_norm


class FeatureDiscriminator(Discriminator):
    """Small trained heads on the image tokens of a frozen `MMDiT`, summed to logits [B].

    One head per chosen block: the tokens are normed, projected to `width`, mixed with their
    neighbours on the grid by one residual 3x3 convolution, and averaged to a logit; the heads'
    logits are added, divided by √(number of heads). Blocks of the teacher after the last one
    chosen do not run. Time, class and text reach the heads through the teacher's features.

    **The teacher is held by reference and is no part of this module**: it is neither among its
    parameters nor in its `state_dict`, and moves with whoever owns it, not with this module's
    `.to`. Its weights are frozen here, and it is put in evaluation mode; gradients flow through
    it to `x`. `copy.deepcopy` copies it along unless the copy is of something that holds both,
    whose copy then again has one teacher. No sample sees another.

    R1 works too, at a price: the second backward goes through the formulas of the teacher's
    fused operators instead of their kernels, and keeps their graph.

    Args:
        teacher: the model; frozen and put in evaluation mode.
        layers: indices of blocks as in `MMDiT.features`; by default the blocks that end a
            quarter, half and three quarters of the model.
        width: channels of each head.

    Raises:
        TypeError: `teacher` is no `MMDiT`.
        ValueError: an index that no block has or that comes twice, or a width below 1.

    Example:
        >>> from flowkernels.nn import MMDiTConfig
        >>> teacher = MMDiT(MMDiTConfig(image_size=8, dim=16, depth=4, heads=2, num_classes=3))
        >>> discriminator = FeatureDiscriminator(teacher, width=8)
        >>> discriminator.layers
        (0, 1, 2)
        >>> discriminator(torch.randn(2, 4, 8, 8), torch.rand(2), labels=torch.tensor([0, 3])).shape
        torch.Size([2])

    Source: arXiv 2403.12015 (adversarial distillation on the features of a diffusion model).
    """

    def __init__(
        self, teacher: MMDiT, layers: Sequence[int] | None = None, *, width: int = 64
    ) -> None:
        super().__init__()
        if not isinstance(teacher, MMDiT):
            raise TypeError(f"teacher is a {type(teacher).__name__}; it needs to be an MMDiT")
        if type(width) is not int or width < 1:
            raise ValueError(f"width is {width!r}; it must be an int of at least 1")
        # In a tuple, which nn.Module does not look into: the teacher has another owner.
        self._held = (teacher.requires_grad_(False).eval(),)
        self.layers = _chosen(layers, len(teacher.blocks) + len(teacher.single_blocks))
        self.heads = nn.ModuleList(TokenHead(teacher.config.dim, width) for _ in self.layers)

    @property
    def teacher(self) -> MMDiT:
        """The frozen model whose features are read."""
        return self._held[0]

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        *,
        segments: Sequence[int] | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """[B] logits, positive for real, in the heads' dtype.

        Args:
            x: [B, C, H, W] images, as noisy as `t` says.
            t: [B] times of x; left out, 0: x is clean.
            segments: sizes that add up to B, as in `LatentDiscriminator`; samples here never see
                each other.
            **conditions: the teacher's.

        Raises:
            ValueError: what the teacher's forward raises, or segments that do not add up to B.
        """
        check_segments(segments, len(x))
        if t is None:
            t = torch.zeros(len(x), device=x.device)
        features = self.teacher.features(x, t, self.layers, **conditions)
        patch = self.teacher.config.patch_size
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        logits = [head(h, grid) for head, h in zip(self.heads, features, strict=True)]
        return torch.stack(logits).sum(dim=0) / math.sqrt(len(logits))


class TokenHead(nn.Module):
    """[B, S, D] tokens on a grid to one logit per sample."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.logit = nn.Linear(width, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices that keep the size of features, zero biases."""
        init_weight(self.project, gain=SILU_GAIN, centred=False)
        init_weight(self.mix, gain=SILU_GAIN)
        init_weight(self.logit)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        h = modulated_norm(tokens)
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.project.weight.dtype)  # a teacher of 16 bits, heads of 32
        h = F.silu(self.project(h))
        h = h.transpose(1, 2).unflatten(2, grid)
        h = (h + F.silu(self.mix(h))) * math.sqrt(0.5)
        # In the weights' dtype: bfloat16 logits would have three digits.
        with torch.autocast(h.device.type, enabled=False):
            pooled = h.to(self.logit.weight.dtype).sum(dim=(2, 3)) / math.sqrt(grid[0] * grid[1])
            logits: Tensor = self.logit(pooled).squeeze(1)
        return logits


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if layers is None:
        # Ends of the quarters but the last, rounded up: its blocks only turn features back into
        # a velocity, and need not run.
        return tuple(sorted({(quarter * count + 3) // 4 - 1 for quarter in (1, 2, 3)}))
    chosen = tuple(layers)
    if (
        not chosen
        or len(set(chosen)) != len(chosen)
        or any(type(index) is not int or not 0 <= index < count for index in chosen)
    ):
        raise ValueError(
            f"layers is {chosen}; it needs different block indices from 0 to {count - 1}"
        )
    return chosen
