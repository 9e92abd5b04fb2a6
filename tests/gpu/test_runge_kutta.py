"""rk_combine and rk_error on a GPU: every dtype, alignment and grid, graphs, no host sync."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from flowkernels.ode import rk_combine, rk_error
from flowkernels.ops import _native
from flowkernels.ops.step import direct
from tests.checks.compare import assert_close
from tests.gpu import DEVICE, DRY, needs_cuda
from tests.optim.helpers import NoHostSync

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One element, odd ones, a chunk of 2048 and a little, samples of many chunks, and more samples than
# a grid is high.
SHAPES = [(), (1,), (3, 85), (2, 2049), (0, 4), (4, 0)]
if not DRY:
    SHAPES += [(4, 3, 3001), (3, 300007), (70001, 3)]


def tensors(shape, dtype, count, device=DEVICE):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).to(device) for _ in range(count)]


def unaligned(x):
    """The same values one element past an aligned address."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].view(x.shape).copy_(x)


def sliced(x):
    """The same values as a column of a larger buffer: samples at a stride of their own."""
    if x.dim() < 2 or x.numel() == 0:
        return x
    return torch.stack([torch.full_like(x, float("nan")), x], 1)[:, 1]


LAYOUTS = {"plain": lambda x: x, "unaligned": unaligned, "sliced": sliced}


def steps(shape):
    yield -0.25
    yield torch.tensor(0.125, dtype=torch.float64, device=DEVICE)
    if shape:
        yield torch.linspace(0.1, 0.9, shape[0], device=DEVICE)


def check(name, ours, truth, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, equal_nan=True)
    else:
        assert_close(name, ours.cpu(), theirs.cpu(), truth.cpu())


@needs_cuda
def test_the_native_backend_serves():
    assert _native.OFF["cuda"] is None, _native.OFF["cuda"]
    assert direct.serves(torch.ones(3, device=DEVICE), 64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype, layout):
    for count in (1, 4, 7, 14):
        y0, y1, *ks = (LAYOUTS[layout](x) for x in tensors(shape, dtype, count + 2))
        weights = torch.linspace(-1, 1, count).tolist()
        on_device = torch.tensor(weights, device=DEVICE)
        for dt in steps(shape):
            found = {}
            for name in ("reference", "native"):
                with flowkernels.backend(name):
                    found[name] = (
                        rk_combine(y0, ks, weights, dt),
                        *rk_error(ks, weights, dt, y0, y1, 1e-2, 1e-3),
                    )
                    found[f"{name}, weights on the device"] = (
                        rk_combine(y0, torch.stack(ks), on_device, dt),
                        *rk_error(torch.stack(ks), on_device, dt, y0, y1, 1e-2, 1e-3),
                    )
            doubles = [x.double() for x in (y0, y1, *ks)]
            with flowkernels.backend("reference"):
                truth = (
                    rk_combine(doubles[0], doubles[2:], weights, dt),
                    *rk_error(doubles[2:], weights, dt, *doubles[:2], 1e-2, 1e-3),
                )
            for suffix in ("", ", weights on the device"):
                pairs = zip(found["native" + suffix], found["reference" + suffix], strict=True)
                for name, (ours, theirs), exact in zip("ven", pairs, truth, strict=True):
                    check(name + suffix, ours, exact, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerances_by_element(dtype):
    y0, y1, *ks = tensors((3, 5001), dtype, 5)
    rtol = torch.rand(3, 5001, dtype=dtype).to(DEVICE) + 0.1
    for dt in steps((3, 5001)):
        arguments = (ks, [0.5, -1.0, 2.0], dt, y0, y1, rtol, rtol.flip(0))
        with flowkernels.backend("reference"):
            _, expected = rk_error(*arguments)
        with flowkernels.backend("native"):
            _, norm = rk_error(*arguments)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)


def test_mixed_dtypes_and_out():
    y, *ks = tensors((3, 5001), torch.float32, 4)
    y, ks[0], ks[1] = y.bfloat16(), ks[0].half(), ks[1].bfloat16()
    found = rk_combine(y, ks, [0.5, 1.0, -1.0], 0.1)
    doubles = [k.double() for k in ks]
    expected = y.double() + 0.1 * (0.5 * doubles[0] + doubles[1] - doubles[2])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    rk_combine(y, ks, [0.5, 1.0, -1.0], 0.1, out=ks[2])
    assert torch.equal(ks[2], found)


def test_repeats_bitwise():
    y0, y1, *ks = tensors((3, 300007), torch.float32, 9)
    weights = torch.linspace(-1, 1, 7).tolist()
    for dt in steps((3, 300007)):
        first, *others = (rk_error(ks, weights, dt, y0, y1, 1e-3, 1e-3) for _ in range(5))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_no_host_sync():
    y0, y1, *ks = tensors((3, 5001), torch.float32, 5)
    dt = torch.full((3,), 0.1, device=DEVICE)
    with NoHostSync(DEVICE):
        rk_combine(y0, ks, [0.5, -1.0, 2.0], dt)
        rk_error(ks, [0.5, -1.0, 2.0], dt, y0, y1, 1e-3, 1e-3)
        rk_combine(y0, ks, [0.5, -1.0, 2.0], torch.tensor(0.1))  # a number of the host's


@needs_cuda
def test_a_captured_step_reads_a_new_dt():
    y0, y1, *ks = tensors((3, 5001), torch.float32, 5)
    dt = torch.full((), 0.1, device=DEVICE)
    weights = [0.5, -1.0, 2.0]

    def step():
        return rk_combine(y0, ks, weights, dt), *rk_error(ks, weights, dt, y0, y1, 1e-3, 1e-3)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    dt.fill_(0.7)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@needs_cuda
def test_more_elements_than_an_int_counts():
    count = 2**31 + 4096
    y = torch.zeros(count, dtype=torch.float16, device=DEVICE)
    k = torch.zeros_like(y)
    k[-1] = 1.0
    found = rk_combine(y, [k], [1.0], 2.0)
    assert found[-1] == 2
    assert found[count - 2**31] == 0
    _, norm = rk_error([k], [1.0], 2.0, y, y, 0.0, 1.0)
    torch.testing.assert_close(norm.cpu(), torch.tensor((4 / count) ** 0.5))
