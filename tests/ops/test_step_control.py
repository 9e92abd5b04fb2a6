"""rk_control and rk_begin: the kernels give what plain PyTorch gives, at every edge of a solve."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step import reference
from flowkernels.ops.step.reference import (
    ACCEPTED,
    FLAGS,
    MOVING,
    RATIO,
    SIZE,
    STEP,
    STUCK,
    Limits,
    plan_step,
)
from tests.checks.contexts import poisoned_memory, threads

Tensor = torch.Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NODES = [1 / 5, 3 / 10, 1.0]
WEIGHTS = [0.1, 0.0, 0.2, -0.3]
LIMITS = Limits(5.0, 0.9, 10.0, 0.2, 1e-3, 1.0, 1.0, 1.0)
# A number, samples of one chunk, of several.
SHAPES = ((), (3, 7), (2, 1025), (3, 20011))


def _operands(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(6)]


def _plan(shape: tuple[int, ...], dtype: torch.dtype, per_sample: bool, limits: Limits) -> Tensor:
    columns = shape[:1] if per_sample else ()
    t = torch.linspace(0.1, 1.1, math.prod(columns), dtype=torch.float64).reshape(columns)
    size = torch.full_like(t, 0.25)
    return plan_step(t, size, NODES, limits, reference.norm_dtype(dtype))[0]


def _control(operands: list[Tensor], plan: Tensor, limits: Limits, tolerance: float) -> Any:
    y0, y1, *ks = operands
    tickets = torch.zeros(plan.shape[1:], dtype=torch.int32)
    found = operators.rk_control.default(
        ks, WEIGHTS, plan[STEP], plan, y0, y1, tolerance, tolerance, NODES, list(limits), tickets
    )
    assert not tickets.any()
    expected = reference.rk_control(ks, WEIGHTS, plan, y0, y1, tolerance, tolerance, NODES, limits)
    return found, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_control_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype, sign: float) -> None:
    limits = LIMITS._replace(sign=sign)
    for per_sample in (False, True) if shape else (False,):
        plan = _plan(shape, dtype, per_sample, limits)
        for tolerance in (1.0, 0.1, 1e-3):
            found, expected = _control(_operands(shape, dtype), plan, limits, tolerance)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(found[2], expected[2])
            assert torch.equal(found[0][FLAGS], expected[0][FLAGS])
            assert torch.equal(found[1][FLAGS], expected[1][FLAGS])
            # The sums of a norm run in another order: sizes and times follow it.
            limit = 1e-13 if dtype == torch.float64 else 1e-5
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=limit, atol=0)


@pytest.mark.parametrize(
    ("case", "ratio"), [("zero", 0.0), ("nan", math.nan), ("infinite", math.inf)]
)
def test_ratios_at_the_edges(case: str, ratio: float) -> None:
    """No error at all: dt grows most. A NaN: the least step. An infinity: dt shrinks most."""
    y0, y1, *ks = _operands((2, 8), torch.float64)
    if case == "zero":
        ks = [torch.zeros_like(y0)] * 4
    else:
        ks[0] = torch.full_like(y0, ratio)
    plan = _plan((2, 8), torch.float64, False, LIMITS)
    found, expected = _control([y0, y1, *ks], plan, LIMITS, 0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found[2].item() == (case == "zero")
    size = {"zero": 1.0, "nan": LIMITS.min_step, "infinite": 0.25 * LIMITS.dfactor}[case]
    assert found[1][SIZE].item() == pytest.approx(size)
    assert found[0][RATIO].item() == ratio or case == "nan"


def test_the_least_step_is_accepted_whatever_its_error() -> None:
    limits = LIMITS._replace(min_step=0.25)
    plan = _plan((2, 8), torch.float64, False, limits)
    (record, following, accepted, _), expected = _control(
        _operands((2, 8), torch.float64), plan, limits, 1e-9
    )
    assert accepted
    assert record[FLAGS] == ACCEPTED + MOVING
    assert record[RATIO] > 1
    torch.testing.assert_close(following, expected[1], rtol=1e-13, atol=0)


def test_what_is_done_stands_still_and_what_is_stuck_says_so() -> None:
    t = torch.tensor([0.5, 1.0, 2.0, 0.5], dtype=torch.float64)
    size = torch.tensor([0.25, 0.25, 0.25, 1e-17], dtype=torch.float64)
    limits = LIMITS._replace(min_step=0.0)
    plan, times = plan_step(t, size, NODES, limits, torch.float32)
    assert plan[FLAGS].tolist() == [MOVING, 0, 0, MOVING + STUCK]
    assert plan[STEP].tolist() == [0.25, 0.0, 0.0, 1e-17]
    # The stages of a sample that stands still look where it stands, the last one just before.
    assert times[0].tolist() == pytest.approx([0.55, 1.0, 2.0, 0.5])
    assert times[2, 1] == torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    found, expected = _control(_operands((4, 5), torch.float32), plan, limits, 10.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found[2].tolist() == [True, False, False, True]
    assert found[1][0].tolist() == [0.75, 1.0, 2.0, 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_begin_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    operands = _operands(shape, dtype)[:4]
    choices = [(torch.tensor(True), torch.tensor(0.25)), (torch.tensor(False), torch.tensor(-0.1))]
    if shape:
        choices.append((torch.arange(shape[0]) % 2 == 0, torch.linspace(-0.5, 0.5, shape[0])))
    for accepted, dt in choices:
        arguments = (*operands, accepted, dt.double(), 0.2)
        found, expected = operators.rk_begin.default(*arguments), reference.rk_begin(*arguments)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        limit = {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 1e-2)  # a rounding
        torch.testing.assert_close(found[2], expected[2], rtol=limit, atol=limit)


def test_bits_do_not_depend_on_threads() -> None:
    operands = _operands((3, 70001), torch.float32)
    plan = _plan((3, 70001), torch.float32, True, LIMITS)
    found = []
    for count in (1, 2, 3):
        with threads(count), poisoned_memory():
            found.append(_control(operands, plan, LIMITS, 0.1)[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(per_sample: bool) -> None:
    y0, y1, *ks = _operands((3, 7), torch.float32)
    plan = _plan((3, 7), torch.float32, per_sample, LIMITS)
    tickets = torch.zeros(plan.shape[1:], dtype=torch.int32)
    arguments = (y0, y1, 0.1, 0.1, NODES, list(LIMITS), tickets)
    torch.library.opcheck(
        operators.rk_control.default, (ks, WEIGHTS, plan[STEP].clone(), plan, *arguments)
    )
    accepted = torch.ones(plan.shape[1:], dtype=torch.bool)
    torch.library.opcheck(
        operators.rk_begin.default, (y0, y1, ks[0], ks[1], accepted, plan[STEP].clone(), 0.2)
    )


def test_operators_refuse_what_would_be_read_out_of_bounds() -> None:
    y0, y1, *ks = _operands((3, 7), torch.float32)
    plan = _plan((3, 7), torch.float32, True, LIMITS)
    tickets = torch.zeros(3, dtype=torch.int32)

    def control(**change: Any) -> Any:
        given = {
            "ks": ks, "weights": WEIGHTS, "dt": plan[STEP], "plan": plan, "y0": y0, "y1": y1,
            "rtol": 0.1, "atol": 0.1, "nodes": NODES, "limits": list(LIMITS), "tickets": tickets,
            **change,
        }  # fmt: skip
        return operators.rk_control.default(*given.values())

    for change, message in (
        ({"plan": plan[:5]}, "plan: need float64"),
        ({"plan": plan.float()}, "plan: need float64"),
        ({"plan": plan[:, :2].contiguous()}, "plan: need a column"),
        ({"dt": plan[STEP, 0]}, "dt: need the plan's row"),
        ({"limits": [1.0]}, "limits: need 8"),
        ({"nodes": [0.5] * 65}, "nodes: more than"),
        ({"y1": y1[:2]}, "y1: need the shape"),
        ({"ks": [k.double() for k in ks]}, "ks: need"),
    ):
        with pytest.raises(RuntimeError, match=message):
            control(**change)
    yes, dt = torch.ones(3, dtype=torch.bool), plan[STEP]
    for arguments, message in (
        ((y0, y1.t(), ks[0], ks[1], yes, dt), "operands: need"),
        ((y0, y1.double(), ks[0], ks[1], yes, dt), "operands: need"),
        ((y0, y1, ks[0], ks[1], yes[:2], dt), "accepted: need"),
        ((y0, y1, ks[0], ks[1], yes, dt.float()), "dt: need"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.rk_begin.default(*arguments, 0.2)
