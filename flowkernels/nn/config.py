"""The configuration of `MMDiT`: one flat dataclass that a recipe file can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and options of a dual-stream MM-DiT.

    Args:
        image_size: height and width in pixels (or latent pixels); one int for a square.
        in_channels: channels C of the image and of the velocity.
        patch_size: side of a square patch; divides both image sides.
        dim: hidden width D of both streams; divisible by `heads` and by 4 (2-D positions).
        depth: number of joint blocks.
        heads: attention heads H.
        mlp_ratio: hidden width of the feed-forward over `dim`.
        num_classes: number of class ids; 0 for a model without classes. The id `num_classes`
            means "no class".
        class_tokens: context tokens learned per class, where there is no text.
        text_dim: width of the text tokens, or None for a model whose context is its class.
        pooled_dim: width of the pooled text vector, or None.
        qk_norm: RMS-normalise queries and keys per head (SD3.5) before attention.
        frequency_dim: width of the sinusoidal embedding of time, even.
        eps: epsilon of every norm.
        gradient_checkpointing: recompute each block in backward instead of storing it.

    Raises:
        ValueError: a value that no model can have, by name.

    Example:
        >>> config = MMDiTConfig(image_size=8, in_channels=1, dim=64, depth=2, heads=2)
        >>> config.grid, config.head_dim
        ((4, 4), 32)
        >>> MMDiTConfig.from_dict(config.to_dict()) == config
        True
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 4
    patch_size: int = 2
    dim: int = 384
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 0
    class_tokens: int = 1
    text_dim: int | None = None
    pooled_dim: int | None = None
    qk_norm: bool = False
    frequency_dim: int = 256
    eps: float = 1e-6
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # what YAML and JSON make of a pair
            object.__setattr__(self, "image_size", tuple(self.image_size))
        self._check_numbers()
        for side in self.image_shape:
            _require(
                side > 0 and side % self.patch_size == 0,
                f"image_size is {self.image_size}; each side must be a positive multiple of "
                f"patch_size={self.patch_size}",
            )
        _require(
            self.dim % self.heads == 0,
            f"dim is {self.dim}; it must be a multiple of heads={self.heads}",
        )
        _require(
            self.dim % 4 == 0,
            f"dim is {self.dim}; it must be a multiple of 4 for 2-D sine-cosine positions",
        )
        _require(
            self.frequency_dim % 2 == 0,
            f"frequency_dim is {self.frequency_dim}; it must be even",
        )

    def _check_numbers(self) -> None:
        for name in (
            "in_channels",
            "patch_size",
            "dim",
            "depth",
            "heads",
            "class_tokens",
            "frequency_dim",
        ):
            _check_int(name, getattr(self, name), 1)
        _check_int("num_classes", self.num_classes, 0)
        for name in ("text_dim", "pooled_dim"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        _require(
            len(sides) == 2 and all(type(side) is int for side in sides),
            f"image_size is {self.image_size!r}; it must be an int or a pair (height, width)",
        )
        for name in ("mlp_ratio", "eps"):
            value = getattr(self, name)
            _require(
                isinstance(value, (int, float)) and value > 0,
                f"{name} is {value!r}; it must be a positive number",
            )
        _require(
            int(self.dim * self.mlp_ratio) >= 1,
            f"mlp_ratio is {self.mlp_ratio}; dim * mlp_ratio must be at least 1",
        )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def head_dim(self) -> int:
        """Channels E of one attention head."""
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward."""
        return int(self.dim * self.mlp_ratio)

    @property
    def patch_dim(self) -> int:
        """Values in one patch."""
        return self.patch_size**2 * self.in_channels

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON and YAML can hold."""
        values = dataclasses.asdict(self)
        if isinstance(self.image_size, tuple):
            values["image_size"] = list(self.image_size)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """The inverse of `to_dict`; an unknown key is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _require(
            not unknown,
            f"unknown MMDiTConfig key {', '.join(unknown)}; known are {', '.join(sorted(known))}",
        )
        return cls(**values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_int(name: str, value: object, least: int) -> None:
    _require(
        type(value) is int and value >= least,
        f"{name} is {value!r}; it must be an int of at least {least}",
    )
