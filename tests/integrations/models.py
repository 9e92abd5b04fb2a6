"""Small diffusers transformers with random weights, inputs for them, and how to compare runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

Tensor = torch.Tensor

SD3_SIZES = {
    "sample_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 24,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
    "in_channels": 4,
    "out_channels": 4,
}
FLUX_SIZES = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that leave nothing at its initial 0 or 1: gates, norms and biases all count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.5 + 0.3 * noise)
    return model


def sd3(**changes: Any) -> nn.Module:
    return randomise(diffusers.SD3Transformer2DModel(**{**SD3_SIZES, **changes}))


def sd35(**changes: Any) -> nn.Module:
    """QK norm, and dual attention in the first block: SD3.5-medium in small."""
    return sd3(**{"qk_norm": "rms_norm", "dual_attention_layers": (0,), **changes})


def flux(**changes: Any) -> nn.Module:
    sizes = {**FLUX_SIZES, "guidance_embeds": True, **changes}
    return randomise(diffusers.FluxTransformer2DModel(**sizes))


BUILDERS: dict[str, Callable[..., nn.Module]] = {"sd3": sd3, "sd35": sd35, "flux": flux}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks alone: what is patched there leaves the rest of the model to the bit."""
    return nn.ModuleList(
        [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    )


def sd3_inputs(
    model: nn.Module, batch: int = 2, height: int = 6, width: int = 10, text: int = 7
) -> dict[str, Any]:
    """height and width are of the latent, in pixels of which a token has 2·2."""
    draw = torch.Generator().manual_seed(1)
    config = model.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(model.dtype)

    return {
        "hidden_states": noise(batch, config.in_channels, height, width),
        "encoder_hidden_states": noise(batch, text, config.joint_attention_dim),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "timestep": torch.linspace(1, 999, batch),
    }


def flux_inputs(
    model: nn.Module, batch: int = 2, tokens: int = 15, text: int = 7
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    config = model.config

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(model.dtype)

    places = torch.zeros(tokens, 3)
    places[:, 1], places[:, 2] = torch.arange(tokens) // 5, torch.arange(tokens) % 5
    return {
        "hidden_states": noise(batch, tokens, config.in_channels),
        "encoder_hidden_states": noise(batch, text, config.joint_attention_dim),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "timestep": torch.linspace(0.001, 0.999, batch).to(model.dtype),
        "img_ids": places,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5).to(model.dtype) if config.guidance_embeds else None,
    }


def inputs_of(model: nn.Module, **sizes: int) -> dict[str, Any]:
    kind = type(model).__name__
    return (flux_inputs if kind.startswith("Flux") else sd3_inputs)(model, **sizes)


def run(model: nn.Module, inputs: dict[str, Any] | None = None, **extra: Any) -> Tensor:
    inputs = inputs_of(model) if inputs is None else inputs
    return model(**inputs, **extra, return_dict=False)[0]


def run_without_grad(
    model: nn.Module, inputs: dict[str, Any] | None = None, **extra: Any
) -> Tensor:
    with torch.no_grad():
        return run(model, inputs, **extra)


def gradients(
    model: nn.Module, inputs: dict[str, Any] | None = None, **extra: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and the gradient of each parameter and input of a fixed weighted sum of it."""
    inputs = dict(inputs_of(model) if inputs is None else inputs)
    for name in ("hidden_states", "encoder_hidden_states"):
        inputs[name] = inputs[name].detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = run(model, inputs, **extra)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights.to(out.dtype)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {name: inputs[name].grad for name in ("hidden_states", "encoder_hidden_states")}
    return out.detach(), found


def distance(found: Tensor, truth: Tensor) -> float:
    """‖found - truth‖ / ‖truth‖ in float64."""
    found, truth = found.double(), truth.double()
    return ((found - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def as_double(model: nn.Module) -> nn.Module:
    """The same (rounded) weights in float64: the truth that roundings are measured against."""
    return copy.deepcopy(model).double()


def as_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs in another dtype, but for the places of tokens."""
    keep = ("img_ids", "txt_ids")
    return {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in keep
        else value
        for name, value in inputs.items()
    }
