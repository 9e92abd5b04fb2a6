"""The fused Euler scheduler's levels and steps against diffusers' own."""

from __future__ import annotations

import pytest
import torch

from flowkernels.ode import shifted
from tests.integrations.scheduling import (
    CONFIGS,
    DTYPES,
    ONCE,
    STEPS,
    FusedFlowMatchEuler,
    diffusers,
    noise,
    pair,
    run,
)

# ---- equal to the bit ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_levels_are_diffusers(name: str):
    theirs, ours = pair(name, exact=True)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps == theirs.num_inference_steps
    assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    assert (ours.order, ours.init_noise_sigma) == (theirs.order, 1.0)
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_steps_are_diffusers(name: str, dtype: torch.dtype):
    theirs, ours = pair(name, exact=True)
    x = noise(3, 4, 17, dtype=dtype)
    for expected, found in zip(run(theirs, x), run(ours, x), strict=True):
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found, expected)
    assert ours.step_index == theirs.step_index == STEPS


@pytest.mark.parametrize(
    ("state", "output"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_exact_steps_of_mixed_dtypes(state: torch.dtype, output: torch.dtype):
    theirs, ours = pair("shift", exact=True)
    for index, t in enumerate(theirs.timesteps):
        x, v = noise(2, 33, dtype=state, seed=index), noise(2, 33, dtype=output, seed=99 + index)
        expected = theirs.step(v, t, x).prev_sample
        found = ours.step(v, t, x).prev_sample
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_stochastic_steps_are_diffusers(dtype: torch.dtype):
    theirs, ours = pair("shift", exact=True, stochastic_sampling=True)
    x = noise(3, 4, 17, dtype=dtype)
    for each in (3, [4, 5, 6]):  # one generator, or one a sample
        made = [
            [torch.Generator().manual_seed(s) for s in each]
            if isinstance(each, list)
            else torch.Generator().manual_seed(each)
            for _ in range(2)
        ]
        pairs = zip(run(theirs, x, generator=made[0]), run(ours, x, generator=made[1]), strict=True)
        assert all(torch.equal(found, expected) for expected, found in pairs)
        theirs.set_timesteps(STEPS)
        ours.set_timesteps(STEPS)


def token_timesteps(scheduler, batch: int, tokens: int) -> torch.Tensor:
    """Some tokens of a level of the schedule, some between, some clean."""
    picked = scheduler.timesteps[torch.arange(batch * tokens) % STEPS].view(batch, tokens).clone()
    picked[:, ::3] *= 0.93
    picked[:, ::5] = 0.0
    return picked


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_token_steps_are_diffusers(dtype: torch.dtype, stochastic: bool):
    theirs, ours = pair("dynamic", exact=True, stochastic_sampling=stochastic)
    x, v = noise(2, 11, 8, dtype=dtype), noise(2, 11, 8, dtype=dtype, seed=1)
    tokens = token_timesteps(theirs, 2, 11)
    found = []
    for scheduler in (theirs, ours):
        generator = torch.Generator().manual_seed(8)
        found.append(
            scheduler.step(
                v, scheduler.timesteps[0], x, generator=generator, per_token_timesteps=tokens
            ).prev_sample
        )
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)


# ---- the more accurate mode ---------------------------------------------------------------------


def test_diffusers_shifts_its_last_level_twice_and_we_do_not():
    theirs, ours = pair("shift", exact=False)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    twice = 3 * once / (1 + 2 * once)
    assert theirs.sigma_min == pytest.approx(once, rel=1e-6)  # already shifted
    assert float(theirs.sigmas[-2]) == pytest.approx(twice, rel=1e-6)
    assert float(ours.sigmas[-2]) == pytest.approx(once, rel=1e-6)
    # Every level between is moved as well; the first is not, as a shift leaves 1 at 1.
    assert theirs.sigmas[0] == ours.sigmas[0] == 1
    assert bool((theirs.sigmas[1:-1] > ours.sigmas[1:-1]).all())
    u = torch.linspace(1, 0.001, STEPS, dtype=torch.float64)
    expected = torch.cat([3 * u / (1 + 2 * u), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(ours.to_schedule().times, expected, rtol=0, atol=1e-15)


def test_a_changed_shift_is_applied_once():
    scheduler = FusedFlowMatchEuler(shift=3.0)
    scheduler.set_shift(5.0)
    scheduler.set_timesteps(4)
    assert float(scheduler.sigmas[-2]) == pytest.approx(0.005 / (1 + 4 * 0.001), rel=1e-6)


def test_timesteps_alone_say_the_levels_too():
    arguments = CONFIGS["timesteps"][1]
    ours, exact = FusedFlowMatchEuler(shift=3.0), FusedFlowMatchEuler(shift=3.0, exact=True)
    ours.set_timesteps(**arguments)
    exact.set_timesteps(**arguments)
    assert torch.equal(ours.timesteps, exact.timesteps)
    torch.testing.assert_close(ours.sigmas[:-1], ours.timesteps / 1000)
    assert exact.sigmas[1] == pytest.approx(3 * 0.8 / (1 + 2 * 0.8))


@pytest.mark.parametrize("name", ONCE)
def test_levels_agree_where_diffusers_shifts_once(name: str):
    theirs, ours = pair(name, exact=False)
    # Ours are rounded once from float64; theirs took up to five float32 roundings on values <= 1.
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=0, atol=5 * 2**-24)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=5 * 1000 * 2**-24)
    x = noise(3, 40)
    for expected, found in zip(run(theirs, x), run(ours, x), strict=True):
        # One step's levels and arithmetic each differ by some 2^-24; seven steps add up.
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_rounded_once(dtype: torch.dtype):
    """Never further from float64 than diffusers, and the nearest number almost everywhere."""
    scheduler = FusedFlowMatchEuler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    times = scheduler.to_schedule().times
    theirs = shifted(1, 3.0).to_diffusers(diffusers.FlowMatchEulerDiscreteScheduler())
    theirs.sigmas, theirs.timesteps = scheduler.sigmas, scheduler.timesteps
    for index, t in enumerate(scheduler.timesteps):
        x, v = noise(64, 257, dtype=dtype, seed=index), noise(64, 257, dtype=dtype, seed=50 + index)
        truth = x.double() + (times[index + 1] - times[index]) * v.double()
        found = scheduler.step(v, t, x).prev_sample
        expected = theirs.step(v, t, x).prev_sample
        ours_off, theirs_off = ((y.double() - truth).abs() for y in (found, expected))
        assert ours_off.mean() <= theirs_off.mean() * (1 + 1e-3)
        if dtype != torch.float32:  # there the arithmetic's own rounding reaches the last bit
            assert (found == truth.to(dtype)).double().mean() > 0.999


def test_float64_steps_keep_their_digits():
    scheduler = FusedFlowMatchEuler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    times, x, v = scheduler.to_schedule().times, noise(2, 9).double(), noise(2, 9, seed=1).double()
    found = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(found, x + (times[1] - times[0]) * v, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_steps_use_diffusers_numbers(dtype: torch.dtype):
    theirs, ours = pair("dynamic", exact=False, stochastic_sampling=True)
    x = noise(3, 40, dtype=dtype)
    for index, t in enumerate(theirs.timesteps):
        v = noise(3, 40, dtype=dtype, seed=60 + index)
        expected, found = (
            s.step(v, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
            for s in (theirs, ours)
        )
        # diffusers rounds σ·v to the model's dtype before it subtracts (σ·v is at most about 4).
        torch.testing.assert_close(
            found, expected, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_steps(dtype: torch.dtype, stochastic: bool):
    theirs, ours = pair("dynamic", exact=False, stochastic_sampling=stochastic)
    x, v = noise(2, 11, 8, dtype=dtype), noise(2, 11, 8, dtype=dtype, seed=1)
    for tokens in (token_timesteps(theirs, 2, 11), theirs.timesteps[[2, 4]].view(2, 1)):
        expected, found = (
            s.step(
                v, theirs.timesteps[0], x,
                generator=torch.Generator().manual_seed(8), per_token_timesteps=tokens,
            ).prev_sample
            for s in (theirs, ours)
        )  # fmt: skip
        assert found.dtype == expected.dtype == torch.float32
        assert found.shape == x.shape
        # As for all samples at once: diffusers rounds (σ - σ_next)·v to the model's dtype.
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_token_steps_of_strided_tokens():
    """As one pipeline hands them over: [B, C, S] transposed."""
    theirs, ours = pair("dynamic", exact=False)
    x, v = (noise(2, 8, 11, seed=seed).transpose(1, 2) for seed in (0, 1))
    tokens = token_timesteps(theirs, 2, 11)
    t = theirs.timesteps[0]
    expected, found = (
        s.step(v, t, x, per_token_timesteps=tokens).prev_sample for s in (theirs, ours)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradients_flow_through_a_step():
    scheduler = FusedFlowMatchEuler()
    scheduler.set_timesteps(4)
    x, v = noise(2, 5).requires_grad_(), noise(2, 5, seed=1).requires_grad_()
    scheduler.step(v, scheduler.timesteps[0], x).prev_sample.sum().backward()
    dt = scheduler.to_schedule().times.diff()[0]
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(v.grad, torch.full_like(v, float(dt)))
