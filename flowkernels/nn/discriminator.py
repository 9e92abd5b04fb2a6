"""A discriminator of images or latents: a residual network, smooth enough for R1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.nn.discriminator_config import LatentDiscriminatorConfig
from flowkernels.nn.embeddings import ClassTable
from flowkernels.nn.minibatch import MinibatchStd

SILU_GAIN = 0.313**-0.5
"""Var[silu(z)] = 0.313 for z ~ N(0, 1)."""


class Discriminator(nn.Module):
    """What every discriminator offers: raw logits, and real and fake in one call."""

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        *,
        segments: Sequence[int] | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """[B] logits, positive for real: no sigmoid, the softplus losses take them as they are.

        Args:
            x: [B, C, H, W] images, latents, or either with noise.
            t: [B] times of x; None where x is clean.
            segments: sizes of the parts of the batch that must not see each other, in order; by
                default the whole batch is one.
            **conditions: keyword tensors [B, ...].
        """
        raise NotImplementedError

    def pairs(
        self, real: Tensor, fake: Tensor, t: Tensor | None = None, **conditions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(real_logits, fake_logits) of one call: the logits of two calls, to rounding.

        Neither depends on the other's samples. For R1 pass the real samples alone instead: its
        second backward would run over the fake half for nothing.

        Args:
            real: [B, C, H, W].
            fake: [B, C, H, W].
            t: [B], the times of both.
            **conditions: keyword tensors [B, ...], of both.

        Raises:
            ValueError: the shapes differ.
        """
        if real.shape != fake.shape:
            raise ValueError(
                f"fake has shape {tuple(fake.shape)}; it needs that of real, {tuple(real.shape)}"
            )
        both = {name: torch.cat([value, value]) for name, value in conditions.items()}
        times = None if t is None else torch.cat([t, t])
        segments = (len(real), len(fake))
        logits: Tensor = self(torch.cat([real, fake]), times, segments=segments, **both)
        real_logits, fake_logits = logits.split(segments)
        return real_logits, fake_logits


class LatentDiscriminator(Discriminator):
    """A convolutional residual network from [B, C, H, W] to logits [B].

    A convolution (3x3, or 3s by 3s with stride s = `stem_stride`) and SiLU, `depth` blocks

        `y = silu(conv(pool(silu(conv(x)))))`,  `out = (y + conv_1x1(pool(x))) / √2`,

    the minibatch standard deviation, one more 3x3 convolution and SiLU, the sum over the P
    positions over √P, and a linear layer. With classes, the logit gets the projection
    `⟨features, e_label⟩`, which is zero for the id "no class". Everything is twice
    differentiable, so R1 has a gradient everywhere. `pool` sums windows of 2x2 and halves the
    sum: its matrix has orthonormal rows, gradients keep their norm on the way to x, and ‖∇D‖ at
    initialisation is of order 1, what R1 with γ = 1 takes for granted. Any size from 4 by 4 up is
    taken, odd ones too.

    **Pass real and fake in separate calls, or in one with `segments` or `pairs`.** Samples of one
    call that are not kept apart by `segments` share their minibatch standard deviation, and so
    one sample's logit depends on the others'.

    torch.compile cannot differentiate twice: call the module uncompiled for R1.

    Args:
        config: sizes and options.

    Example:
        >>> config = LatentDiscriminatorConfig(in_channels=1, num_classes=10)
        >>> discriminator = LatentDiscriminator(config)
        >>> real, fake = torch.randn(2, 3, 1, 8, 8)
        >>> discriminator(real, labels=torch.tensor([0, 9, 10])).shape
        torch.Size([3])
        >>> real_logits, fake_logits = discriminator.pairs(real, fake)

    Source: arXiv 1912.04958 (residual discriminator), arXiv 1802.05637 (projection), arXiv
    1801.04406 (R1).
    """

    def __init__(self, config: LatentDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        last = widths[-1]
        stride = config.stem_stride
        self.stem = nn.Conv2d(config.in_channels, widths[0], 3 * stride, stride, padding=stride)
        self.blocks = nn.ModuleList(
            DownBlock(narrow, wide) for narrow, wide in itertools.pairwise(widths)
        )
        self.minibatch_std = MinibatchStd(config.group_size) if config.group_size > 1 else None
        self.mix = nn.Conv2d(last + (config.group_size > 1), last, 3, padding=1)
        self.logit = nn.Linear(last, 1)
        # The row "no class" stays zero: it gets no gradient.
        self.classes = (
            ClassTable(config.num_classes + 1, last, padding_idx=config.num_classes)
            if config.num_classes
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices that keep the size of features and of gradients, zero biases, no class known."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                after_silu = module is not self.stem
                activated = module is not self.logit and module.bias is not None
                init_weight(module, centred=after_silu, gain=SILU_GAIN if activated else 1.0)
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        *,
        segments: Sequence[int] | None = None,
        labels: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """[B] logits, positive for real, in the weights' dtype.

        Args:
            x: [B, C, H, W], H and W at least 4 (and `stem_stride`).
            t: not read, like other conditions than `labels`: they are accepted, so that a method
                calls every discriminator alike.
            segments: sizes of the parts of the batch that must not see each other, in order:
                `(len(real), len(fake))`.
            labels: [B] int64 class ids; left out, "no class". Not read where
                `config.num_classes` is 0.

        Raises:
            ValueError: a shape that does not fit the configuration, or segments that do not add
                up to B.
        """
        self._check(x, labels)
        check_segments(segments, len(x))
        h = F.silu(self.stem(x.to(self.stem.weight.dtype)))
        for block in self.blocks:
            h = block(h)
        if self.minibatch_std is not None:
            h = self.minibatch_std(h, segments)
        h = F.silu(self.mix(h))
        return self._logits(h, labels)

    def _logits(self, h: Tensor, labels: Tensor | None) -> Tensor:
        # In the weights' dtype: bfloat16 logits would have three digits.
        with torch.autocast(h.device.type, enabled=False):
            positions = h.shape[2] * h.shape[3]
            features = h.to(self.logit.weight.dtype).sum(dim=(2, 3)) / math.sqrt(positions)
            logits = self.logit(features).squeeze(1)
            if self.classes is not None and labels is not None:
                logits = logits + (features * self.classes(labels)).sum(dim=1)
        return logits

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        channels, least = self.config.in_channels, max(4, self.config.stem_stride)
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it needs (B, {channels}, H, W) with H and W of at "
                f"least {least}"
            )
        if labels is None or not self.config.num_classes:
            return
        if tuple(labels.shape) != (len(x),):
            raise ValueError(f"labels has shape {tuple(labels.shape)}; it needs ({len(x)},)")
        if labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels has dtype {labels.dtype}; it needs int64 class ids")


class DownBlock(nn.Module):
    """One residual block: [B, C, H, W] to [B, C', ⌈H/2⌉, ⌈W/2⌉]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.silu(self.conv2(halved(F.silu(self.conv1(x)))))
        skip: Tensor = self.skip(halved(x))
        return (branch + skip) * math.sqrt(0.5)


def halved(x: Tensor) -> Tensor:
    """Half the sums over windows of 2x2; beyond an odd edge are zeros, as for convolutions."""
    return F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=2)


def init_weight(layer: nn.Conv2d | nn.Linear, *, gain: float = 1.0, centred: bool = True) -> None:
    """Normal weights of variance gain²/fan-in, each output's centred where the input is SiLU's.

    A SiLU's mean is not zero. Uncentred weights make of it a constant that grows from layer to
    layer, larger than what tells one sample from another.
    """
    weight = layer.weight.detach()
    nn.init.normal_(weight, std=gain / math.sqrt(weight[0].numel()))
    if centred:
        weight -= weight.flatten(1).mean(dim=1).view(-1, *[1] * (weight.dim() - 1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_segments(segments: Sequence[int] | None, batch: int) -> None:
    """Raise ValueError unless `segments` are sizes that add up to `batch`."""
    if segments is None:
        return
    if any(size < 0 for size in segments) or sum(segments) != batch:
        raise ValueError(
            f"segments is {tuple(segments)}; it needs sizes that add up to the batch, {batch}"
        )
