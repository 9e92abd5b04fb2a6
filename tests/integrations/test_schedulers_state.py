"""The fused schedulers' place in a run, noising, schedules, files, and what they refuse."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowkernels.losses import interpolate
from flowkernels.ode import Schedule, shifted, uniform
from tests.integrations.models import flux
from tests.integrations.scheduling import (
    DTYPES,
    STEPS,
    FusedFlowMatchEuler,
    FusedFlowMatchHeun,
    diffusers,
    noise,
    pair,
    run,
    velocity,
)

# ---- the place in the schedule ------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_reads_nothing_from_the_device(exact: bool):
    """On the meta device there is nothing to read: diffusers' first step would fail there."""
    scheduler = FusedFlowMatchEuler(shift=3.0, exact=exact)
    scheduler.set_timesteps(5, device="meta")
    x = torch.empty(2, 8, device="meta")
    for t in scheduler.timesteps:
        assert scheduler.index_for_timestep(t.expand(2)) == (scheduler.step_index or 0)
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert scheduler.step_index == 5
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(5, device="meta")
    with pytest.raises(NotImplementedError):
        theirs.step(x, theirs.timesteps[0], x)


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_from_the_middle(exact: bool):
    """Image to image: a slice of the timesteps, with and without a begin index."""
    for begin in (None, 3):
        theirs, ours = pair("dynamic", exact=exact)
        x = noise(2, 30)
        states = []
        for scheduler in (theirs, ours):
            if begin is not None:
                scheduler.set_begin_index(begin)
            y = x
            for t in scheduler.timesteps[3:]:
                y = scheduler.step(velocity(y, t), t, y, return_dict=False)[0]
            assert scheduler.step_index == STEPS
            states.append(y)
        torch.testing.assert_close(*states, rtol=0, atol=0 if exact else 3e-6)


def test_index_for_timestep():
    scheduler = FusedFlowMatchEuler()
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 500.0, 100.0])
    assert scheduler.index_for_timestep(500.0) == 2  # the second of equal ones, as in diffusers
    assert scheduler.index_for_timestep(torch.tensor([900.0])) == 0
    assert scheduler.index_for_timestep(torch.tensor(100.0, dtype=torch.float64)) == 3
    assert scheduler.index_for_timestep(scheduler.timesteps[1]) == 2
    assert scheduler.index_for_timestep(900.0001) == 0  # another order of rounding
    assert scheduler.index_for_timestep(7.0, torch.tensor([8.0, 7.0])) == 1
    with pytest.raises(ValueError, match="timestep: got 400, need one of the scheduler's"):
        scheduler.index_for_timestep(400.0)
    with pytest.raises(ValueError, match="2 different values"):
        scheduler.index_for_timestep(torch.tensor([900.0, 100.0]))


def test_replaced_and_written_levels_count():
    scheduler = FusedFlowMatchEuler()
    scheduler.set_timesteps(2)
    x, v = torch.zeros(1, 3), torch.ones(1, 3)
    scheduler.sigmas = torch.tensor([1.0, 0.25, 0.0])
    assert scheduler.step(v, scheduler.timesteps[0], x).prev_sample[0, 0] == -0.75
    scheduler.sigmas[1] = 0.5
    assert scheduler.step(v, scheduler.timesteps[1], x).prev_sample[0, 0] == -0.5


def test_a_copy_keeps_the_digits():
    scheduler = FusedFlowMatchEuler(shift=3.0)
    scheduler.set_timesteps(6)
    twin = copy.deepcopy(scheduler)
    assert twin.to_schedule() == scheduler.to_schedule()
    twin.set_timesteps(3)
    assert len(scheduler.to_schedule()) == 6


# ---- noising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_scale_noise(dtype: torch.dtype, exact: bool):
    x, e = noise(4, 3, 5, dtype=dtype), noise(4, 3, 5, dtype=dtype, seed=1)
    theirs, ours = diffusers.FlowMatchEulerDiscreteScheduler(), FusedFlowMatchEuler(exact=exact)
    t = theirs.timesteps[[10, 500, 0, 999]]  # before set_timesteps: training
    for stage in ("training", "begin", "inside"):
        if stage != "training":
            for scheduler in (theirs, ours):
                scheduler.set_timesteps(STEPS)
                scheduler.set_begin_index(2)
                if stage == "inside":
                    scheduler.step(x, scheduler.timesteps[2], x)
            t = theirs.timesteps[2:3].repeat(4)
        expected, found = (s.scale_noise(x, t, e) for s in (theirs, ours))
        if exact:
            assert torch.equal(found, expected)
            continue
        index = {"training": [10, 500, 0, 999], "begin": [2] * 4, "inside": [3] * 4}[stage]
        sigma = torch.tensor([ours._levels[i] for i in index], dtype=torch.float64).view(4, 1, 1)
        truth = (1 - sigma) * x.double() + sigma * e.double()
        off, theirs_off = ((y.double() - truth).abs().mean() for y in (found, expected))
        assert off <= 2 * theirs_off


def test_scale_noise_is_the_noising_process():
    scheduler = FusedFlowMatchEuler()
    scheduler.set_timesteps(4)
    x, e = noise(3, 5), noise(3, 5, seed=1)
    level = scheduler.to_schedule().times[1]
    expected = interpolate(x, level.repeat(3), e)[0]
    assert torch.equal(scheduler.scale_noise(x, scheduler.timesteps[1], e), expected)
    assert torch.equal(scheduler.scale_noise(x, scheduler.timesteps[1].expand(3), e), expected)
    # One noise for all samples, as diffusers' arithmetic takes it.
    same = scheduler.scale_noise(x, scheduler.timesteps[1], e[:1])
    assert torch.equal(same, scheduler.scale_noise(x, scheduler.timesteps[1], e[:1].expand_as(e)))
    with pytest.raises(ValueError, match="noise: got shape"):
        scheduler.scale_noise(x, scheduler.timesteps[1], e[:2])


# ---- schedules ----------------------------------------------------------------------------------


def test_a_held_schedule_is_walked_whatever_is_asked(tmp_path):
    schedule = Schedule([1.0, 0.9, 0.3, 0.1, 0.0])
    scheduler = FusedFlowMatchEuler.from_schedule(schedule, shift=3.0)
    for arguments in ({"num_inference_steps": 4}, {"sigmas": np.linspace(1, 0.25, 4), "mu": 1.0}):
        scheduler.set_timesteps(**arguments)
        assert scheduler.to_schedule() == schedule
        assert torch.equal(scheduler.sigmas, schedule.times.float())
        assert torch.equal(scheduler.timesteps, (schedule.times[:-1] * 1000).float())
    with pytest.raises(ValueError, match="holds a schedule of 4 steps"):
        scheduler.set_timesteps(28)
    for kept in (
        FusedFlowMatchEuler.from_config(scheduler.config),
        FusedFlowMatchEuler.from_config(scheduler.config, exact=True),
        _saved(scheduler, tmp_path),
    ):
        kept.set_timesteps(4)
        assert kept.to_schedule() == schedule
    scheduler.set_schedule(None)
    scheduler.set_timesteps(28)
    assert scheduler.sigmas[1] == pytest.approx(3 * 0.963 / (1 + 2 * 0.963), rel=1e-6)


def _saved(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("kind", [diffusers.FlowMatchEulerDiscreteScheduler, FusedFlowMatchEuler])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_schedule_to_diffusers(kind: type, inverted: bool):
    """Exactly its times, where set_timesteps(sigmas=...) would shift them again."""
    schedule = shifted(5, 3.0)
    scheduler = kind(shift=3.0, invert_sigmas=inverted)
    scheduler.set_timesteps(3)
    assert schedule.to_diffusers(scheduler) is scheduler
    expected = 1 - schedule.times if inverted else schedule.times
    assert torch.equal(scheduler.sigmas, expected.float())
    torch.testing.assert_close(scheduler.timesteps, (expected[:-1] * 1000).float())
    assert scheduler.num_inference_steps == 5
    x = noise(2, 6)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones_like(x), t, x).prev_sample
    total = 1.0 if inverted else -1.0
    torch.testing.assert_close(x, noise(2, 6) + total, rtol=0, atol=1e-6)
    if kind is FusedFlowMatchEuler:
        torch.testing.assert_close(
            scheduler.to_schedule().times, schedule.times, rtol=0, atol=1e-15
        )


def test_a_schedule_to_another_scheduler():
    with pytest.raises(TypeError, match="scheduler is a str"):
        uniform(2).to_diffusers("euler")


# ---- files --------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    scheduler = FusedFlowMatchEuler(shift=3.0, exact=True, shift_terminal=0.1)
    loaded = _saved(scheduler, tmp_path)
    assert type(loaded) is FusedFlowMatchEuler
    for key in ("shift", "exact", "shift_terminal"):
        assert loaded.config[key] == scheduler.config[key]
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert back.config.shift == 3.0


class _Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_a_pipeline_with_it_is_saved_and_loaded(tmp_path):
    _Pipeline(FusedFlowMatchEuler(shift=2.0)).save_pretrained(tmp_path)
    loaded = _Pipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is FusedFlowMatchEuler
    assert loaded.scheduler.config.shift == 2.0


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_inference_steps: got None"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps: got 2.5"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "differ in length"),
        ({"timesteps": [1000.0], "sigmas": [1.0, 0.5]}, "differ in length"),
    ],
)
def test_bad_timesteps_are_named(arguments: dict, message: str):
    for exact in (False, True):
        with pytest.raises(ValueError, match=message):
            FusedFlowMatchEuler(exact=exact).set_timesteps(**arguments)


def test_dynamic_shifting_needs_mu():
    for exact in (False, True):
        with pytest.raises(ValueError, match="mu"):
            FusedFlowMatchEuler(use_dynamic_shifting=True, exact=exact).set_timesteps(4)


def test_bad_steps_are_named():
    scheduler = FusedFlowMatchEuler()
    with pytest.raises(ValueError, match="there are no timesteps yet"):
        scheduler.to_schedule()
    scheduler.set_timesteps(2)
    x = noise(2, 3)
    for index in (0, torch.tensor(0), np.int64(0)):
        with pytest.raises(ValueError, match="not its index"):
            scheduler.step(x, index, x)
    with pytest.raises(ValueError, match=r"model_output: got shape \(2, 4\)"):
        scheduler.step(noise(2, 4), scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"per_token_timesteps: got shape \(5,\)"):
        scheduler.step(
            noise(2, 3, 4), scheduler.timesteps[0], noise(2, 3, 4),
            per_token_timesteps=torch.zeros(5),
        )  # fmt: skip
    run(scheduler, x)
    with pytest.raises(IndexError, match="has taken its 2 steps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="noise: got None"):
        scheduler.scale_noise(x, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="timestep: got 3 of them"):
        FusedFlowMatchEuler().scale_noise(x, torch.tensor([1.0, 2.0, 3.0]), x)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="Only one of"):
        FusedFlowMatchEuler(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="times"):
        FusedFlowMatchEuler(times=[0.5, 0.0])
    with pytest.raises(TypeError, match="schedule: got list"):
        FusedFlowMatchEuler().set_schedule([1.0, 0.0])
    with pytest.raises(ValueError, match="need a positive one"):
        FusedFlowMatchEuler(use_exponential_sigmas=True).set_timesteps(sigmas=[1.0, 0.0])


def test_without_diffusers_the_package_imports_and_says_what_is_missing():
    code = """
import sys
sys.modules["diffusers"] = None
import flowkernels
try:
    import flowkernels.integrations.schedulers
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "pip install flowkernels[diffusers]" in result.stdout


# ---- in a pipeline ------------------------------------------------------------------------------


def test_in_a_flux_pipeline():
    """FluxPipeline sends sigmas and a dynamic shift. (docs/drop-in.md runs SD3's.)"""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(
        theirs, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=flux(in_channels=16),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        return pipe(
            prompt_embeds=noise(1, 5, 24), pooled_prompt_embeds=noise(1, 16),
            height=48, width=32, num_inference_steps=3, output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip

    expected = latents()
    pipe.scheduler = FusedFlowMatchEuler.from_config(theirs.config, exact=True)
    assert torch.equal(latents(), expected)
    pipe.scheduler = FusedFlowMatchEuler.from_config(theirs.config)
    torch.testing.assert_close(latents(), expected, rtol=1e-4, atol=1e-4)
    levels = pipe.scheduler.to_schedule()
    pipe.scheduler = FusedFlowMatchHeun.from_config(theirs.config)
    assert torch.isfinite(latents()).all()
    assert pipe.scheduler.to_schedule() == levels
    schedule = Schedule([1.0, 0.9, 0.4, 0.0])
    pipe.scheduler = FusedFlowMatchEuler.from_schedule(schedule)
    latents()
    assert pipe.scheduler.to_schedule() == schedule
