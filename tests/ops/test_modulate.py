"""The modulate family: the checks that every op passes, and what is its alone."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from flowkernels.ops import (
    _library,
    gated_residual,
    gated_residual_norm,
    gelu_tanh,
    modulated_norm,
    swiglu,
)
from tests.checks import OpChecks
from tests.checks.cases import modulate
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"


class ModulateChecks(OpChecks):
    @interpretable
    @pytest.mark.parametrize("width", [4099, 16389])
    def test_rows_wider_than_the_registers(self, width: int):
        """On a GPU such a row is cut into tiles, its sums taken by a kernel of their own."""
        for variant in self.case.variants[:3]:
            self.agrees(self.inputs(shape=(1, 3, width), dtypes="mixed_bf16_fp32", variant=variant))


class TestModulatedNorm(ModulateChecks):
    case = modulate.MODULATED_NORM


class TestGatedResidual(ModulateChecks):
    case = modulate.GATED_RESIDUAL


class TestGatedResidualNorm(ModulateChecks):
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


@pytest.mark.parametrize("width", [7, 33, 64, 100, 1536])
@pytest.mark.parametrize("values", ["normal", "subnormal", "wide", "not finite"])
def test_rounding_is_the_same_on_every_path(width: int, values: str):
    """bfloat16 throughout has loops of its own; with a float32 shift the portable ones run.

    Their sums are taken in other orders: y may lie on the other side of a tie by that much.
    """
    if _library.why_off("modulated_norm", "native", "cpu") is not None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    factor = {"subnormal": 1e-39, "wide": torch.exp(8 * torch.randn(5, width))}.get(values, 1.0)
    x, branch = (torch.randn(2, 3, 5, width) * factor).bfloat16()
    shift, gate = (torch.randn(2, 3, width) * (1e-39 if values == "subnormal" else 1)).bfloat16()
    if values == "not finite":
        x[0, 0, 0], x[1, 1, -1] = float("nan"), float("inf")
    with flowkernels.backend("native"):
        for norm in ("layer", "rms"):
            y = modulated_norm(x, shift, norm=norm)
            portable = modulated_norm(x, shift.float(), norm=norm)
            assert_rounded(y, portable)
            h, y = gated_residual_norm(x, branch, gate, shift, norm=norm)
            portable_h, portable = gated_residual_norm(x, branch, gate, shift.float(), norm=norm)
            assert torch.equal(bits(h), bits(portable_h))
            assert_rounded(y, portable)


def assert_rounded(y: torch.Tensor, exact: torch.Tensor) -> None:
    """y is what exact rounds to, give or take exact's own error; NaNs have one bit pattern."""
    slack = 2e-6 * (1 + exact.abs())
    number = ~exact.isnan()
    assert torch.equal(bits(y)[~number], bits(exact.bfloat16())[~number])
    assert (y >= (exact - slack).bfloat16())[number].all()
    assert (y <= (exact + slack).bfloat16())[number].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1536, 1552, 1545])
def test_results_that_pass_by_the_caches(dtype: torch.dtype, width: int):
    """Large ones are written otherwise: rows of whole cache lines, with a rest, unaligned."""
    if _library.why_off("modulated_norm", "native", "cpu") is not None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    rows = (16 << 20) // (width * dtype.itemsize) + 2
    x, branch, grad = torch.randn(3, 1, rows, width).to(dtype)
    gate, shift, scale = torch.randn(3, 1, width).to(dtype)

    def run(name: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        with flowkernels.backend(name):
            leaves = [each.detach().requires_grad_() for each in inputs]
            h, y = gated_residual_norm(leaves[0], leaves[1], gate, shift, scale)
            alone = modulated_norm(leaves[0], shift, scale)
            found = torch.autograd.grad((h, y, alone), leaves, (grad, grad, grad))
            return [h, y, alone, *found, gated_residual(*leaves, gate)]

    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, expected in zip(run("native", x, branch), run("reference", x, branch), strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 96, 1536, 16384])
def test_a_row_whose_first_elements_are_far_from_the_rest(dtype: torch.dtype, width: int):
    """The variance may be taken about them: it must not be lost in their distance."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, width)
    x[:, :, :32] += 1000
    x[1] += 300
    x[1, 0], x[1, 0, :64] = 1.2347, 0.0  # the rest alike: every sum of it rounds the same way
    x = x.to(dtype)
    with flowkernels.backend(KERNELS):
        y = modulated_norm(x)
    exact = torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-6)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def bits(x: torch.Tensor) -> torch.Tensor:
    """All NaN alike: torch's cast makes others than the kernels."""
    return x.view(torch.int16).masked_fill(x.isnan(), 0x7FC0)


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


def _block(x, c, weight, bias):
    """The op chain of a DiT block between matrix products, modulation as chunks of one product."""
    shift, scale, gate, shift_2, scale_2, gate_2 = torch.nn.functional.silu(c).chunk(6, dim=-1)
    y = modulated_norm(x, shift, scale) @ weight
    h, y = gated_residual_norm(x, gelu_tanh(y, bias), gate, shift_2, scale_2)
    return gated_residual(h, swiglu(torch.cat([y, y * 2], dim=-1)), gate_2)


def test_inductor_compiles_the_chain():
    """The default compiler: fused neighbours, views as it lays them out, forward and backward."""

    def run(function, batch, tokens):
        torch.manual_seed(batch)
        shapes = ((batch, tokens, 24), (batch, 6 * 24), (24, 24), (24,))
        operands = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out = function(*operands)
        return [out, *torch.autograd.grad(out.square().sum(), operands)]

    torch._dynamo.reset()
    compiled = torch.compile(_block, fullgraph=True, dynamic=True)
    for sizes in ((2, 5), (3, 4)):
        for ours, eager in zip(run(compiled, *sizes), run(_block, *sizes), strict=True):
            # The same kernels; PyTorch's own neighbours may round in another order.
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5 * eager.abs().max().item())
