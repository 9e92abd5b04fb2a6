"""The configuration of `LatentDiscriminator`: one flat dataclass that a recipe file can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowkernels.nn.config import _check_int, _require


@dataclasses.dataclass(frozen=True)
class LatentDiscriminatorConfig:
    """Sizes and options of a `LatentDiscriminator`.

    The defaults are for 8 by 8 images, and cheap. For latents of 32 by 32, `width=64, depth=3,
    stem_stride=1`, and for 64 by 64 a depth of 4 bring the last convolution to 4 by 4.

    Args:
        in_channels: channels C of the images or latents.
        width: channels of the first block; each block doubles them.
        depth: residual blocks; each halves height and width, rounded up.
        max_width: where the doubling ends.
        stem_stride: side of the squares of pixels that the first convolution steps by; 1 sees
            every pixel at full resolution, 2 makes all that follows four times cheaper.
        num_classes: number of class ids; 0 for a discriminator that does not look at classes.
            The id `num_classes` means "no class".
        group_size: samples that share a minibatch standard deviation; 1 for none.

    Raises:
        ValueError: a value that no discriminator can have, by name.

    Example:
        >>> config = LatentDiscriminatorConfig(in_channels=4, width=64, depth=4, max_width=256)
        >>> config.widths
        (64, 128, 256, 256, 256)
        >>> LatentDiscriminatorConfig.from_dict(config.to_dict()) == config
        True
    """

    in_channels: int = 4
    width: int = 24
    depth: int = 1
    max_width: int = 512
    stem_stride: int = 2
    num_classes: int = 0
    group_size: int = 4

    def __post_init__(self) -> None:
        for name in ("in_channels", "width", "depth", "stem_stride", "group_size"):
            _check_int(name, getattr(self, name), 1)
        _check_int("num_classes", self.num_classes, 0)
        _require(
            type(self.max_width) is int and self.max_width >= self.width,
            f"max_width is {self.max_width!r}; it must be an int of at least width={self.width}",
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before each block, and after the last."""
        return tuple(min(self.width * 2**i, self.max_width) for i in range(self.depth + 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatentDiscriminatorConfig:
        """The inverse of `to_dict`; an unknown key is an error, a missing one its default."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _require(
            not unknown,
            f"unknown LatentDiscriminatorConfig key {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}",
        )
        return cls(**values)
