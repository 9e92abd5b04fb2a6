"""The fused Heun scheduler against diffusers' own, and where it serves more than that."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from flowkernels.ode import Schedule, sample, shifted
from tests.integrations.scheduling import (
    DTYPES,
    FusedFlowMatchEuler,
    FusedFlowMatchHeun,
    diffusers,
    noise,
    velocity,
)

STEPS = 6


def pair(exact: bool, shift: float = 1.0):
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    ours = FusedFlowMatchHeun.from_config(theirs.config, exact=exact)
    theirs.set_timesteps(STEPS)
    ours.set_timesteps(STEPS)
    return theirs, ours


def run(scheduler, x: torch.Tensor, timesteps=None, **arguments: object) -> list[torch.Tensor]:
    states = []
    for t in scheduler.timesteps if timesteps is None else timesteps:
        first = scheduler.state_in_first_order
        x = scheduler.step(velocity(x, t), t, x, return_dict=False, **arguments)[0]
        states.append(x)
        assert scheduler.state_in_first_order != first
    return states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_steps_are_diffusers(shift: float, dtype: torch.dtype):
    theirs, ours = pair(exact=True, shift=shift)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert (ours.order, len(ours)) == (theirs.order, len(theirs))
    states = [run(scheduler, noise(3, 4, 17, dtype=dtype)) for scheduler in (theirs, ours)]
    for expected, found in zip(*states, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_churned_steps_are_diffusers(dtype: torch.dtype):
    """Between two levels only, so that some steps have noise and some none."""
    theirs, ours = pair(exact=True, shift=3.0)
    found = [
        run(
            s, noise(3, 40, dtype=dtype),
            s_churn=3.0, s_tmin=float(s.sigmas[7]), s_tmax=0.95, s_noise=1.1,
            generator=torch.Generator().manual_seed(4),
        )
        for s in (theirs, ours)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = run(pair(exact=True, shift=3.0)[1], noise(3, 40, dtype=dtype))
    assert not torch.equal(plain[-1], found[1][-1])


def test_the_last_level_is_shifted_once():
    theirs, ours = pair(exact=False, shift=3.0)
    once = 0.003 / 1.002
    assert float(ours.sigmas[-2]) == pytest.approx(once, rel=1e-6)
    assert float(theirs.sigmas[-2]) == pytest.approx(3 * once / (1 + 2 * once), rel=1e-6)
    euler = FusedFlowMatchEuler(shift=3.0)
    euler.set_timesteps(STEPS)
    assert ours.to_schedule() == euler.to_schedule()


@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_steps_agree_with_diffusers(churn: float):
    theirs, ours = pair(exact=False)
    found = [
        run(s, noise(3, 40), s_churn=churn, generator=torch.Generator().manual_seed(4))
        for s in (theirs, ours)
    ]
    for expected, got in zip(*found, strict=True):
        # diffusers' derivative is (x - (x - vσ))/σ: a rounding of x, divided by σ (down to 0.001),
        # times a dt that is no smaller than that of the step before.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_a_step_is_nearer_to_float64_than_diffusers(dtype: torch.dtype, churn: float):
    """Both stages, on the same levels, velocities and noise."""
    theirs, ours = pair(exact=False)
    gamma = min(churn / (len(ours.sigmas) - 1), 2**0.5 - 1)
    times = ours.to_schedule().times
    for index in range(STEPS - 1):
        x, v, w = (noise(32, 129, dtype=dtype, seed=9 * index + k) for k in range(3))
        results = []
        for scheduler in (theirs, ours):
            generator = torch.Generator().manual_seed(index)
            state = x
            for stage, output in enumerate((v, w)):
                t = scheduler.timesteps[2 * index + stage]
                state = scheduler.step(
                    output, t, state, s_churn=churn, generator=generator
                ).prev_sample
            results.append(state)
        sigma, raised = times[index], times[index] * (1 + gamma)
        start = x.double()
        if gamma:
            drawn = torch.randn(
                x.shape, generator=torch.Generator().manual_seed(index), dtype=dtype
            )
            start = start + drawn.double() * (raised**2 - sigma**2) ** 0.5
        slope = v.double() / (1 + gamma)
        truth = start + (times[index + 1] - raised) * (slope + w.double()) / 2
        theirs_off, ours_off = ((y.double() - truth).abs().mean() for y in results)
        assert results[1].dtype == dtype
        assert ours_off <= theirs_off * (1 + 1e-3)


def test_it_is_the_samplers_heun():
    """Against the sampler of flowkernels.ode: the same second-order steps, then one of Euler's."""
    schedule = shifted(8, 3.0)
    x = noise(4, 10).double()
    scheduler = FusedFlowMatchHeun.from_schedule(schedule)
    assert scheduler.to_schedule() == schedule
    found = run(scheduler, x)

    def field(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (y * 0.7 - t[0]).sin()

    before = sample(field, x, schedule, method="heun", return_trajectory=True)[-2]
    # The timesteps that the model is shown are float32.
    torch.testing.assert_close(found[-2], before, rtol=0, atol=1e-6)
    last = schedule.times[-2]
    expected = before - last * field(before, last.float().expand(4))
    torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_reads_nothing_from_the_device(exact: bool):
    """diffusers compares a level with s_tmin on the host, in every step."""
    scheduler = FusedFlowMatchHeun(shift=3.0, exact=exact)
    scheduler.set_timesteps(4, device="meta")
    x = torch.empty(2, 8, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert scheduler.step_index == 7


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_from_the_middle(exact: bool):
    """Of two equal timesteps the second, so that it starts with a first stage."""
    theirs, ours = pair(exact)
    states = []
    for scheduler in (theirs, ours):
        assert scheduler.index_for_timestep(scheduler.timesteps[3]) == 4
        states.append(run(scheduler, noise(2, 30), scheduler.timesteps[4:])[-1])
    torch.testing.assert_close(*states, rtol=0, atol=0 if exact else 1e-4)


def test_buffers_may_be_reused_between_the_stages():
    """A captured model writes each output to one place, its caller the state to another."""
    scheduler, plain = FusedFlowMatchHeun(), FusedFlowMatchHeun()
    state, output = noise(2, 9), torch.empty(2, 9)
    scheduler.set_timesteps(4)
    plain.set_timesteps(4)
    expected = run(plain, state)[-1]
    state = state.clone()
    for t in scheduler.timesteps:
        output.copy_(velocity(state, t))
        state.copy_(scheduler.step(output, t, state).prev_sample)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("exact", [False, True])
def test_scale_noise(exact: bool):
    theirs, ours = pair(exact)
    x, e = noise(3, 5), noise(3, 5, seed=1)
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(4)
    expected = theirs.scale_noise(x, theirs.timesteps[4], e)
    found = ours.scale_noise(x, ours.timesteps[4], e)
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if exact else 3e-7)


def test_flux_settings_and_arguments():
    """diffusers' Heun takes neither; ours has the Euler scheduler's levels then."""
    flux = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    arguments = {"sigmas": np.linspace(1, 1 / STEPS, STEPS), "mu": 1.0}
    euler = FusedFlowMatchEuler.from_config(flux.config)
    euler.set_timesteps(**arguments)
    for exact in (False, True):
        heun = FusedFlowMatchHeun.from_config(flux.config, exact=exact)
        heun.set_timesteps(**arguments)
        assert heun.to_schedule() == euler.to_schedule()
        assert len(heun.timesteps) == 2 * STEPS - 1
        assert torch.equal(heun.timesteps[1::2], euler.timesteps[1:])
        run(heun, noise(2, 4))
    with pytest.raises(ValueError, match="mu"):
        heun.set_timesteps(4)


def test_a_changed_shift_is_applied_once():
    for exact in (False, True):
        scheduler = FusedFlowMatchHeun(exact=exact)
        scheduler.set_shift(5.0)
        scheduler.set_timesteps(4)
        assert float(scheduler.sigmas[-2]) == pytest.approx(0.005 / 1.004, rel=1e-6)


@pytest.mark.parametrize("kind", [diffusers.FlowMatchHeunDiscreteScheduler, FusedFlowMatchHeun])
def test_a_schedule_to_diffusers(kind: type):
    schedule = Schedule([1.0, 0.7, 0.2, 0.0])
    scheduler = schedule.to_diffusers(kind(shift=3.0))
    assert torch.equal(scheduler.sigmas, schedule.times[[0, 1, 1, 2, 2, 3]].float())
    assert torch.equal(scheduler.timesteps, (schedule.times[[0, 1, 1, 2, 2]] * 1000).float())
    x = noise(2, 6)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones_like(x), t, x).prev_sample
    torch.testing.assert_close(x, noise(2, 6) - 1, rtol=0, atol=1e-6)


def test_save_load_and_copy(tmp_path):
    scheduler = FusedFlowMatchHeun.from_schedule(shifted(4, 2.0), exact=True)
    scheduler.save_pretrained(tmp_path)
    loaded = FusedFlowMatchHeun.from_pretrained(tmp_path)
    loaded.set_timesteps(4)
    assert loaded.config.exact
    for twin in (loaded, copy.deepcopy(scheduler)):
        assert twin.to_schedule() == shifted(4, 2.0)
        assert twin.state_in_first_order
    assert diffusers.FlowMatchHeunDiscreteScheduler.from_pretrained(tmp_path).config.shift == 1.0


def test_what_is_refused():
    with pytest.raises(ValueError, match="need at most one"):
        FusedFlowMatchHeun(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="time_shift_type: got 'cubic'"):
        FusedFlowMatchHeun(time_shift_type="cubic")
    scheduler = FusedFlowMatchHeun()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="not its index"):
        scheduler.step(noise(1, 2), 0, noise(1, 2))
    with pytest.raises(ValueError, match="model_output: got shape"):
        scheduler.step(noise(1, 3), scheduler.timesteps[0], noise(1, 2))
    run(scheduler, noise(1, 2))
    with pytest.raises(IndexError, match="has taken its 3 steps"):
        scheduler.step(noise(1, 2), scheduler.timesteps[0], noise(1, 2))
