"""Configurations of diffusers' SD3 and FLUX transformers as `MMDiTConfig`, and back.

Both diffusers classes have fixed what `MMDiTConfig` leaves open: the feed-forward is four times as
wide as the stream, time has 256 sinusoids, every epsilon is 1e-6; FLUX always norms queries and
keys and turns them by powers of 1e4. What the one side cannot say is an error on the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowkernels.nn.config import MMDiTConfig

PACKING = 2
"""FLUX's pipeline packs 2 by 2 latent pixels into one token, outside the model."""

_FLUX_LATENTS = 128
"""FLUX's configuration names no image size: latents of its 1024 pixels."""

_FIXED = {"mlp_ratio": 4.0, "frequency_dim": 256, "eps": 1e-6, "num_classes": 0}
"""Fields that have one value in both of diffusers' classes."""

_COMMON_ENTRIES = frozenset(
    {
        "patch_size",
        "in_channels",
        "out_channels",
        "num_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
    }
)
_SD3_ENTRIES = _COMMON_ENTRIES | {
    "sample_size",
    "caption_projection_dim",
    "pos_embed_max_size",
    "dual_attention_layers",
    "qk_norm",
}
_FLUX_ENTRIES = _COMMON_ENTRIES | {"num_single_layers", "guidance_embeds", "axes_dims_rope"}


def read(model: nn.Module) -> MMDiTConfig:
    """The configuration of a diffusers model.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: another class; a subclass too, whose forward may be another.
        ValueError: an entry that `MMDiT` cannot follow, by name.
    """
    sd3, flux = _classes()
    if type(model) not in (sd3, flux):
        raise TypeError(
            f"model is a {type(model).__name__}; it needs an SD3Transformer2DModel or a "
            "FluxTransformer2DModel of diffusers"
        )
    declared: Any = model.config
    entries = {name: value for name, value in declared.items() if not name.startswith("_")}
    known = _SD3_ENTRIES if type(model) is sd3 else _FLUX_ENTRIES
    unknown = sorted(set(entries) - known)
    if unknown:
        raise ValueError(
            f"{type(model).__name__}'s configuration has {', '.join(unknown)}, which MMDiT does "
            "not know"
        )
    out, channels = entries["out_channels"], entries["in_channels"]
    _need("out_channels", out, out in (None, channels), f"in_channels={channels}, as a velocity's")
    _need("num_layers", entries["num_layers"], entries["num_layers"] > 0, "at least 1")
    fields = _from_sd3(entries) if type(model) is sd3 else _from_flux(entries)
    return MMDiTConfig(
        **fields,
        dim=entries["num_attention_heads"] * entries["attention_head_dim"],
        depth=entries["num_layers"],
        heads=entries["num_attention_heads"],
        text_dim=entries["joint_attention_dim"],
        pooled_dim=entries["pooled_projection_dim"],
        gradient_checkpointing=bool(getattr(model, "gradient_checkpointing", False)),
    )


def _from_sd3(entries: dict[str, Any]) -> dict[str, Any]:
    size, patch, side = (entries[n] for n in ("sample_size", "patch_size", "pos_embed_max_size"))
    norm, projected = entries["qk_norm"], entries["caption_projection_dim"]
    dim = entries["num_attention_heads"] * entries["attention_head_dim"]
    _need("qk_norm", norm, norm in (None, "rms_norm"), "None or 'rms_norm'")
    _need("caption_projection_dim", projected, projected == dim, f"{dim}, the hidden width")
    _need("sample_size", size, size % patch == 0, f"a multiple of patch_size={patch}")
    _need(
        "pos_embed_max_size",
        side,
        bool(side) and side >= size // patch,
        f"at least sample_size / patch_size = {size // patch}",
    )
    return {
        "image_size": size,
        "in_channels": entries["in_channels"],
        "patch_size": patch,
        "qk_norm": norm is not None,
        "positions": "cropped",
        "position_side": side,
        "dual_attention": _dual_layers(entries),
        "context_queries": True,
    }


def _dual_layers(entries: dict[str, Any]) -> tuple[int, ...]:
    # diffusers asks of each block whether it is in here: others and repetitions mean nothing.
    return tuple(sorted({i for i in entries["dual_attention_layers"] if i < entries["num_layers"]}))


def _from_flux(entries: dict[str, Any]) -> dict[str, Any]:
    patch, channels = entries["patch_size"], entries["in_channels"]
    singles, axes = entries["num_single_layers"], tuple(entries["axes_dims_rope"])
    head = entries["attention_head_dim"]
    _need("patch_size", patch, patch == 1, "1: its pipeline packs the latents")
    _need("in_channels", channels, channels % PACKING**2 == 0, f"a multiple of {PACKING**2}")
    _need("num_single_layers", singles, singles > 0, "at least 1")
    fits = len(axes) == 3 and sum(axes) == head and all(axis % 2 == 0 for axis in axes)
    _need("axes_dims_rope", axes, fits, f"three even numbers that add up to {head}")
    return {
        "image_size": _FLUX_LATENTS,
        "in_channels": channels // PACKING**2,
        "patch_size": PACKING,
        "qk_norm": True,
        "positions": "rope",
        "rope_axes": axes,
        "single_depth": singles,
        "guidance_embed": bool(entries["guidance_embeds"]),
    }


def build(config: MMDiTConfig) -> Any:
    """The diffusers model of a configuration, without memory (on the meta device).

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a field that diffusers' class does not have, by name.
    """
    sd3, flux = _classes()
    for name, value in _FIXED.items():
        got = getattr(config, name)
        _need(name, got, got == value, f"{value}, as diffusers' models have it")
    for name in ("text_dim", "pooled_dim"):
        got = getattr(config, name)
        _need(name, got, got is not None, "a width: diffusers' models have text")
    if config.positions == "rope":
        model_class, entries = flux, _to_flux(config)
    else:
        model_class, entries = sd3, _to_sd3(config)
    with torch.device("meta"):
        model = model_class(
            **entries,
            num_layers=config.depth,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=config.text_dim,
            pooled_projection_dim=config.pooled_dim,
        )
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _to_sd3(config: MMDiTConfig) -> dict[str, Any]:
    height, width = config.image_shape
    tables = ("cropped", "learned")
    _need("positions", config.positions, config.positions in tables, "'cropped' or 'rope'")
    _need("image_size", config.image_size, height == width, "a square in SD3's configuration")
    _need("single_depth", config.single_depth, config.single_depth == 0, "0 in SD3")
    _need("guidance_embed", config.guidance_embed, not config.guidance_embed, "False in SD3")
    return {
        "sample_size": height,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "caption_projection_dim": config.dim,
        "pos_embed_max_size": config.table_side,
        "dual_attention_layers": config.dual_attention,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def _to_flux(config: MMDiTConfig) -> dict[str, Any]:
    for name, got, good, need in (
        ("single_depth", config.single_depth, config.single_depth > 0, "at least 1 in FLUX"),
        ("qk_norm", config.qk_norm, config.qk_norm, "True in FLUX"),
        ("dual_attention", config.dual_attention, not config.dual_attention, "() in FLUX"),
        ("patch_size", config.patch_size, config.patch_size == PACKING, f"{PACKING} in FLUX"),
        ("rope_theta", config.rope_theta, config.rope_theta == 10000, "10000 in FLUX"),
    ):
        _need(name, got, good, need)
    return {
        "patch_size": 1,
        "in_channels": config.patch_dim,
        "num_single_layers": config.single_depth,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.rope_axes,
    }


def _classes() -> tuple[type, type]:
    try:
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
    except ImportError as error:
        raise ImportError(
            "diffusers is needed to exchange models with it and cannot be imported "
            f"({error}); install it with: pip install 'flowkernels[diffusers]'"
        ) from error
    return SD3Transformer2DModel, FluxTransformer2DModel


def _need(name: str, got: object, good: bool, need: str) -> None:
    if not good:
        raise ValueError(f"{name} is {got!r}; it needs to be {need}")
