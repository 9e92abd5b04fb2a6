"""The configuration of `MMDiT`: one flat dataclass that a recipe file can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

POSITIONS = ("sincos", "cropped", "learned", "rope")


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Sizes and options of an MM-DiT: SD3's, SD3.5's, FLUX's, or one between them.

    The defaults are SD3's blocks at a size for digits. SD3.5 adds `qk_norm` and
    `dual_attention`; FLUX adds `qk_norm`, `single_depth`, `positions="rope"` and, where it was
    distilled from guided velocities, `guidance_embed`.

    Args:
        image_size: height and width in pixels (or latent pixels); one int for a square. Other
            sizes are taken too, but where `positions` is "sincos".
        in_channels: channels C of the image and of the velocity.
        patch_size: side of a square patch; divides both image sides.
        dim: hidden width D of both streams; divisible by `heads`, and by 4 for 2-D sine-cosine
            positions.
        depth: number of joint (double-stream) blocks.
        heads: attention heads H.
        mlp_ratio: hidden width of the feed-forward over `dim`.
        num_classes: number of class ids; 0 for a model without classes. The id `num_classes`
            means "no class".
        class_tokens: context tokens learned per class, where there is no text.
        text_dim: width of the text tokens, or None for a model whose context is its class.
        pooled_dim: width of the pooled text vector, or None.
        qk_norm: RMS-normalise queries and keys per head (SD3.5, FLUX) before attention.
        frequency_dim: width of the sinusoidal embedding of time, even.
        eps: epsilon of every norm.
        gradient_checkpointing: recompute each block in backward instead of storing it.
        positions: how a patch knows its place. "sincos": a fixed table over this image's grid.
            "cropped" (SD3): the middle of a fixed table over `position_side`² patches, stored
            with the weights. "learned": the same, trained. "rope" (FLUX): rotation of queries
            and keys.
        position_side: side M of the table that is cropped; None for the longer side of `grid`.
        dual_attention: indices of the joint blocks (SD3.5: 0 to 12) whose image tokens attend
            to themselves alone as well.
        single_depth: number of single-stream blocks after the joint ones, on image and context
            joined (FLUX: 38). Without any, the last joint block makes no context.
        guidance_embed: the network takes the guidance scale as a condition (FLUX.1-dev).
        rope_axes: channels of a head that turn with each axis, three even numbers: an axis on
            which every token stands at 0, the row, the column. They add up to `head_dim`.
        rope_theta: base of the rotation's frequencies.
        context_queries: keep the query weights that diffusers' SD3 models have in the context
            of the last block. Nothing reads them; kept, they come back from `to_diffusers`.

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
    positions: str = "sincos"
    position_side: int | None = None
    dual_attention: tuple[int, ...] = ()
    single_depth: int = 0
    guidance_embed: bool = False
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 10000.0
    context_queries: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "dual_attention", "rope_axes"):
            if isinstance(getattr(self, name), list):  # what YAML and JSON make of a tuple
                object.__setattr__(self, name, tuple(getattr(self, name)))
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
            self.frequency_dim % 2 == 0,
            f"frequency_dim is {self.frequency_dim}; it must be even",
        )
        self._check_positions()
        self._check_dual_attention()
        _require(
            not (self.context_queries and self.single_depth),
            f"context_queries is True; it needs single_depth=0 (got {self.single_depth}), where "
            "the last joint block makes no context",
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
        for name in ("num_classes", "single_depth"):
            _check_int(name, getattr(self, name), 0)
        for name in ("text_dim", "pooled_dim", "position_side"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        _require(
            len(sides) == 2 and all(type(side) is int for side in sides),
            f"image_size is {self.image_size!r}; it must be an int or a pair (height, width)",
        )
        for name in ("mlp_ratio", "eps", "rope_theta"):
            value = getattr(self, name)
            _require(
                isinstance(value, (int, float)) and value > 0,
                f"{name} is {value!r}; it must be a positive number",
            )
        _require(
            int(self.dim * self.mlp_ratio) >= 1,
            f"mlp_ratio is {self.mlp_ratio}; dim * mlp_ratio must be at least 1",
        )

    def _check_positions(self) -> None:
        _require(
            self.positions in POSITIONS,
            f"positions is {self.positions!r}; it must be one of {', '.join(POSITIONS)}",
        )
        if self.positions == "rope":
            axes = self.rope_axes
            _require(
                isinstance(axes, tuple)
                and len(axes) == 3
                and all(type(axis) is int and axis >= 0 and axis % 2 == 0 for axis in axes)
                and sum(axes) == self.head_dim,
                f"rope_axes is {axes!r}; it must be three even numbers that add up to "
                f"dim / heads = {self.head_dim}",
            )
            return
        _require(
            self.dim % 4 == 0,
            f"dim is {self.dim}; it must be a multiple of 4 for 2-D sine-cosine positions",
        )
        _require(
            self.table_side >= max(self.grid),
            f"position_side is {self.position_side}; it must be at least {max(self.grid)}, the "
            f"longer side of the grid of patches",
        )

    def _check_dual_attention(self) -> None:
        indices = self.dual_attention
        _require(
            isinstance(indices, tuple)
            and len(set(indices)) == len(indices)
            and all(type(index) is int and 0 <= index < self.depth for index in indices),
            f"dual_attention is {indices!r}; it must be different block indices from 0 to "
            f"{self.depth - 1}",
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
    def table_side(self) -> int:
        """Side of the table of positions that is cropped, in patches."""
        return max(self.grid) if self.position_side is None else self.position_side

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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """The inverse of `to_dict`; an unknown key is an error, a missing one its default."""
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
