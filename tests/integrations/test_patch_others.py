"""FLUX.2, Qwen-Image, Sana, DiT, PixArt and ControlNets: the chain around their own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import flowkernels
from tests.integrations.models import (
    SD3_SIZES,
    diffusers,
    distance,
    randomise,
    run_without_grad,
    sd3_inputs,
)

NEAR = 1e-5


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model, {
        "hidden_states": noise(2, 15, 8),
        "encoder_hidden_states": noise(2, 7, 24),
        "timestep": torch.tensor([0.1, 0.9]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.arange(60.0).view(15, 4) % 5,
        "txt_ids": torch.zeros(7, 4),
    }


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return model, {
        "hidden_states": noise(2, 15, 8),
        "encoder_hidden_states": noise(2, 7, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.1, 0.9]),
        "img_shapes": [[(1, 3, 5)]] * 2,
    }


def sana() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    )
    return model, {
        "hidden_states": noise(2, 4, 5, 7),
        "encoder_hidden_states": noise(2, 7, 24),
        "timestep": torch.tensor([10.0, 900.0]),
    }


def dit() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([10, 900]),
        "class_labels": torch.tensor([3, 9]),
    }


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 7, 24),
        "timestep": torch.tensor([10, 900]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }


MODELS = {"flux2": flux2, "qwen": qwen, "sana": sana, "dit": dit, "pixart": pixart}


def outcome(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    model.zero_grad(set_to_none=True)
    out = model(**inputs, return_dict=False)[0]
    (out.float() * noise(*out.shape, seed=2)).sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", MODELS)
def test_output_and_gradients(kind):
    model, inputs = MODELS[kind]()
    randomise(model).eval()
    out, grads = outcome(model, inputs)
    with flowkernels.patch(model) as handle:
        ours, our_grads = outcome(model, inputs)
        report = handle.report()
    assert not report.fallbacks
    assert not torch.equal(ours, out)
    assert distance(ours, out) < NEAR
    for found, grad in zip(our_grads, grads, strict=True):
        assert (found is None) == (grad is None)
        # Gradients that nearly cancel have few digits of their own: measured beside the largest.
        assert grad is None or (found - grad).norm() < 10 * NEAR * grad.norm() + 1e-4
    blocks = {row.module.split(".")[0] for row in report.patched}
    assert blocks & {"transformer_blocks"}
    assert torch.equal(outcome(model, inputs)[0], out)


@pytest.mark.parametrize("kind", MODELS)
def test_exact_is_equal_to_the_bit(kind):
    model, inputs = MODELS[kind]()
    model = randomise(model).eval().to(torch.bfloat16)
    inputs = {
        name: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        with flowkernels.patch(model, exact=True) as handle:
            assert torch.equal(model(**inputs, return_dict=False)[0], before)
            assert all(row.why.startswith("not exact") for row in handle.report().skipped)
        with flowkernels.patch(model, ops=["gated_residual"]):
            assert distance(model(**inputs, return_dict=False)[0], before) < 0.05


def test_pixart_chunking_falls_back():
    model, inputs = pixart()
    randomise(model).eval()
    handle = flowkernels.patch(model)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    with torch.no_grad():
        chunked = model(**inputs, return_dict=False)[0]
        assert {item.why for item in handle.report().fallbacks} == {"feed-forward chunking"}
        handle.revert()
        assert torch.equal(model(**inputs, return_dict=False)[0], chunked)


def test_blocks_without_gates_are_reported():
    block = diffusers.models.attention.BasicTransformerBlock(32, 2, 16)
    report = flowkernels.patch(block).report()
    assert not report.patched
    assert report.skipped[0].why == "not served: norm_type 'layer_norm' has no gates"


def test_sd3_controlnet():
    sizes = {key: value for key, value in SD3_SIZES.items() if key != "out_channels"}
    model = randomise(diffusers.SD3ControlNetModel(**sizes, extra_conditioning_channels=0))
    inputs = sd3_inputs(model)
    extra = {"controlnet_cond": noise(2, 4, 6, 10, seed=3)}
    before = run_without_grad(model, inputs, **extra)
    with flowkernels.patch(model) as handle:
        after = run_without_grad(model, inputs, **extra)
        assert handle.report().patched
    for ours, theirs in zip(after, before, strict=True):
        assert distance(ours, theirs) < NEAR
