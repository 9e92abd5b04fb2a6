"""The op test helper itself: broken ops do not pass it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.checks import OpCase, OpChecks, draw
from tests.checks.aot import Report, _read
from tests.checks.case import Setting, spread, strided
from tests.checks.compare import assert_close
from tests.checks.contexts import poisoned_memory


class Double(torch.autograd.Function):
    """A right op, y = 2x, with a hook for what is broken in each test."""

    forward_bug = staticmethod(lambda y, x: y)
    backward_bug = staticmethod(lambda grad, given: grad)

    @staticmethod
    def forward(ctx, x):
        return Double.forward_bug(2 * x, x)

    @staticmethod
    def backward(ctx, grad):
        return Double.backward_bug(2 * grad, grad)


CASE = OpCase(
    name="double",
    function=lambda x: Double.apply(x),
    reference=lambda x: 2 * x,
    make_inputs=lambda shape, dtype, device, variant: {"x": draw(shape, dtype, device)},
    differentiable=("x",),
    shapes=((2, 5, 17),),
)


@pytest.fixture
def checks(monkeypatch):
    """The checks of CASE; its yardstick is the formula, since no backend serves it."""
    made = OpChecks()
    made.case = CASE
    right = dataclasses.replace(CASE, function=CASE.reference)
    for module in ("values", "gradients"):
        original = __import__(f"tests.checks.{module}", fromlist=["yardstick_of"]).yardstick_of
        monkeypatch.setattr(
            f"tests.checks.{module}.yardstick_of",
            lambda case, *rest, original=original: original(right, *rest),
        )
    yield made
    Double.forward_bug = staticmethod(lambda y, x: y)
    Double.backward_bug = staticmethod(lambda grad, given: grad)


SETTING = Setting((2, 5, 17), "float32", "plain")


def test_a_right_op_passes(checks):
    checks.test_agrees_with_float64(SETTING)
    checks.test_strided_inputs("plain", "bfloat16")
    checks.test_every_element_is_written("plain")
    checks.test_nan_stays_in_its_place("plain")
    checks.test_any_grad_output("expanded", "plain")


def test_a_small_error_is_seen(checks):
    Double.forward_bug = staticmethod(lambda y, x: y * (1 + 3e-6))
    with pytest.raises(AssertionError, match=r"output 0: .* from the truth"):
        checks.test_agrees_with_float64(SETTING)


def test_a_wrong_gradient_is_seen(checks):
    Double.backward_bug = staticmethod(lambda grad, given: grad + 1e-4 * (grad > 3))
    with pytest.raises(AssertionError, match="gradient of x"):
        checks.test_agrees_with_float64(SETTING)


def test_an_unwritten_element_is_seen(checks):
    def forget(y, x):
        out = torch.empty(y.shape, dtype=y.dtype)
        out[:, :-1] = y[:, :-1]
        return out

    Double.forward_bug = staticmethod(forget)
    with pytest.raises(AssertionError, match="holds memory that nobody wrote"):
        checks.test_every_element_is_written("plain")


def test_a_spreading_nan_is_seen(checks):
    Double.forward_bug = staticmethod(lambda y, x: y + 0 * x.sum())
    with pytest.raises(AssertionError, match="NaN not exactly where"):
        checks.test_nan_stays_in_its_place("plain")


def test_a_swallowed_nan_is_seen(checks):
    Double.forward_bug = staticmethod(lambda y, x: y.nan_to_num())
    with pytest.raises(AssertionError, match="NaN not exactly where"):
        checks.test_nan_stays_in_its_place("plain")


def test_an_op_that_ignores_strides_is_seen(checks):
    def as_if_contiguous(y, x):
        return 2 * torch.as_strided(x, x.shape, torch.empty(x.shape).stride())

    Double.forward_bug = staticmethod(as_if_contiguous)
    with pytest.raises(AssertionError, match="output 0"):
        checks.test_strided_inputs("plain", "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_memory_is_poisoned(dtype: torch.dtype):
    with poisoned_memory():
        assert torch.empty(64, dtype=dtype).isnan().any()
        assert torch.zeros(2, dtype=dtype).new_empty(64).isnan().any()


def test_one_rounding_more_than_pytorch_is_allowed_and_no_magic_number():
    truth = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    yardstick = truth.bfloat16()
    assert_close("y", yardstick, yardstick, truth)
    with pytest.raises(AssertionError):
        assert_close("y", (truth + 0.02).bfloat16(), yardstick, truth)


def test_views_are_views():
    x = torch.randn(3, 4, 5)
    assert torch.equal(strided(x), x)
    assert strided(x).stride() == (80, 16, 1)
    assert spread(x).stride(-1) == 2


def test_the_log_of_ptxas_is_read():
    log = (
        "ptxas info : Function properties for k\n"
        "    40 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info : Used 48 registers, used 1 barriers\n"
    )
    ptx = "ld.global.v4.b32 {a}; ld.global.L1::evict_last.b16 x; cp.async.cg.shared.global y;"
    report = _read(log, ptx, 512)
    assert report == Report(48, 16, 8, 512, 1, 128, tma_loads=0, wgmma=0, tf32_products=0)
