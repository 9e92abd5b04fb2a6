"""What `MMDiT.forward` is given, checked against what the model was built for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels.nn.config import MMDiTConfig

_INTEGERS = (torch.int64, torch.int32)


def check_conditions(
    config: MMDiTConfig,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None,
    text: Tensor | None,
    pooled: Tensor | None,
    guidance: Tensor | None,
    text_lengths: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, for a shape or a condition that does not fit."""
    B = x.shape[0] if x.dim() else 0
    _check_image(config, x, B)
    _expect("t", t, (B,))
    if labels is not None:
        if not config.num_classes:
            raise ValueError("labels given to a model with num_classes=0")
        _expect("labels", labels, (B,))
        _integer("labels", labels, "class ids")
    for name, value, width, rank in (
        ("text", text, config.text_dim, 3),
        ("pooled", pooled, config.pooled_dim, 2),
    ):
        if (value is None) != (width is None):
            state = "missing: this model needs" if value is None else "given: this model has no"
            raise ValueError(f"{name} is {state} {name}_dim={width}")
        if value is not None:
            tokens = value.shape[1:2] if rank == 3 else ()
            _expect(name, value, (B, *tokens, width))
    if (guidance is None) == config.guidance_embed:
        state = "missing: this model has" if guidance is None else "given: this model has"
        raise ValueError(f"guidance is {state} guidance_embed={config.guidance_embed}")
    if guidance is not None:
        _expect("guidance", guidance, (B,))
    if text_lengths is not None:
        if text is None:
            raise ValueError("text_lengths is given: this model has no text")
        _expect("text_lengths", text_lengths, (B,))
        _integer("text_lengths", text_lengths, "token counts")


def check_layers(layers: Sequence[int], count: int) -> None:
    """Raise ValueError unless `layers` are indices of some of `count` blocks."""
    if not layers or any(type(index) is not int or not 0 <= index < count for index in layers):
        raise ValueError(f"layers is {tuple(layers)}; it needs block indices from 0 to {count - 1}")


def key_lengths(x: Tensor, text: Tensor, text_lengths: Tensor | None) -> Tensor | None:
    """[B, 2] int32: valid tokens of the image (all) and of the text; None where all are."""
    if text_lengths is None:
        return None
    image = torch.full_like(text_lengths, x.shape[1])
    # Before they are added up or cast: a length out of range would reach into the image.
    valid = text_lengths.clamp(0, text.shape[1])
    return torch.stack([image, valid], dim=1).to(torch.int32)


def _check_image(config: MMDiTConfig, x: Tensor, B: int) -> None:
    if config.positions == "sincos":
        _expect("x", x, (B, config.in_channels, *config.image_shape))
        return
    p = config.patch_size
    height, width = x.shape[2:] if x.dim() == 4 else (0, 0)
    fits = height > 0 and width > 0 and height % p == 0 and width % p == 0
    if x.dim() != 4 or x.shape[1] != config.in_channels or not fits:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it needs ({B}, {config.in_channels}, H, W) with H "
            f"and W multiples of patch_size={p}"
        )
    if config.positions != "rope" and max(height, width) > config.table_side * p:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its sides may be at most {config.table_side * p}, "
            f"the table of positions has {config.table_side} by {config.table_side} patches"
        )


def _integer(name: str, value: Tensor, meaning: str) -> None:
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name} has dtype {value.dtype}; it needs int64 {meaning}")


def _expect(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it needs {shape}")
