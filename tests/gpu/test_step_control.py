"""Steps that the device controls, on a GPU: their kernels, whole solves, launches, no host sync."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flowkernels.ode import odeint
from flowkernels.ode.solvers.fused import FusedSteps
from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step import reference
from flowkernels.ops.step.reference import STEP, Limits, plan_step
from tests.gpu import DEVICE, DRY, needs_cuda
from tests.optim.helpers import NoHostSync

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One element, samples of one chunk, of several, and more samples than a grid is high.
SHAPES = [(1, 1), (3, 85), (2, 2049)]
if not DRY:
    SHAPES += [(3, 300007), (70001, 3)]
NODES = [1 / 5, 3 / 10, 1.0]
WEIGHTS = [0.1, 0.0, 0.2, -0.3]


def _operands(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).to(DEVICE) for _ in range(6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_control_and_begin_are_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, per_sample: bool
) -> None:
    y0, y1, *ks = _operands(shape, dtype)
    columns = shape[:1] if per_sample else (1,)
    for sign, tolerance in ((1.0, 1.0), (-1.0, 1e-3)):
        limits = Limits(5.0, 0.9, 10.0, 0.2, 1e-3, 1.0, 1.0, sign)
        t = torch.linspace(0.1, 1.1, columns[0], dtype=torch.float64, device=DEVICE)
        t = t if per_sample else t[0]
        plan, _ = plan_step(t, torch.full_like(t, 0.25), NODES, limits, reference.norm_dtype(dtype))
        tickets = torch.zeros(plan.shape[1:], dtype=torch.int32, device=DEVICE)
        arguments = (y0, y1, tolerance, tolerance, NODES)
        expected = reference.rk_control(ks, WEIGHTS, plan, *arguments, limits)
        for _ in range(3):  # whichever block is the last
            found = operators.rk_control.default(
                ks, WEIGHTS, plan[STEP], plan, *arguments, list(limits), tickets
            )
            limit = 1e-12 if dtype == torch.float64 else 1e-5
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=limit, atol=0)
            assert not tickets.any()
        begin = (y0, y1, ks[0], ks[1], found[2], found[1][STEP], 0.2)
        again, theirs = operators.rk_begin.default(*begin), reference.rk_begin(*begin)
        assert torch.equal(again[0], theirs[0])
        assert torch.equal(again[1], theirs[1])
        limit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)  # a rounding
        torch.testing.assert_close(again[2], theirs[2], rtol=limit, atol=limit)


def _solve(device: str, method: str, options: dict[str, Any]) -> torch.Tensor:
    rates = torch.tensor([0.5, 20.0, 3.0, 60.0], dtype=torch.float64, device=device)
    y0 = torch.linspace(-1, 1, 12, dtype=torch.float64, device=device).reshape(4, 3)
    t = torch.linspace(0, -1, 5, dtype=torch.float64, device=device)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.cos(rates * t) * rates)[:, None] * torch.sin(y)

    return odeint(field, y0, t, method=method, rtol=1e-6, atol=1e-6, options=options).cpu()


@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri5", "dopri8"])
@pytest.mark.parametrize(
    "options", [{}, {"sync_every": 4}, {"per_sample": True}, {"per_sample": True, "sync_every": 3}]
)
def test_solves_are_those_of_the_cpu(method: str, options: dict[str, Any]) -> None:
    found, expected = _solve(DEVICE, method, options), _solve("cpu", method, options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_no_host_sync_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    take, taken = FusedSteps.take, []

    def watched(self: FusedSteps) -> Any:
        with NoHostSync(DEVICE):
            taken.append(take(self))
        return taken[-1]

    monkeypatch.setattr(FusedSteps, "take", watched)
    _solve(DEVICE, "dopri5", {"sync_every": 2})
    assert len(taken) > 5


@needs_cuda
@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri5"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_launches_of_a_step(method: str, per_sample: bool) -> None:
    """Kernels, copies and fills of 20 more steps, right-hand side of none: at most 8 a step."""
    from torch.profiler import ProfilerActivity, profile

    def launches(steps: int) -> int:
        slope = itertools.cycle(torch.randn(20, 64, 256, device=DEVICE).unbind(0))
        y0, t = torch.randn(64, 256, device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
        options = {"first_step": 1 / steps, "max_step": 1 / steps, "per_sample": per_sample}
        arguments = {"method": method, "rtol": 1.0, "atol": 1.0, "options": options}
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            odeint(lambda t, y: next(slope), y0, t, **arguments)
            torch.cuda.synchronize()
        return sum(event.count for event in trace.key_averages() if event.self_device_time_total)

    launches(4)
    # The rounding of 40 sizes may cost one step more.
    assert launches(40) - launches(20) <= 21 * 8
