"""Gradients through the solvers, through the adjoint equation and through events."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from flowkernels.ode import odeint, odeint_adjoint, odeint_event

torchdiffeq = pytest.importorskip("torchdiffeq")
Tensor = torch.Tensor

METHODS = ("euler", "midpoint", "heun3", "rk4", "explicit_adams", "implicit_adams",
           "adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8")  # fmt: skip


class Field(nn.Module):
    """A small network of y and t, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(0.5 * torch.randn(3, 4, dtype=torch.float64, generator=generator))
        self.second = nn.Parameter(
            0.5 * torch.randn(4, 3, dtype=torch.float64, generator=generator)
        )
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        t = t.reshape(-1, *(1,) * (y.dim() - 1)) if t.dim() else t
        return torch.tanh(y @ self.first + t) @ self.second


def _problem(reverse: bool = False) -> tuple[Field, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y0 = torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_()
    t = torch.tensor([0.1, 0.4, 0.5, 1.3], dtype=torch.float64)
    t = (t.flip(0) if reverse else t).requires_grad_()
    weights = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)
    return Field(), y0, t, weights


def _gradients(solver: Any, reverse: bool = False, **arguments: Any) -> list[Tensor]:
    func, y0, t, weights = _problem(reverse)
    solution = solver(func, y0, t, **arguments)
    (solution * weights).sum().backward()
    return [y0.grad, t.grad, func.first.grad, func.second.grad]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_torchdiffeqs(method: str, reverse: bool) -> None:
    """On a fixed grid to rounding. Adaptive ones share their steps, so far as a first step does not
    depend on y0 (torchdiffeq differentiates its choice of one): to 1e-9.
    """
    options = {} if method in METHODS[:6] else {"first_step": 0.05}
    arguments = {"method": method, "options": options, "rtol": 1e-6, "atol": 1e-6}
    found = _gradients(odeint, reverse, **arguments)
    limit = 1e-9
    if method in ("bosh3", "fehlberg2"):  # whose interpolants are ours (docs/ode.md)
        arguments, limit = {"rtol": 1e-9, "atol": 1e-9}, 2e-3
    expected = _gradients(torchdiffeq.odeint, reverse, **arguments)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


ADAPTIVE_OPTIONS = (
    {},
    {"per_sample": True},
    {"jump_t": torch.tensor([0.45])},
    {"per_sample": True, "jump_t": torch.tensor([0.45])},
)
CHECKED = [
    ("rk4", {}),
    ("rk4", {"step_size": 0.17, "interp": "cubic"}),
    *product(("dopri5", "tsit5"), ADAPTIVE_OPTIONS),
]


@pytest.mark.parametrize(("method", "options"), CHECKED)
def test_gradcheck_in_the_state_and_the_times(method: str, options: dict[str, Any]) -> None:
    func, y0, t, _ = _problem()

    def solve(y0: Tensor, t: Tensor) -> Tensor:
        return odeint(func, y0, t, method=method, options=dict(options), rtol=1e-9, atol=1e-9)

    assert torch.autograd.gradcheck(solve, (y0, t), atol=1e-6)


def test_second_order_gradients() -> None:
    func, y0, t, _ = _problem()

    def solve(y0: Tensor) -> Tensor:
        return odeint(func, y0, t.detach()[:2], method="rk4")

    assert torch.autograd.gradgradcheck(solve, (y0,))


@pytest.mark.parametrize("kwargs", [{}, {"adjoint_options": {"norm": "seminorm"}},
                                    {"adjoint_method": "bosh3", "adjoint_options": {}},
                                    {"adjoint_rtol": 1e-11, "adjoint_atol": 1e-11}])  # fmt: skip
@pytest.mark.parametrize("reverse", [False, True])
def test_the_adjoint_equals_backpropagation(kwargs: dict[str, Any], reverse: bool) -> None:
    """To the tolerance of the solves, times 500 for the length of the way and the sums over it."""
    arguments = {"rtol": 1e-9, "atol": 1e-9}
    found = _gradients(odeint_adjoint, reverse, **arguments, **kwargs)
    expected = _gradients(odeint, reverse, **arguments)
    _assert_close(found, expected, 5e-7)


def _assert_close(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    """In y0, t and the parameters. To a time the adjoint's gradient is f itself; backpropagation
    differentiates the quartic between two steps, whose slope is of one order less.
    """
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6 if index == 1 else limit)


def test_the_adjoint_is_torchdiffeqs() -> None:
    """The same augmented system by the same solver: equal far below the tolerance."""
    arguments = {"rtol": 1e-6, "atol": 1e-6, "method": "dopri5"}
    found = _gradients(odeint_adjoint, **arguments)
    expected = _gradients(torchdiffeq.odeint_adjoint, **arguments)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_adjoint_of_a_tuple() -> None:
    def gradients(solver: Any, **kwargs: Any) -> list[Tensor]:
        rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        a = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        b = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        t = torch.linspace(0, 1, 3, dtype=torch.float64)

        def pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -rate * y[0] * y[1][:2], torch.cos(y[1])

        kwargs = {"adjoint_params": (rate,)} if solver is odeint_adjoint else {}
        u, v = solver(pair, (a, b), t, rtol=1e-9, atol=1e-9, **kwargs)
        (u.sum() + (v * v).sum()).backward()
        return [rate.grad, a.grad, b.grad]

    for ours, theirs in zip(gradients(odeint_adjoint), gradients(odeint), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_the_adjoint_of_each_sample_by_itself() -> None:
    arguments = {"rtol": 1e-9, "atol": 1e-9, "options": {"per_sample": True}}
    found = _gradients(odeint_adjoint, **arguments)
    expected = _gradients(odeint, rtol=1e-9, atol=1e-9)
    _assert_close(found, expected, 5e-7)


def test_the_adjoint_of_complex_states() -> None:
    def gradients(solver: Any) -> list[Tensor]:
        rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128, requires_grad=True)
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
        kwargs = {"adjoint_params": (rate,)} if solver is odeint_adjoint else {}
        y = solver(lambda t, y: 1j * rate * y * torch.cos(t), y0, t, rtol=1e-9, atol=1e-9, **kwargs)
        (y.real.sum() + (y.abs() ** 2 * y.imag).sum()).backward()
        return [y0.grad, t.grad, rate.grad]

    _assert_close(gradients(odeint_adjoint), gradients(odeint), 5e-7)


def test_a_gradient_that_appears_late() -> None:
    """A right-hand side that has parameters on one side of a jump only."""
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y if t < 0.5 else -rate * y

    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for options in ({}, {"sync_every": 4}):
        y0 = torch.ones(1, dtype=torch.float64)
        y = odeint(func, y0, t, options={"jump_t": torch.tensor([0.5]), **options})
        (grad,) = torch.autograd.grad(y[-1].sum(), rate)
        torch.testing.assert_close(grad, -0.5 * y[-1, 0].detach(), rtol=1e-6, atol=1e-6)


def test_nothing_is_recorded_without_gradients() -> None:
    func, y0, t, _ = _problem()
    with torch.no_grad():
        assert not odeint(func, y0, t).requires_grad


def _bounce(odeint_interface: Any, event: Any, solver: Any, **kwargs: Any) -> list[Tensor]:
    height = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    gravity = torch.tensor(9.8, dtype=torch.float64, requires_grad=True)
    start = torch.tensor(0.0, dtype=torch.float64)

    def fall(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], -gravity * torch.ones_like(y[1])

    zero = torch.zeros(1, dtype=torch.float64)
    t, (_, speed) = event(
        fall, (height, zero), start, event_fn=lambda t, y: y[0].sum(),
        odeint_interface=solver, atol=1e-10, rtol=1e-10, **kwargs,
    )  # fmt: skip
    (2 * t + speed[-1].sum()).backward()
    return [t.detach(), speed[-1].detach(), height.grad, gravity.grad]


@pytest.mark.parametrize("adjoint", [False, True])
def test_gradients_run_through_the_time_of_an_event(adjoint: bool) -> None:
    """A fall: t = √(2h/g), speed -√(2hg)."""
    kwargs = {}
    solver: Any = odeint
    if adjoint:
        gravity: list[Tensor] = []

        def solver(func: Any, *args: Any, **kwargs: Any) -> Any:
            cells = [c.cell_contents for c in func.__closure__]
            gravity[:] = [c for c in cells if isinstance(c, Tensor)]
            return odeint_adjoint(func, *args, adjoint_params=tuple(gravity), **kwargs)

    t, speed, by_height, by_gravity = _bounce(None, odeint_event, solver, **kwargs)
    h, g = 1.5, 9.8
    assert t.item() == pytest.approx((2 * h / g) ** 0.5, abs=1e-8)
    assert speed.item() == pytest.approx(-((2 * h * g) ** 0.5), abs=1e-7)
    # 2 dt/dh + dv/dh
    expected = 2 / (2 * h * g) ** 0.5 - (g / (2 * h)) ** 0.5
    assert by_height.item() == pytest.approx(expected, abs=1e-6)
    if not adjoint:
        expected = -((2 * h / g) ** 0.5) / g - (h / (2 * g)) ** 0.5
        assert by_gravity.item() == pytest.approx(expected, abs=1e-6)


def test_event_gradients_are_torchdiffeqs() -> None:
    found = _bounce(None, odeint_event, odeint)
    expected = _bounce(None, torchdiffeq.odeint_event, torchdiffeq.odeint)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


# ---- forward mode --------------------------------------------------------------------------------

FIXED = ("euler", "midpoint", "heun3", "rk4", "explicit_adams", "implicit_adams")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", ["y0", "parameters", "t"])
def test_forward_mode_agrees_with_reverse_mode(method: str, wanted: str) -> None:
    """Tangents are no `requires_grad`: a kernel that took the values alone would drop them."""
    field, y0, t, _ = _problem()
    field.requires_grad_(False)
    y0, t = y0.detach(), t.detach()

    def solve(value: Tensor) -> Tensor:
        func = (lambda t, y: field(t, y) * value) if wanted == "parameters" else field
        at = value if wanted == "t" else t
        return odeint(func, value if wanted == "y0" else y0, at, method=method)[-1].sum()

    given = {"y0": y0, "parameters": torch.ones((), dtype=torch.float64), "t": t}[wanted]
    ahead, back = torch.func.jacfwd(solve)(given), torch.func.jacrev(solve)(given)
    assert ahead.abs().max() > 1e-3
    torch.testing.assert_close(ahead, back, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_dual_tensors_keep_their_tangents(method: str) -> None:
    t = torch.linspace(0, 1, 4)
    with torch.autograd.forward_ad.dual_level():
        y0 = torch.autograd.forward_ad.make_dual(torch.ones(3), torch.ones(3))
        y1 = odeint(lambda t, y: -y, y0, t, method=method)[-1]
        value, tangent = torch.autograd.forward_ad.unpack_dual(y1)
    torch.testing.assert_close(tangent, value)  # both are exp(-t), by the method


def test_cubic_interpolation_has_a_gradient_at_points_of_the_grid() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    options = {"step_size": 0.25, "interp": "cubic"}
    found, theirs = (
        torch.autograd.grad(
            solve(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, method="rk4",
                  options=options)[1].sum(),
            t,
        )[0]
        for solve in (odeint, torchdiffeq.odeint)
    )  # fmt: skip
    torch.testing.assert_close(found, theirs)
    assert found[1] < -0.6
