"""The modulate family: the checks that every op passes, and what is its alone."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from flowkernels.ops import _library, gated_residual_norm, modulated_norm
from tests.checks import OpChecks
from tests.checks.cases import modulate
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"


class TestModulatedNorm(OpChecks):
    case = modulate.MODULATED_NORM


class TestGatedResidual(OpChecks):
    case = modulate.GATED_RESIDUAL


class TestGatedResidualNorm(OpChecks):
    case = modulate.GATED_RESIDUAL_NORM


@interpretable
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_norm_is_of_the_h_that_is_returned(norm: str):
    """In bfloat16 h is rounded before it is normalised: y is modulated_norm(h), bit for bit."""
    torch.manual_seed(0)
    residual, x = torch.randn(2, 2, 7, 333).bfloat16()
    gate, shift, scale = torch.randn(3, 2, 333).bfloat16()
    with flowkernels.backend(KERNELS):
        h, y = gated_residual_norm(residual, x, gate, shift, scale, norm=norm)
        assert torch.equal(y, modulated_norm(h, shift, scale, norm=norm))


@interpretable
def test_large_offset_does_not_cancel():
    """Statistics of a row far from zero: the variance is of the centred row, not E[x²] - E[x]²."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 512) + 3000
    with flowkernels.backend(KERNELS):
        y = modulated_norm(x)
    truth = torch.nn.functional.layer_norm(x.double(), (512,), eps=1e-6)
    # x itself holds values near 3000 to 1.2e-4.
    assert (y - truth).abs().max() < 2 * 3000 * torch.finfo(torch.float32).eps


@interpretable
def test_layer_norm_of_width_one():
    """Its output is the shift alone and its gradient zero, up to rounding times rstd = 1/√eps."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1, requires_grad=True)
    shift, scale, grad = torch.randn(2, 1), torch.randn(2, 1), torch.randn(2, 3, 1)
    with flowkernels.backend(KERNELS):
        y = modulated_norm(x, shift, scale)
        (found,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y, shift[:, None].expand(2, 3, 1))
    term = (grad * (1 + scale[:, None])).abs().max()
    assert found.abs().max() <= 2 * torch.finfo(torch.float32).eps * 1e3 * term
