"""Events, and the solution as a function of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowkernels.ode import odeint, odeint_dense, odeint_event

torchdiffeq = pytest.importorskip("torchdiffeq")
Tensor = torch.Tensor

ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "tsit5", "dopri5", "dopri8")


def _grow(t: Tensor, y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "bosh3", "tsit5", "dopri5"])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_event_ends_the_solve(method: str, reverse: bool) -> None:
    """y = eᵗ reaches 2 at ln 2, and 1/2 at -ln 2."""
    y0 = torch.ones(2, dtype=torch.float64)
    goal = 0.5 if reverse else 2.0
    t = torch.tensor([0.0, -1.0 if reverse else 1.0], dtype=torch.float64)
    options = {"step_size": 0.02, "interp": "cubic"} if method in ("rk4", "implicit_adams") else {}
    found, y = odeint(
        _grow, y0, t, method=method, options=options, atol=1e-8, rtol=1e-8,
        event_fn=lambda t, y: (y - goal).sum(),
    )  # fmt: skip
    expected = -torch.log(torch.tensor(2.0)) if reverse else torch.log(torch.tensor(2.0))
    assert found.dtype == t.dtype
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert y.shape == (2, 2)
    torch.testing.assert_close(y[0], y0)
    torch.testing.assert_close(y[1], torch.full_like(y0, goal), rtol=0, atol=1e-6)


def test_events_are_torchdiffeqs() -> None:
    def event(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y.sum() - 6.0, t - 5.0, y[0] - 2.5])

    y0 = torch.tensor([1.0, 1.5], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = odeint(_grow, y0, t, event_fn=event)
    expected = torchdiffeq.odeint(_grow, y0, t, event_fn=event)
    # Both bisect the same bracket to atol, 1e-9; its ends differ by rounding.
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-11)


def test_an_event_at_the_start_ends_the_solve_there() -> None:
    y0 = torch.ones(1)
    found, y = odeint(_grow, y0, torch.tensor([0.5, 1.0]), event_fn=lambda t, y: (y - 1.0).sum())
    assert found.item() == 0.5
    torch.testing.assert_close(y[1], y0)


def test_reverse_time_of_odeint_event() -> None:
    t, y = odeint_event(
        _grow, torch.ones(1, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64),
        event_fn=lambda t, y: y.sum() - 0.25, reverse_time=True,
    )  # fmt: skip
    assert t.item() == pytest.approx(-1.3862944, abs=1e-6)
    assert y[1].item() == pytest.approx(0.25, abs=1e-7)


def test_errors_of_events() -> None:
    y0, event = torch.ones(1), lambda t, y: y.sum() - 2.0
    with pytest.raises(ValueError, match=r"We require len\(t\) == 2 when in event handling mode"):
        odeint(_grow, y0, torch.linspace(0, 1, 3), event_fn=event)
    with pytest.raises(AssertionError, match="currently requires `step_size`"):
        odeint(_grow, y0, torch.linspace(0, 1, 2), event_fn=event, method="rk4")
    with pytest.raises(RuntimeError, match="Reached maximum number of iterations 20000"):
        odeint(
            lambda t, y: torch.zeros_like(y), y0, torch.linspace(0, 1, 2), event_fn=event,
            method="euler", options={"step_size": 1e-3},
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="scipy_solver: has no events"):
        odeint(_grow, y0, torch.linspace(0, 1, 2), event_fn=event, method="scipy_solver")


# Dense output -------------------------------------------------------------------------------------


def _decay(t: Tensor, y: Any) -> Any:
    return -2 * t * y * y


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("reverse", [False, True])
def test_dense_output_follows_the_solution(method: str, reverse: bool) -> None:
    """y = 1/(1 + t²) between the ends of the steps; the quartic is of order 4, or the method's."""
    sign = -1.0 if reverse else 1.0
    y0 = torch.ones(1, dtype=torch.float64)
    dense = odeint_dense(
        _decay, y0, torch.tensor(0.0, dtype=torch.float64), torch.tensor(2.0 * sign),
        method=method, rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    t = sign * torch.linspace(0.0, 2.0, 57, dtype=torch.float64)
    exact = 1 / (1 + t * t)
    # dopri8's steps are long: its error between their ends is that of a quartic, not of order 8.
    limit = 2e-3 if method == "dopri8" else 2e-4
    torch.testing.assert_close(dense(t)[:, 0], exact, rtol=0, atol=limit)
    torch.testing.assert_close(dense(t[5])[0], exact[5], rtol=0, atol=limit)
    torch.testing.assert_close(dense(t)[:, 0], torch.cat([dense(each) for each in t]))


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_order_of_the_interpolant(method: str) -> None:
    """Halving the step divides the error inside steps by 2⁴ at least."""
    errors = []
    for steps in (16, 32):
        options = {"first_step": 1 / steps, "max_step": 1 / steps}
        dense = odeint_dense(
            _decay, torch.ones(1, dtype=torch.float64), 0.0, 1.0, method=method, rtol=1e6,
            atol=1e6, options=options,
        )  # fmt: skip
        t = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
        errors.append((dense(t)[:, 0] - 1 / (1 + t * t)).abs().max().item())
    assert errors[0] / errors[1] > 2**3.7


def test_dense_output_is_torchdiffeqs() -> None:
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    ends = torch.tensor(0.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    found = odeint_dense(_decay, y0, *ends)
    expected = torchdiffeq.odeint_dense(_decay, y0, *ends)
    for t in torch.linspace(0.0, 1.99, 13, dtype=torch.float64):
        torch.testing.assert_close(found(t), expected(t), rtol=0, atol=1e-12)


def test_dense_output_of_tuples_and_its_gradient() -> None:
    y0 = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -y[0], y[1]

    dense = odeint_dense(pair, (y0, 2 * y0), 0.0, 1.0)
    a, b = dense(torch.tensor(0.5, dtype=torch.float64))
    half = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(a.detach(), torch.exp(-half), rtol=0, atol=1e-7)
    torch.testing.assert_close(b.detach(), 2 * torch.exp(half), rtol=0, atol=1e-7)
    (grad,) = torch.autograd.grad(b.sum(), y0)
    torch.testing.assert_close(grad, 2 * torch.exp(half), rtol=0, atol=1e-7)


def test_errors_of_dense_output() -> None:
    dense = odeint_dense(_decay, torch.ones(1), 0.0, 1.0)
    with pytest.raises(AssertionError, match="invalid interpolation, fails `t0 <= t <= t1`"):
        dense(-0.5)
    with pytest.raises(ValueError, match="method: got 'rk4', which has no dense output"):
        odeint_dense(_decay, torch.ones(1), 0.0, 1.0, method="rk4")
    with pytest.raises(ValueError, match="per_sample has no dense output"):
        odeint_dense(_decay, torch.ones(1), 0.0, 1.0, options={"per_sample": True})
