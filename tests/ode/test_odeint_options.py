"""Options, callbacks, errors and warnings: those of torchdiffeq, by their messages."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from flowkernels.ode import odeint, odeint_adjoint

torchdiffeq = pytest.importorskip("torchdiffeq")
Tensor = torch.Tensor

T = torch.linspace(0.0, 1.0, 3)


def _decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


class Spy:
    """Counts calls and keeps what the callbacks were given."""

    def __init__(self, func: Any = _decay) -> None:
        self.func, self.calls, self.times = func, 0, []
        self.seen: list[tuple[str, float, float]] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.times.append(t.item())
        return self.func(t, y)

    def callback_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self.seen.append(("step", t.item(), float(dt)))

    def callback_accept_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self.seen.append(("accept", t.item(), float(dt)))

    def callback_reject_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        self.seen.append(("reject", t.item(), float(dt)))


def _jump(t: Tensor, y: Tensor) -> Tensor:
    return -0.5 * y if t < 0.5 else y * y


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.3},
        {"max_step": 0.05},
        {"min_step": 0.2},
        {"safety": 0.5, "ifactor": 2.0, "dfactor": 0.5},
        {"step_t": torch.tensor([0.31, 0.62])},
        {"jump_t": torch.tensor([0.5])},
        {"jump_t": torch.tensor([0.5]), "step_t": torch.tensor([0.2, 0.7])},
        {"norm": lambda y: y.abs().max()},
        {"dtype": torch.float32},
        {"max_num_steps": 1000},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_do_what_torchdiffeqs_do(options: dict[str, Any]) -> None:
    y0 = torch.tensor([1.0, 0.3], dtype=torch.float64)
    for t in (T.double(), (1 - T).double()):
        ours, theirs = Spy(_jump), Spy(_jump)
        arguments = {"rtol": 1e-6, "atol": 1e-6, "options": options}
        found = odeint(ours, y0, t, **arguments)
        expected = torchdiffeq.odeint(theirs, y0, t, **arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert abs(ours.calls - theirs.calls) <= 0.02 * theirs.calls
        if (
            "dtype" not in options
        ):  # our times of a host-controlled solve are float64 whatever it is
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            assert [name for name, _, _ in ours.seen] == [name for name, _, _ in theirs.seen]
            for (_, t0, dt), (_, t1, other) in zip(ours.seen, theirs.seen, strict=True):
                assert t0 == pytest.approx(t1, abs=1e-6)
                assert dt == pytest.approx(other, abs=1e-6)


def test_a_jump_is_seen_from_both_sides() -> None:
    spy = Spy(_jump)
    odeint(spy, torch.ones(1, dtype=torch.float64), T.double(), options={"jump_t": T[1:2]})
    below = [t for t in spy.times if 0.5 - 1e-12 < t < 0.5]
    above = [t for t in spy.times if 0.5 < t < 0.5 + 1e-12]
    assert below
    assert len(above) == 1


def test_a_step_that_ends_on_a_jump_by_chance_sees_it_too() -> None:
    spy = Spy(_jump)
    options = {"first_step": 0.5, "jump_t": torch.tensor([0.5])}
    odeint(spy, torch.full((1,), 1e-3), T, rtol=1.0, atol=1.0, options=options)
    assert sum(0.5 < t < 0.5 + 1e-6 for t in spy.times) == 1


def test_tolerances_of_a_tuple() -> None:
    y0 = (torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64))

    def pair(t: Tensor, y: Any) -> Any:
        return (-y[0], torch.cos(5 * t) * y[1])

    arguments = {"rtol": (1e-3, 1e-7), "atol": (1e-3, 1e-9)}
    ours, theirs = Spy(pair), Spy(pair)
    found = odeint(ours, y0, T.double(), **arguments)
    expected = torchdiffeq.odeint(theirs, y0, T.double(), **arguments)
    assert ours.calls == theirs.calls
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)


def test_a_norm_sees_the_callers_form() -> None:
    seen: list[Any] = []

    def norm(y: Any) -> Tensor:
        seen.append(y)
        return max(part.abs().max() for part in y)

    y0 = (torch.tensor(1.0), torch.ones(2, 2))
    odeint(lambda t, y: (-y[0], -y[1]), y0, T, options={"norm": norm})
    assert seen
    assert all(isinstance(y, tuple) and [p.shape for p in y] == [(), (2, 2)] for y in seen)


def test_norm_of_the_adjoint() -> None:
    seen: list[Any] = []
    weight = torch.ones(7, requires_grad=True)

    def norm(parts: Any) -> Tensor:
        seen.append(tuple(part.shape for part in parts))
        return torch.stack([part.abs().max() for part in parts]).max()

    y0 = (torch.tensor(1.0, requires_grad=True), torch.ones(2, 2))
    y = odeint_adjoint(
        lambda t, y: (-y[0] * weight.mean(), -y[1]), y0, T, adjoint_params=(weight,),
        adjoint_options={"norm": norm},
    )  # fmt: skip
    y[0].sum().backward()
    assert set(seen) == {((), (), (2, 2), (), (2, 2), (7,))}


def test_callbacks_of_a_fixed_grid_and_of_the_adjoint() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, float, tuple[int, ...]]] = []

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
            self.seen.append(("forward", t.item(), tuple(y.shape)))

        def callback_step_adjoint(self, t: Tensor, state: Any, dt: Tensor) -> None:
            self.seen.append(("backward", t.item(), tuple(state[1].shape)))

    module = Module()
    y0 = torch.ones(3, requires_grad=True)
    y = odeint_adjoint(module, y0, torch.tensor([1.0, 0.5, 0.0]), method="rk4")
    assert module.seen == [("forward", 1.0, (3,)), ("forward", 0.5, (3,))]
    y[-1].sum().backward()
    assert module.seen[2:] == [("backward", 0.0, (3,)), ("backward", 0.5, (3,))]


# Errors and warnings ------------------------------------------------------------------------------


def _both(match: str, error: type[Exception], *args: Any, **kwargs: Any) -> None:
    """torchdiffeq raises the same, in the same words."""
    for solver in (odeint, torchdiffeq.odeint):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(error, match=match):
                solver(*args, **kwargs)


def test_errors_are_torchdiffeqs() -> None:
    y0 = torch.ones(2)
    _both('Invalid method "rk5"', ValueError, _decay, y0, T, method="rk5")
    _both("y0 must be either a torch.Tensor or a tuple", AssertionError, _decay, [y0], T)
    _both("t must be strictly increasing or decreasing", AssertionError, _decay, y0, T[[0, 2, 1]])
    _both("t must be strictly increasing", AssertionError, _decay, y0, T[[0, 1, 1]])
    _both("must be a floating point Tensor", TypeError, _decay, y0, torch.tensor([0, 1]))
    _both("t must be one dimensional", AssertionError, _decay, y0, T[:, None])
    wanted = torch.tensor(1e-3, requires_grad=True)
    _both("rtol cannot require gradient", AssertionError, _decay, y0, T, rtol=wanted)
    _both("atol cannot require gradient", AssertionError, _decay, y0, T, atol=wanted)
    _both("If using tupled rtol", AssertionError, lambda t, y: y, (y0, y0), T, rtol=(1.0,))
    both = {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}
    _both("step_size and grid_constructor are mutually", ValueError, _decay, y0, T,
          method="rk4", options=both)  # fmt: skip
    options = {"interp": "quintic", "step_size": 0.3}
    _both("Unknown interpolation method quintic", ValueError, _decay, y0, T, method="rk4",
          options=options)  # fmt: skip
    _both("max_order must be at most 12", AssertionError, _decay, y0, T, method="explicit_adams",
          options={"max_order": 13})  # fmt: skip
    options = {"step_t": T[1:2], "jump_t": T[1:2]}
    _both("`step_t` and `jump_t` must not have any repeated", ValueError, _decay, y0, T,
          options=options)  # fmt: skip
    _both(r"max_num_steps exceeded \(2>=2\)", AssertionError, _decay, y0, T,
          options={"max_num_steps": 2})  # fmt: skip
    _both("non-finite values in state", AssertionError, _decay, y0 * torch.inf, T,
          options={"first_step": 0.1})  # fmt: skip
    _both("underflow in dt", AssertionError, lambda t, y: y * y, 5 * y0, T)
    for solver in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        with pytest.raises(ValueError, match=r"func must be an instance of nn\.Module"):
            solver(_decay, y0, T)
        with pytest.raises(ValueError, match="If `adjoint_method != method` then we cannot infer"):
            solver(
                _decay, y0, T, adjoint_params=(), adjoint_method="rk4", options={"first_step": 0.1}
            )


def test_errors_of_our_own() -> None:
    y0 = torch.ones(2, 3)
    with pytest.raises(AssertionError, match=r"t must be a torch\.Tensor"):
        odeint(_decay, y0, 1.0)
    with pytest.raises(TypeError, match="`y0` must be a floating point Tensor"):
        odeint(_decay, y0.long(), T)
    with pytest.raises(ValueError, match=r"func: returned shape \(5,\), need y's \(2, 3\)"):
        odeint(lambda t, y: torch.ones(5), y0, T)
    with pytest.raises(TypeError, match=r"func: returned NoneType, need a torch\.Tensor"):
        odeint(lambda t, y: None, y0, T)
    with pytest.raises(TypeError, match="func: returned NoneType, need a tuple of tensors"):
        odeint(lambda t, y: None, (y0, y0), T)
    with pytest.raises(TypeError, match="func: returned NoneType as part 1"):
        odeint(lambda t, y: (y[0], None), (y0, y0), T)
    with pytest.raises(AssertionError, match="t must hold at least one time"):
        odeint(_decay, y0, T[:0])
    with pytest.raises(TypeError, match=r"func: returned torch.complex64 for y0 of torch.float32"):
        odeint(lambda t, y: 1j * y, y0, T)
    with pytest.raises(ValueError, match="sync_every: got 0, need an integer of at least 1"):
        odeint(_decay, y0, T, options={"sync_every": 0})
    with pytest.raises(ValueError, match="y0: got a tensor with no dimension"):
        odeint(_decay, torch.tensor(1.0), T, options={"per_sample": True})
    with pytest.raises(
        ValueError, match=r"y0: got tensors of shapes \[\(2,\), \(3,\)\], need one B"
    ):
        odeint(lambda t, y: y, (torch.ones(2), torch.ones(3)), T, options={"per_sample": True})
    with pytest.raises(ValueError, match="event_fn: per_sample has no events"):
        odeint(_decay, y0, T[:2], options={"per_sample": True}, event_fn=lambda t, y: y.sum())
    with pytest.raises(AssertionError, match="the grid must begin and end"):
        odeint(_decay, y0, T, method="euler", options={"grid_constructor": lambda f, y, t: t / 2})


def test_warnings_are_torchdiffeqs() -> None:
    y0 = torch.ones(2)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"Dopri5Solver: Unexpected arguments \{'speed': 1\}", {"options": {"speed": 1}}),
        (r"RK4: Unexpected arguments \{'speed': 1\}", {"method": "rk4", "options": {"speed": 1}}),
        (r"ScipyWrapperODESolver: Unexpected arguments \{'speed': 1\}",
         {"method": "scipy_solver", "options": {"speed": 1}}),
        ("max_order is below 4, so the solver reduces to `rk4`.",
         {"method": "explicit_adams", "options": {"max_order": 3}}),
        ("Functional iteration did not converge. Solution may be incorrect.",
         {"method": "implicit_adams", "options": {"step_size": 0.1, "max_iters": 1}}),
    ]  # fmt: skip
    for solver in (odeint, torchdiffeq.odeint):
        for message, arguments in cases:
            with pytest.warns(UserWarning, match=message):
                solver(_decay, y0, T, **arguments)
        with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks"):
            solver(Spy(), y0, T, method="rk4")
    fixed = torch.ones(2)
    with pytest.warns(UserWarning, match="An adjoint parameter was passed without requiring"):
        odeint_adjoint(_decay, y0, T, adjoint_params=(fixed,),
                       adjoint_options={"norm": lambda parts: parts[1].abs().max()})  # fmt: skip


def test_times_to_stop_at_keep_the_precision_of_numbers() -> None:
    """A list through float32 would put the jumps where they are not, and steps beside them."""

    def jumping(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.2, 1.0, torch.where(t < 0.55, -20.0, 5.0)).to(y)

    y0 = torch.zeros(1, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exact = 0.2 - 20 * 0.35 + 5 * 0.45
    for jumps in ([0.2, 0.55], torch.tensor([0.2, 0.55], dtype=torch.float64)):
        spy = Spy(jumping)
        found = odeint(spy, y0, t, rtol=1e-6, atol=1e-8, options={"jump_t": jumps})[-1]
        assert abs(float(found) - exact) < 1e-12
        assert spy.calls < 60


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_tolerances_of_each_element(kind: Any) -> None:
    values = kind([1e-3, 1e-4, 1e-5])
    ours, theirs = (
        solve(_decay, torch.ones(3), T, rtol=values, atol=values)
        for solve in (odeint, torchdiffeq.odeint)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_tolerance_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match="rtol: got str, need a number, or one for each element"):
        odeint(_decay, torch.ones(3), T, rtol="tight")


def test_an_unknown_interpolation_is_refused_where_none_is_needed() -> None:
    with pytest.raises(ValueError, match="Unknown interpolation method x"):
        odeint(_decay, torch.ones(3), T, method="rk4", options={"interp": "x"})
