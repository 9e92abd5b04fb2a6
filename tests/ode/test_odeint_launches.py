"""How many operators a step takes that the device controls, and that the host reads nothing.

What runs here runs on CUDA too, an operator a launch (tests/native/test_cuda_emulation.py holds
that of rk_control, whose sum has two stages); a view is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowkernels.ode import odeint
from flowkernels.ode.solvers.fused import FusedSteps
from flowkernels.ode.solvers.registry import SOLVERS
from flowkernels.ode.solvers.tensors import TensorAdaptive, wants_tensors

Tensor = torch.Tensor

STAGES = {"adaptive_heun": 3, "fehlberg2": 4, "bosh3": 4, "tsit5": 7, "dopri5": 7, "dopri8": 14}
VIEWS = {"select", "unbind", "view", "detach", "slice", "as_strided", "alias", "expand"}
COPY_TO_HOST = 1  # of the record, on CUDA


class Launches(TorchDispatchMode):
    """Counts operators that are no views; fails where the host reads a value."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{func} waits for the device"
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The operators of each step that is taken."""
    steps: list[list[str]] = []
    take = FusedSteps.take

    def counted(self: FusedSteps) -> Any:
        with Launches() as mode:
            taken = take(self)
        steps.append(mode.names)
        return taken

    monkeypatch.setattr(FusedSteps, "take", counted)
    return steps


def _slopes(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """A right-hand side that launches nothing."""
    slope = itertools.cycle(torch.randn(20, *shape).to(dtype).unbind(0))
    return lambda t, y: next(slope)


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("options", [{"sync_every": 4}, {"per_sample": True, "sync_every": 4}])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_launches_of_a_step(
    method: str, options: dict[str, Any], sign: float, launched: list[list[str]]
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        launched.clear()
        t = torch.tensor([0.0, sign])
        given = {**options, "first_step": 0.2, "max_step": 0.2}
        odeint(
            _slopes((3, 5), dtype), torch.randn(3, 5).to(dtype), t, method=method, options=given,
            rtol=1.0, atol=1.0,
        )  # fmt: skip
        assert len(launched) >= 6
        for names in launched[1:]:
            assert names[0] == "rk_begin"
            assert names[-1] == "rk_control"
            assert set(names[1:-1]) <= {"rk_combine_forward"}
            assert len(names) == STAGES[method]
            assert len(names) + COPY_TO_HOST <= 8 or method == "dopri8"


def test_the_device_controls_on_cuda_unless_it_is_watched() -> None:
    """As far as the choice looks: there is no CUDA here."""

    def problem(device: str, **options: Any) -> Any:
        state = SimpleNamespace(device=torch.device(device), requires_grad=False)
        return SimpleNamespace(y0=state, t=state, options=options, event_fn=None, callbacks={})

    assert wants_tensors(problem("cuda"))
    assert wants_tensors(problem("cuda", sync_every=8))
    assert not wants_tensors(problem("cuda", sync_every=1))
    assert not wants_tensors(problem("cpu"))


@pytest.mark.parametrize(
    ("change", "fuses"),
    [
        ({}, True),
        ({"options": {"sync_every": 2, "step_t": torch.tensor([0.5])}}, False),
        ({"options": {"sync_every": 2, "norm": lambda y: y.abs().amax()}}, False),
        ({"options": {"per_sample": True, "dtype": torch.float32}}, False),
        ({"rtol": torch.full((3, 5), 1e-3)}, False),
        ({"y0": (torch.ones(3, 5), torch.ones(3))}, False),
        ({"y0": torch.ones(3, 0)}, False),
        ({"y0": torch.ones(3, 5, dtype=torch.complex64)}, False),
    ],
    ids=("plain", "stops", "norm", "dtype", "tolerances", "tuple", "empty", "complex"),
)
def test_what_asks_for_more_takes_the_plain_steps(
    change: dict[str, Any], fuses: bool, launched: list[list[str]]
) -> None:
    given = {
        "y0": torch.ones(3, 5), "t": torch.tensor([0.0, 1.0]), "rtol": 1e-3, "atol": 1e-3,
        "options": {"sync_every": 2}, **change,
    }  # fmt: skip

    def decay(t: Tensor, y: Any) -> Any:
        return tuple(-part for part in y) if isinstance(y, tuple) else -y

    found = odeint(decay, **given)
    last = found[0][-1] if isinstance(found, tuple) else found[-1]
    torch.testing.assert_close(
        last, torch.full_like(last, 0.36788), rtol=0, atol=1e-2, check_dtype=False
    )
    assert bool(launched) == fuses


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_fused_steps_are_the_plain_ones(
    method: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps, accepted and refused, to the rounding of their sizes."""
    rates = torch.tensor([0.5, 20.0, 3.0, 60.0], dtype=torch.float64)
    y0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)

    def field(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return (torch.cos(rates * t) * rates)[:, None] * torch.sin(y)

    options = {"per_sample": per_sample, "sync_every": 2}
    found = []
    for fuses in (True, False):
        calls: list[Tensor] = []
        if not fuses:
            monkeypatch.setattr(TensorAdaptive, "_fuses", lambda self: False)
        t = torch.linspace(0, -1, 5, dtype=torch.float64)
        y = odeint(field, y0, t, method=method, rtol=1e-4, atol=1e-4, options=options)
        found.append((y, len(calls), torch.stack([call.reshape(-1)[-1] for call in calls])))
    assert found[0][1] == found[1][1]
    # fehlberg2's error is a small difference of two stages: its rounding moves the steps.
    limit = 1e-7 if method == "fehlberg2" else 1e-10
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=limit)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=limit)


def test_a_function_that_overwrites_its_result_is_noticed(launched: list[list[str]]) -> None:
    y0, t = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(0, 2, 3)
    buffer = torch.empty_like(y0)

    def overwriting(t: Tensor, y: Tensor) -> Tensor:
        return torch.mul(y, -torch.cos(t), out=buffer)

    options = {"sync_every": 3}
    found = odeint(overwriting, y0, t, rtol=1e-5, atol=1e-5, options=options)
    expected = odeint(lambda t, y: -torch.cos(t) * y, y0, t, rtol=1e-5, atol=1e-5, options=options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert launched


def test_a_gradient_that_comes_up_within_a_step_is_kept() -> None:
    """Of a parameter that the right-hand side looks at from some time on."""
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def field(t: Tensor, y: Tensor) -> Tensor:
        rate = weight if (t > 0.5).any() else weight.detach()
        return -rate * y

    y0, t = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"per_sample": True, "max_step": 0.05}
    y = odeint(field, y0, t, rtol=1e-8, atol=1e-8, options=options)
    (grad,) = torch.autograd.grad(y[-1, 0, 0], weight)
    assert y[-1, 0, 0].item() == pytest.approx(0.3678794, abs=1e-6)
    # The time that is looked at, 0.5 of 1, to a step.
    assert grad.item() == pytest.approx(-0.5 * 0.3678794, abs=0.05)


def test_every_adaptive_method_is_counted() -> None:
    assert set(STAGES) == {name for name, each in SOLVERS.items() if each.tableau is not None}
