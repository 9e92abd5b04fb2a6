"""gelu_tanh and swiglu: the checks that every op passes, and what is theirs alone."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from flowkernels.ops import _library, gelu_tanh, swiglu
from tests.checks import OpChecks
from tests.checks.cases import activation

NATIVE = pytest.mark.skipif(
    _library.why_off("gelu_tanh", "native", "cpu") is not None, reason="needs the native library"
)
SIZES = (0.0, 1e-40, 1e-6, 0.1, 1, 5, 9, 10, 13, 20, 50, 87, 90, 110, 1e3, 1e10, 1e20, 1e30, 3e38)


class TestGeluTanh(OpChecks):
    case = activation.GELU_TANH


class TestSwiGLU(OpChecks):
    case = activation.SWIGLU


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_any_size(dtype: torch.dtype):
    """Where exp overflows or vanishes, g a too; rows longer than the registers, with a rest."""
    x = torch.tensor([sign * size for size in SIZES for sign in (1, -1)]).repeat(3, 1).to(dtype)
    other = torch.full_like(x, 0.75)
    for op, operands in ((gelu_tanh, (x,)), (swiglu, (torch.cat([x, other], -1),))):
        found = {}
        for name in ("native", "reference"):
            with flowkernels.backend(name):
                wide = torch.float64 if name == "reference" else dtype
                leaf = operands[0].to(wide).requires_grad_()
                y = op(leaf)
                found[name] = [y, *torch.autograd.grad(y, leaf, torch.full_like(y, 8.0))]
        for mine, truth in zip(found["native"], found["reference"], strict=True):
            tolerance = 2e-5 if dtype == torch.float32 else 1e-2
            # float64 has 0 times infinity where 1e300 is met; 8 times 3e38 is infinite in ours.
            truth = truth.masked_fill(truth.isnan(), 0.0).to(dtype)
            torch.testing.assert_close(mine, truth, rtol=tolerance, atol=1e-6)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite(dtype: torch.dtype):
    """As PyTorch has it, in the registers' part of a row and in the rest."""
    x = torch.randn(2, 45).to(dtype)
    x[:, 3::40], x[0, 7::30], x[1, 7::30] = float("nan"), float("inf"), float("-inf")
    with flowkernels.backend("native"):
        y = gelu_tanh(x)
    expected = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@NATIVE
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), -85.0, 3e38, -3e38])
def test_a_value_has_one_gradient_wherever_it_stands(value: float):
    x = torch.cat([torch.full((45,), value), torch.full((45,), 2.0)]).requires_grad_()
    with flowkernels.backend("native"):
        (found,) = torch.autograd.grad(swiglu(x), x, torch.full((45,), 10.0))
    for half in found.chunk(2):
        torch.testing.assert_close(half, half[:1].expand(45), rtol=1e-5, atol=0, equal_nan=True)
