"""StableDiffusion3Pipeline and FluxPipeline, saved, loaded and run end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flowkernels
from tests.integrations.models import diffusers
from tests.integrations.pipelines import PIPELINES, picture

CLASSES = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
CALLS = {"sd3": {"guidance_scale": 5.0, "negative_prompt": "dull"}, "flux": {"guidance_scale": 3.5}}


@pytest.fixture(scope="module", params=PIPELINES)
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    """A pipeline on disk: its transformer was patched when it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = PIPELINES[request.param]()
    flowkernels.patch(pipeline.transformer)
    pipeline.save_pretrained(folder)
    return request.param, folder


def load(saved: tuple[str, Path], dtype: torch.dtype = torch.float32) -> Any:
    kind, folder = saved
    return getattr(diffusers, CLASSES[kind]).from_pretrained(folder, dtype=dtype)


def test_images_are_the_same(saved):
    """float32: what differs is the last bits, far below one level of 8-bit colour."""
    pipeline = load(saved)
    before = picture(pipeline, **CALLS[saved[0]])
    assert before.shape == (3, 16, 24)
    assert 0.01 < before.std() < 1
    with flowkernels.patch(pipeline.transformer) as handle:
        patched = picture(pipeline, **CALLS[saved[0]])
        assert not handle.report().fallbacks
    assert (patched - before).abs().max() < 1e-4
    assert torch.equal(picture(pipeline, **CALLS[saved[0]]), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_images_are_equal_to_the_bit(saved, dtype):
    pipeline = load(saved, dtype)
    before = picture(pipeline, **CALLS[saved[0]])
    with flowkernels.patch(pipeline.transformer, exact=True) as handle:
        assert torch.equal(picture(pipeline, **CALLS[saved[0]]), before)
        assert not handle.report().fallbacks


def test_the_fused_scheduler_and_the_patch_together(saved):
    from flowkernels.integrations import FusedFlowMatchEuler

    pipeline = load(saved)
    before = picture(pipeline, **CALLS[saved[0]])
    pipeline.scheduler = FusedFlowMatchEuler.from_config(pipeline.scheduler.config, exact=True)
    with flowkernels.patch(pipeline.transformer, exact=True):
        assert torch.equal(picture(pipeline, **CALLS[saved[0]]), before)


def test_a_pipeline_is_no_module(saved):
    with pytest.raises(TypeError, match=r"need a torch.nn.Module such as pipe.transformer"):
        flowkernels.patch(load(saved))
