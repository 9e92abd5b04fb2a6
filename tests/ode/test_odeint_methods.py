"""The solvers: against torchdiffeq, against exact solutions, and their order of convergence."""

from __future__ import annotations

import importlib
import math
from itertools import product
from typing import Any

import pytest
import torch

import flowkernels
from flowkernels.ode import ODE_METHODS, odeint
from flowkernels.ode.tableaus import TSIT5

torchdiffeq = pytest.importorskip("torchdiffeq")
Tensor = torch.Tensor

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")
ADAPTIVE = ("adaptive_heun", "fehlberg2", "bosh3", "tsit5", "dopri5", "dopri8")
ORDERS = {
    "euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "adaptive_heun": 2,
    "fehlberg2": 2, "bosh3": 3, "tsit5": 5, "dopri5": 5, "dopri8": 8,
}  # fmt: skip


class Counted:
    """A smooth nonlinear right-hand side that counts its calls and keeps its times."""

    def __init__(self) -> None:
        self.calls = 0
        self.times: list[Tensor] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.times.append(t)
        return torch.sin(3 * t) * torch.cos(y) + 0.1 * y


def _state(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )


def test_every_method_has_a_name() -> None:
    assert set(FIXED) | set(ADAPTIVE) | {"fixed_adams", "scipy_solver"} == set(ODE_METHODS)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_size": 0.07},
        {"step_size": 0.07, "interp": "cubic"},
        {"step_size": 0.11, "perturb": True},
    ],
)
def test_a_fixed_grid_equals_torchdiffeq(
    method: str, reverse: bool, options: dict[str, Any]
) -> None:
    t = torch.linspace(0.2, 2.0, 8, dtype=torch.float64)
    t = t.flip(0) if reverse else t
    ours, theirs = Counted(), Counted()
    found = odeint(ours, _state(), t, method=method, options=dict(options))
    expected = torchdiffeq.odeint(theirs, _state(), t, method=method, options=dict(options))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert ours.calls <= theirs.calls


def test_a_grid_constructor_equals_torchdiffeq() -> None:
    t = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)

    def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        return torch.linspace(float(t[0]), float(t[-1]), 31, dtype=torch.float64)

    options = {"grid_constructor": grid}
    found = odeint(Counted(), _state(), t, method="rk4", options=options)
    expected = torchdiffeq.odeint(Counted(), _state(), t, method="rk4", options=options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.fixture
def their_tsit5(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchdiffeq 0.2.5 has no tsit5: its step control with Tsitouras' tableau."""
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau

    def tensor(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    class Solver(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
        order = TSIT5.order
        tableau = _ButcherTableau(
            alpha=tensor(TSIT5.nodes),
            beta=[tensor(row) for row in TSIT5.rows],
            c_sol=tensor(TSIT5.solution),
            c_error=tensor(TSIT5.error),
        )
        mid = tensor(TSIT5.middle)

    solvers = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS
    if "tsit5" not in solvers:
        monkeypatch.setitem(solvers, "tsit5", Solver)


@pytest.mark.usefixtures("their_tsit5")
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adaptive_steps_are_torchdiffeqs(method: str, dtype: torch.dtype) -> None:
    """The same controller takes the same steps, to rounding: calls within 2 %, results to 1e-9.

    (float32 at tolerances above its rounding, where error estimates are no noise.)
    """
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for t in (torch.linspace(0.0, 2.0, 6), torch.linspace(0.0, -2.0, 6)):
        ours, theirs = Counted(), Counted()
        arguments = {"method": method, "rtol": tolerance, "atol": tolerance}
        found = odeint(ours, _state(dtype), t.to(dtype), **arguments)
        expected = torchdiffeq.odeint(theirs, _state(dtype), t.to(dtype), **arguments)
        assert ours.calls <= 1.02 * theirs.calls
        if method in ("bosh3", "fehlberg2"):  # whose interpolants are ours (docs/ode.md)
            exact = odeint(Counted(), _state(), t.double(), rtol=1e-10, atol=1e-10)
            assert (found - exact).abs().max() <= 1.1 * (expected - exact).abs().max()
        elif dtype == torch.float64:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        else:  # where error estimates are mostly rounding, so are the sizes of the steps
            close = {"dopri8": 2e-3, "tsit5": 2e-4}.get(method, 5e-6)
            torch.testing.assert_close(found, expected, rtol=0, atol=close)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_reach_their_tolerance(method: str) -> None:
    """Against a solve a thousand times as strict; global errors stay within 100 tolerances
    (fehlberg2's estimate is a poor one: within 1000).
    """
    t = torch.linspace(0.0, 2.0, 6, dtype=torch.float64)
    exact = odeint(Counted(), _state(), t, method="dopri5", rtol=1e-11, atol=1e-11)
    found = odeint(Counted(), _state(), t, method=method, rtol=1e-5, atol=1e-5)
    limit = 1e-2 if method == "fehlberg2" else 1e-3
    assert (found - exact).abs().max() < limit


def _decay(t: Tensor, y: Tensor) -> Tensor:
    """y = 1/(1 + t²) from y(0) = 1: nonlinear, and time enters too."""
    return -2 * t * y * y


def _error(method: str, steps: int) -> float:
    y0 = torch.ones(1, dtype=torch.float64)
    h = 1.0 / steps
    options = {"step_size": h}
    if method in ADAPTIVE:  # at tolerances that nothing exceeds each step has the largest size
        options = {"first_step": h, "max_step": h}
    found = odeint(
        _decay, y0, torch.tensor([0.0, 1.0], dtype=torch.float64), method=method,
        rtol=1e6, atol=1e6, options=options,
    )  # fmt: skip
    return abs(found[-1].item() - 0.5)


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_order_of_convergence(method: str, order: int) -> None:
    """Halving the step divides the error by 2^order; higher where an error term vanishes here."""
    steps = 8 if method == "dopri8" else 32
    rate = math.log2(_error(method, steps) / _error(method, 2 * steps))
    assert order - 0.35 < rate < order + 1.5


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_adams_methods_are_of_their_starters_order_at_least(method: str) -> None:
    def error(steps: int) -> float:
        y0 = torch.ones(1, dtype=torch.float64)
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        options = {"step_size": 1.0 / steps, "max_order": 6, "max_iters": 20}
        found = odeint(_decay, y0, t, method=method, options=options, rtol=1e-13, atol=1e-13)
        return abs(found[-1].item() - 0.5)

    assert math.log2(error(32) / error(64)) > 3.9


@pytest.mark.parametrize("method", ["euler", "rk4", "implicit_adams", "dopri5", "tsit5"])
def test_a_tuple_is_its_tensors_side_by_side(method: str) -> None:
    a, b = _state(), torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)

    def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cos(y[0]) * y[1][:3], -y[1]

    found = odeint(pair, (a, b), t, method=method)
    assert [each.shape for each in found] == [(5, 5, 3), (5, 4)]
    torch.testing.assert_close(found[1], torch.exp(-t)[:, None] * b, rtol=2e-1, atol=2e-1)
    if method != "tsit5":
        expected = torchdiffeq.odeint(pair, (a, b), t, method=method)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "tsit5"])
def test_complex_states(method: str) -> None:
    """y' = iωy turns; time stays real."""
    y0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128)
    t = torch.linspace(0.0, 1.0, 301 if method == "euler" else 21, dtype=torch.float64)
    seen = Counted()

    def turn(t: Tensor, y: Tensor) -> Tensor:
        seen.times.append(t)
        return 2j * y

    found = odeint(turn, y0, t, method=method)
    assert {time.dtype for time in seen.times} == {torch.float64}
    torch.testing.assert_close(
        found, torch.exp(2j * t)[:, None] * y0, rtol=0, atol=2e-2 if method == "euler" else 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_time_stays_float32_and_the_state_keeps_its_dtype(method: str, dtype: torch.dtype) -> None:
    field = Counted()
    t = torch.linspace(0.0, 1.0, 9)
    found = odeint(field, _state(dtype), t, method=method, rtol=1e-2, atol=1e-2)
    assert found.dtype == dtype
    assert {time.dtype for time in field.times} == {torch.float32}
    exact = odeint(Counted(), _state(dtype).double(), t.double(), method="dopri5")
    # Of the method, of the quartic inside long steps, or 8 roundings of bfloat16.
    limit = {"euler": 0.1, "rk4": 0.05, "dopri5": 0.2}[method]
    assert (found.double() - exact).abs().max() < limit


def test_float64_states_get_float64_times_from_float32_ones() -> None:
    field = Counted()
    odeint(field, _state(), torch.tensor([0.0, 1.0]), method="dopri5")
    assert {time.dtype for time in field.times} == {torch.float64}


@pytest.mark.parametrize("method", ["rk4", "dopri5", "tsit5"])
def test_kernels_agree_with_the_reference(method: str) -> None:
    t = torch.linspace(0.0, 1.0, 5)
    y0 = _state(torch.float32)
    arguments = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    found = odeint(Counted(), y0, t, **arguments)
    with flowkernels.backend("reference"):
        expected = odeint(Counted(), y0, t, **arguments)
    # Sums of seven stages of size 1, in another order.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *product(("rk4", "implicit_adams"), ({},)),
        *product(("dopri5", "bosh3"), ({}, {"per_sample": True}, {"sync_every": 3})),
    ],
)
def test_a_right_hand_side_may_overwrite_what_it_returned(
    method: str, buffers: int, options: dict[str, Any]
) -> None:
    """As one captured in a CUDA graph does."""
    ring = [torch.empty(5, 3, dtype=torch.float64) for _ in range(buffers)]
    calls = [0]

    def reusing(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        t = t.reshape(-1, *(1,) * (y.dim() - 1)) if t.dim() else t
        return ring[calls[0] % buffers].copy_(torch.sin(3 * t) * torch.cos(y))

    def fresh(t: Tensor, y: Tensor) -> Tensor:
        t = t.reshape(-1, *(1,) * (y.dim() - 1)) if t.dim() else t
        return torch.sin(3 * t) * torch.cos(y)

    t = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
    found = odeint(reusing, _state(), t, method=method, options=dict(options))
    expected = odeint(fresh, _state(), t, method=method, options=dict(options))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_one_time_is_no_integration(method: str) -> None:
    found = odeint(Counted(), _state(), torch.ones(1, dtype=torch.float64), method=method)
    torch.testing.assert_close(found, _state()[None], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_empty_batches(method: str) -> None:
    for options in ({}, {"per_sample": True} if method == "dopri5" else {}):
        found = odeint(
            lambda t, y: -y, torch.zeros(0, 3), torch.linspace(0, 1, 3), method=method,
            options=options,
        )  # fmt: skip
        assert found.shape == (3, 0, 3)
