"""euler_step and rk_combine: the checks that every op passes; euler_step's `out` and `dt`."""

from __future__ import annotations

import re

import pytest
import torch

import flowkernels
from flowkernels.ode import euler_step
from flowkernels.ops import _library
from flowkernels.ops.step._euler import guided_euler_step
from tests.checks import OpChecks
from tests.checks.cases import step as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
# The interpreter's process is there for the kernels: the reference has been checked beside C++.
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)


class TestEulerStep(OpChecks):
    case = cases.EULER_STEP


class TestRkCombine(OpChecks):
    case = cases.RK_COMBINE

    @pytest.mark.unforced
    def test_names_the_argument_that_is_no_float_tensor(self, name: str):
        """Stages are named by their place."""
        inputs = self.inputs(variant="scalar")
        argument = f"ks[{name[1:]}]" if name.startswith("k") else name
        for wrong, got in (([1.0, 2.0], "list"), (inputs[name].to(torch.int64), "int64")):
            with pytest.raises(TypeError, match=rf"^{re.escape(argument)}: got .*{got}.*need"):
                self.case.function(**{**inputs, name: wrong})


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return torch.randn(3, 4, 700).unbind(1)  # each a view with a stride of its own


@interpretable
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_x_or_a_part_of_a_larger_tensor(backend, dtype, operands):
    x, v, v_uncond, _ = (operand.to(dtype) for operand in operands)
    dt = torch.tensor([-0.1, -0.2, -0.3])
    with flowkernels.backend(backend):
        expected = euler_step(x, v, dt, v_uncond=v_uncond, guidance=2.0)
        larger = torch.zeros(3, 2, 700, dtype=dtype)
        found = euler_step(x, v, dt, v_uncond=v_uncond, guidance=2.0, out=larger[:, 1])
        assert torch.equal(larger[:, 1], expected)
        assert torch.equal(larger[:, 0], torch.zeros(3, 700, dtype=dtype))
        assert found.data_ptr() == larger[:, 1].data_ptr()
        mine = x.clone()
        assert euler_step(mine, v, dt, v_uncond=v_uncond, guidance=2.0, out=mine) is mine
        assert torch.equal(mine, expected)


@interpretable
@BACKENDS
def test_out_is_allowed_where_gradients_are_switched_off(backend, operands):
    x, v, _, _ = operands
    out, v = torch.empty(3, 700), v.clone().requires_grad_()
    with flowkernels.backend(backend), torch.no_grad():
        euler_step(x, v, -0.5, out=out)
    torch.testing.assert_close(out, x - 0.5 * v.detach())


@interpretable
@BACKENDS
def test_dt_as_number_scalar_or_vector(backend, operands):
    x, v, _, _ = operands
    with flowkernels.backend(backend):
        expected = euler_step(x, v, -0.25)
        for dt in (
            torch.tensor(-0.25),
            torch.tensor(-0.25, dtype=torch.float64),
            torch.full((3,), -0.25, dtype=torch.bfloat16),
            torch.tensor(-0.25).expand(3),
        ):
            found = euler_step(x, v, dt)
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)
        assert torch.equal(euler_step(x, v, 0), x)


@interpretable
@BACKENDS
def test_guidance_of_zero_and_one(backend, operands):
    """0 is the step without conditions, 1 the conditional one; alone, guidance does nothing."""
    x, v, v_uncond, _ = operands
    with flowkernels.backend(backend):
        without = euler_step(x, v, -0.5, v_uncond=v_uncond, guidance=0.0)
        conditional = euler_step(x, v, -0.5, v_uncond=v_uncond)
        torch.testing.assert_close(without, euler_step(x, v_uncond, -0.5))
        torch.testing.assert_close(conditional, euler_step(x, v, -0.5))
        assert torch.equal(euler_step(x, v, -0.5, guidance=3.0), euler_step(x, v, -0.5))


@interpretable
@BACKENDS
def test_dt_may_ask_for_a_gradient(backend, operands):
    x, v, v_uncond, _ = operands
    dt = torch.tensor([-0.1, -0.2, -0.3], requires_grad=True)
    with flowkernels.backend(backend):
        euler_step(x, v, dt, v_uncond=v_uncond, guidance=2.0).sum().backward()
    torch.testing.assert_close(dt.grad, (2 * v - v_uncond).sum(1), rtol=1e-5, atol=1e-4)


@interpretable
@BACKENDS
def test_the_next_batch_is_contiguous_whatever_the_velocity_is(backend):
    """Overlapping windows of one row: each half is contiguous, the two together are not."""
    x, v = torch.arange(8.0)[None], torch.arange(9.0).as_strided((2, 8), (1, 1))
    with flowkernels.backend(backend):
        found, twice = guided_euler_step(x, v, -0.5, 3.0, None)
    expected = x - 0.5 * (v[1:] + 3.0 * (v[:1] - v[1:]))
    torch.testing.assert_close(found, expected)
    assert torch.equal(twice, torch.cat([found, found]))
    assert twice.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1 << 20, (1 << 20) + 7])
def test_results_that_pass_by_the_caches(dtype: torch.dtype, elements: int):
    """Large ones are written otherwise: rows of whole cache lines, with a rest, unaligned."""
    if _library.why_off("euler_step", "native", "cpu") is not None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    x, v, uncond = torch.randn(3, 13, elements // (dtype.itemsize // 2)).to(dtype)
    dt = torch.linspace(-0.5, -0.1, 13)
    found = {}
    for name in ("native", "reference"):
        with flowkernels.backend(name):
            found[name] = euler_step(x, v, dt, v_uncond=uncond, guidance=3.5)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found["native"], found["reference"], rtol=tolerance, atol=tolerance)
