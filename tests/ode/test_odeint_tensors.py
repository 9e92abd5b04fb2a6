"""Steps controlled on the device: each sample by itself, and looks every n steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowkernels.ode import odeint

Tensor = torch.Tensor

ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "tsit5", "dopri5", "dopri8")


class Rates:
    """y' = cos(ω t)·ω·sin(y) with another ω for each sample; counts calls, keeps times."""

    def __init__(self, rates: Tensor) -> None:
        self.rates, self.calls = rates, 0
        self.times: list[Tensor] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.times.append(t.detach().clone())
        rates = self.rates.to(y.dtype)
        return (torch.cos(rates * t) * rates)[:, None] * torch.sin(y)


RATES = torch.tensor([0.5, 20.0, 3.0, 60.0], dtype=torch.float64)


def _state(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("reverse", [False, True])
def test_per_sample_equals_separate_solves(method: str, reverse: bool) -> None:
    """Each row takes the steps that it takes alone: equal to rounding of the step sizes."""
    t = torch.linspace(0.0, -1.0 if reverse else 1.0, 6, dtype=torch.float64)
    tolerance = 1e-5 if method in ADAPTIVE[2:] else 1e-3
    arguments = {"method": method, "rtol": tolerance, "atol": tolerance}
    field = Rates(RATES)
    found = odeint(field, _state(), t, options={"per_sample": True}, **arguments)
    calls = []
    for row in range(4):
        alone = Rates(RATES[row : row + 1])
        expected = odeint(alone, _state()[row : row + 1], t, **arguments)
        # fehlberg2's error is a small difference of two stages: its rounding moves the steps.
        limit = 1e-7 if method == "fehlberg2" else 1e-9
        torch.testing.assert_close(found[:, row : row + 1], expected, rtol=0, atol=limit)
        calls.append(alone.calls)
    assert {time.shape for time in field.times} == {(4,)}
    # Together they take as many steps as the hardest of them.
    assert field.calls == max(calls)


def test_a_sample_does_not_see_its_neighbours() -> None:
    t = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
    options = {"per_sample": True}
    whole = odeint(Rates(RATES), _state(), t, options=options)
    half = odeint(Rates(RATES[:2]), _state()[:2], t, options=options)
    torch.testing.assert_close(whole[:, :2], half, rtol=0, atol=1e-12)


def test_samples_that_are_done_stand_still_at_their_last_time() -> None:
    field = Rates(RATES)
    odeint(field, _state(), torch.tensor([0.0, 1.0]), options={"per_sample": True}, rtol=1e-5)
    slow = torch.stack([time[0] for time in field.times])
    last = slow[-1]
    assert last > 1.0
    standing = slow[-30:]
    # The last stages of a step look just before its end.
    torch.testing.assert_close(standing, last.expand_as(standing), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_sync_every_gives_equal_results(dtype: torch.dtype, every: int) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return torch.sin(7 * t) * torch.cos(y)

    t = torch.linspace(0.0, 2.0, 9, dtype=dtype)
    calls: list[Tensor] = []
    expected = odeint(field, _state(dtype), t, rtol=1e-5, atol=1e-5)
    host = len(calls)
    calls.clear()
    found = odeint(field, _state(dtype), t, rtol=1e-5, atol=1e-5, options={"sync_every": every})
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
    assert host <= len(calls) < host + 6 * every
    assert {time.shape for time in calls} == {()}


@pytest.mark.parametrize("every", [1, 4])
def test_sync_every_of_per_sample(every: int) -> None:
    t = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
    options = {"per_sample": True}
    expected = odeint(Rates(RATES), _state(), t, options=options)
    found = odeint(Rates(RATES), _state(), t, options={**options, "sync_every": every})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_per_sample_tuples_and_jumps() -> None:
    a, b = _state(), torch.linspace(1, 2, 4, dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rate = RATES[: len(t)] * torch.where(t < 0.4, 1.0, 0.25)
        return -rate[:, None] * y[0], torch.cos(rate * t) * y[1]

    options = {"per_sample": True, "jump_t": torch.tensor([0.4])}
    found = odeint(pair, (a, b), t, rtol=1e-9, atol=1e-9, options=options)
    assert [each.shape for each in found] == [(4, 4, 3), (4, 4)]
    turned = torch.where(t < 0.4, t, 0.4 + 0.25 * (t - 0.4))
    exact = torch.exp(-turned[:, None] * RATES)[:, :, None] * a
    torch.testing.assert_close(found[0], exact, rtol=0, atol=1e-7)


def test_per_sample_options_and_norm() -> None:
    t = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
    options: dict[str, Any] = {
        "per_sample": True, "first_step": 1e-3, "max_step": 0.1, "safety": 0.8, "ifactor": 5.0,
        "norm": lambda y: y.abs().flatten(1).amax(1), "step_t": torch.tensor([0.3, 0.8]),
        "dtype": torch.float64,
    }  # fmt: skip
    found = odeint(Rates(RATES), _state(), t, options=options)
    exact = odeint(Rates(RATES), _state(), t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"per_sample": True}, {"sync_every": 3}])
def test_errors_reach_the_host(options: dict[str, Any]) -> None:
    y0, t = _state(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="underflow in dt"):
        odeint(lambda t, y: y * y * 50, y0, t, options=options)
    with pytest.raises(AssertionError, match="non-finite values in state"):
        odeint(lambda t, y: -y, y0 * torch.nan, t, options={**options, "first_step": 0.1})
    with pytest.raises(AssertionError, match=r"max_num_steps exceeded \(3>=3\)"):
        odeint(Rates(RATES), y0, t, options={"max_num_steps": 3, "sync_every": 2})
    with pytest.warns(UserWarning, match="Dopri5Solver: Unexpected arguments"):
        odeint(lambda t, y: -y, y0, t, options={**options, "speed": 1})


def test_events_callbacks_and_gradients_look_every_step() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = odeint(lambda t, y: -y, y0, t, options={"sync_every": 8})
    (grad,) = torch.autograd.grad(y[-1].sum(), y0)
    torch.testing.assert_close(grad, torch.exp(-torch.ones_like(grad)), rtol=0, atol=1e-6)
    found, _ = odeint(
        lambda t, y: y, y0.detach(), t, options={"sync_every": 8},
        event_fn=lambda t, y: (y - 2.0).sum(),
    )  # fmt: skip
    assert found.item() == pytest.approx(0.6931472, abs=1e-6)
