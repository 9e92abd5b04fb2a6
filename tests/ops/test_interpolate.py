"""interpolate: the checks that every op passes, and its counter-based noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flowkernels
from flowkernels.losses import interpolate
from flowkernels.ops import _library
from flowkernels.ops.interpolate import philox
from tests.checks import OpChecks
from tests.checks.cases import interpolate as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
# The interpreter's process is there for the kernels: the reference has been checked beside C++.
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)
# Tensors are this long where the interpreter runs a program at a time.
MANY = 20_001 if _library.INTERPRETED else 2_000_003


class TestInterpolate(OpChecks):
    case = cases.INTERPOLATE


def noise_of(shape, seed, offset=0, dtype=torch.float32):
    x0 = torch.zeros(shape, dtype=dtype)
    return interpolate(x0, torch.ones(shape[0]), seed=seed, offset=offset)[1]


# The known answers that the Random123 distribution publishes for philox4x32-10 (kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _signed(low, high):
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@interpretable
@BACKENDS
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(backend, counter, key, words):
    groups = torch.tensor([_signed(*counter[:2])])
    with flowkernels.backend(backend):
        found = philox(groups, _signed(*key), torch.tensor(_signed(*counter[2:])))
    assert tuple(found[0].tolist()) == words


@interpretable
@BACKENDS
def test_philox_words_are_those_of_the_definition(backend):
    """Bits equal for many groups, past 2³² of them, and for seeds and offsets of 64 bits."""
    groups = torch.cat([torch.arange(1000), torch.arange(2**32 - 500, 2**32 + 500)])
    for seed, offset in ((3, 0), (2**63 + 2**31 + 1, 2**40 + 7), (2**64 - 1, 2**32 - 1)):
        with flowkernels.backend(backend):
            found = philox(groups, seed, offset)
        expected = cases.philox_words(groups.numpy().astype(np.uint64), seed, offset)
        assert np.array_equal(found.numpy().astype(np.uint64), expected)


@interpretable
@BACKENDS
def test_normals_are_within_2e_6_of_the_definition(backend):
    with flowkernels.backend(backend):
        noise = noise_of((1, MANY), seed=20, offset=4)
    # The bound of the interface. Rounding a normal near 6 to float32 takes 2.4e-7 of it.
    assert (noise[0].double() - cases.normals(MANY, 20, 4)).abs().max() < 2e-6


@interpretable
@BACKENDS
def test_noise_depends_on_the_element_alone(backend):
    """Bitwise: not on the shape, the tile, the layout of x0, the dtype, nor on what follows."""
    count = 3 * 4 * 11 * 15
    with flowkernels.backend(backend):
        flat = noise_of((1, count), seed=1)
        for shape in ((count,), (3, 4, 11, 15), (4, 3 * 11 * 15), (count // 2, 2), (12, 165)):
            assert torch.equal(noise_of(shape, seed=1).reshape(1, -1), flat), shape
        assert torch.equal(noise_of((1, count + 4097), seed=1)[:, :count], flat)
        for dtype in (torch.bfloat16, torch.float16):
            noise = noise_of((3, count // 3), seed=1, dtype=dtype)
            assert torch.equal(noise.reshape(1, -1), flat.to(dtype)), dtype
        transposed = torch.zeros(3, 15, 44).transpose(1, 2)
        noise = interpolate(transposed, torch.ones(3), seed=1)[1]
        # The reference path serves a transposed sample; across backends the bound is 2e-6.
        assert (noise.reshape(1, -1) - flat).abs().max() < 2e-6


@interpretable
@BACKENDS
def test_seed_as_a_tensor_or_as_another_integer_of_the_same_bits(backend):
    with flowkernels.backend(backend):
        noise = noise_of((2, 9), seed=-1, offset=2**64 - 3)
        assert torch.equal(noise, noise_of((2, 9), seed=2**64 - 1, offset=-3))
        assert torch.equal(noise, noise_of((2, 9), torch.tensor(-1), torch.tensor(-3)))
        assert not torch.equal(noise, noise_of((2, 9), seed=-1))
        assert not torch.equal(noise, noise_of((2, 9), seed=1, offset=-3))


@interpretable
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_x_t_is_formed_from_the_noise_that_is_returned(backend, dtype):
    """Seeded and given noise lead to the same bits of x_t, so the noise may be recomputed."""
    x0, t = torch.randn(3, 5, 7).to(dtype), torch.rand(3)
    with flowkernels.backend(backend):
        x_t, noise = interpolate(x0, t, seed=9)
        again, same = interpolate(x0, t, noise)
        alone, none = interpolate(x0, t, seed=9, return_noise=False)
    assert noise.dtype == dtype
    assert same is noise
    assert none is None
    assert torch.equal(x_t, again)
    assert torch.equal(x_t, alone)


def test_normals_are_standard():
    """Moments, and correlations between neighbours, pairs, offsets and seeds, to 5 deviations."""
    n = 1_000_000
    z = noise_of((1, n), seed=123)[0].double()
    bound = 5 / n**0.5
    # Standard deviations of the sample moments: 1, √2, √15, √96 over √n.
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((z**power).mean() - moment) < deviation * bound
    for other in (
        z.roll(1),
        z.roll(2),
        z.roll(4),
        noise_of((1, n), seed=124)[0].double(),
        noise_of((1, n), seed=123, offset=1)[0].double(),
    ):
        assert abs((z * other).mean()) < bound
    tail = (z.abs() > 3).double().mean()
    assert abs(tail - 0.0026998) < 5 * (0.0027 / n) ** 0.5


def test_noise_is_drawn_from_torch_where_none_is_given():
    x0, t = torch.randn(2, 3, 4), torch.rand(2)
    torch.manual_seed(5)
    x_t, noise = interpolate(x0, t)
    torch.manual_seed(5)
    assert torch.equal(noise, torch.randn(2, 3, 4))
    assert torch.equal(x_t, interpolate(x0, t, noise)[0])
    assert interpolate(x0, t, return_noise=False)[1] is None
    assert interpolate(x0.bfloat16(), t)[1].dtype == torch.bfloat16


@interpretable
@BACKENDS
def test_t_may_be_double_expanded_or_ask_for_a_gradient(backend):
    x0, noise, t = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3)
    with flowkernels.backend(backend):
        expected = interpolate(x0, t, noise)[0]
        found = interpolate(x0, t.double(), noise)[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        half = torch.tensor(0.5).expand(3)
        torch.testing.assert_close(interpolate(x0, half, noise)[0], (x0 + noise) / 2)
        t.requires_grad_()
        interpolate(x0, t, noise)[0].sum().backward()
    torch.testing.assert_close(t.grad, (noise - x0).sum(1))


@interpretable
@BACKENDS
def test_seeded_noise_has_no_gradient(backend):
    x0, t = torch.randn(3, 5, requires_grad=True), torch.rand(3)
    with flowkernels.backend(backend):
        x_t, noise = interpolate(x0, t, seed=1)
        assert not noise.requires_grad
        x_t.sum().backward()
    torch.testing.assert_close(x0.grad, (1 - t)[:, None].expand(3, 5))


def test_one_graph_for_any_seed():
    """A device tensor as seed is an input of the graph: compiled once, other noise each call."""
    torch._dynamo.reset()  # other tests compile the same function, for other arguments
    compiled = torch.compile(interpolate, fullgraph=True, dynamic=True, backend="aot_eager")
    x0, t = torch.randn(2, 8), torch.rand(2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            found = compiled(x0, t, seed=torch.tensor(seed), offset=torch.tensor(7))
            expected = interpolate(x0, t, seed=seed, offset=7)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
