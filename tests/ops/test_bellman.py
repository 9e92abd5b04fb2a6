"""bellman_step: the checks that every op passes, and writing into memory that is there."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from flowkernels.ode import euler_step
from flowkernels.ops import _library
from flowkernels.ops.bellman import bellman_step
from tests.checks import OpChecks
from tests.checks.cases import bellman as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)


class TestBellmanStep(OpChecks):
    case = cases.BELLMAN_STEP


@interpretable
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_writes_a_row_of_a_larger_buffer_and_the_velocity_in_place(backend, dtype):
    """As the accumulator calls it: rows of increments are strided, the last velocity is both read
    and written, the state may be its own successor.
    """
    torch.manual_seed(0)
    x, v, v_uncond = torch.randn(3, 3, 5, 140).to(dtype).unbind(1)
    previous = torch.randn(3, 5, 140)
    with flowkernels.backend(backend):
        expected = bellman_step(x, v, -0.25, previous, v_uncond=v_uncond, guidance=2.0)
        rows = torch.zeros(3, 4, 700)
        state, velocity = x.clone(), previous.clone()
        out = (state, velocity, rows[:, 2].view(3, 5, 140))
        found = bellman_step(state, v, -0.25, velocity, v_uncond=v_uncond, guidance=2.0, out=out)
    assert found[0] is state
    assert torch.equal(state, expected[0])
    assert torch.equal(velocity, expected[1])
    assert torch.equal(rows[:, 2].view(3, 5, 140), expected[2])
    assert not rows[:, [0, 1, 3]].any()


@interpretable
@BACKENDS
def test_is_an_euler_step(backend):
    torch.manual_seed(0)
    x, v, v_uncond = torch.randn(3, 2, 333)
    with flowkernels.backend(backend):
        x_next, velocity, increment = bellman_step(x, v, -0.1, v_uncond=v_uncond, guidance=3.0)
        # Both round v_uncond + 3 (v - v_uncond) once or twice: fused multiply-adds differ.
        torch.testing.assert_close(x_next, euler_step(x, v, -0.1, v_uncond=v_uncond, guidance=3.0))
        assert increment is None
        assert torch.equal(bellman_step(x, v, -0.1, velocity)[2], v - velocity)


@interpretable
@BACKENDS
def test_a_velocity_that_stays_has_no_increment(backend):
    """Exactly none, so that straight flows cost nothing."""
    v, v_uncond = torch.randn(2, 2, 700)
    with flowkernels.backend(backend):
        _, velocity, _ = bellman_step(v, v, -0.1, v_uncond=v_uncond, guidance=4.5)
        increment = bellman_step(v, v, -0.1, velocity, v_uncond=v_uncond, guidance=4.5)[2]
    assert not increment.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1 << 20, (1 << 20) + 7])
def test_results_that_pass_by_the_caches(dtype: torch.dtype, elements: int):
    """Large ones are written otherwise: rows of whole cache lines, with a rest, unaligned."""
    if _library.why_off("bellman_step", "native", "cpu") is not None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    x, v, v_uncond = torch.randn(3, 13, elements // (dtype.itemsize // 2)).to(dtype)
    previous = torch.randn(x.shape)
    found = {}
    for name in ("native", "reference"):
        with flowkernels.backend(name):
            found[name] = bellman_step(x, v, -0.25, previous, v_uncond=v_uncond, guidance=3.5)
    # Fused multiply-adds differ by a rounding of terms up to 3.5 times the operands; a bfloat16
    # result by one of its own, 2^-8.
    state = {torch.float32: 4e-6, torch.bfloat16: 1e-2}[dtype]
    for mine, true, tolerance in zip(*found.values(), (state, 4e-6, 4e-6), strict=True):
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)
