"""Whole pipelines of tiny random parts, built here: nothing is downloaded."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch

from tests.integrations.models import diffusers, flux, randomise, sd3

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def clip_tokenizer() -> Any:
    """Every letter is a token, at a word's end another."""
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)


def t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    vocabulary = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    return transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=12)


def clip_encoder(kind: str, projection: int) -> Any:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def t5_encoder(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    torch.manual_seed(1)
    return transformers.T5EncoderModel(config).eval()


def vae(**changes: Any) -> Any:
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
            **changes,
        )
    )


def sd3_pipeline() -> Any:
    """CLIP twice and T5: their embeddings are 32 wide, the pooled ones 16."""
    return diffusers.StableDiffusion3Pipeline(
        transformer=sd3(
            qk_norm="rms_norm", dual_attention_layers=(0,), joint_attention_dim=32, sample_size=16
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_encoder("CLIPTextModelWithProjection", 8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder("CLIPTextModelWithProjection", 8),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(32),
        tokenizer_3=t5_tokenizer(),
    )


def flux_pipeline() -> Any:
    return diffusers.FluxPipeline(
        transformer=flux(in_channels=16, joint_attention_dim=32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_encoder("CLIPTextModel", 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
    )


PIPELINES = {"sd3": sd3_pipeline, "flux": flux_pipeline}


def picture(pipeline: Any, **extra: Any) -> torch.Tensor:
    """One image, [3, H, W] in 0..1, from a fixed seed."""
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a red cat",
        height=16,
        width=24,
        num_inference_steps=3,
        max_sequence_length=9,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **extra,
    )
    return result.images[0]
