"""The cost of jumps: closed forms, the definition pair by pair, precision, memory, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from flowkernels.ode import (
    BellmanAccumulator,
    Schedule,
    bellman_cost,
    euler_step,
    shifted,
    uniform,
)
from tests.ode.bellman_oracles import mixture, pairwise, roll, uneven, worst

MIB = 1 << 20
GRIDS = pytest.mark.parametrize(
    "grid", [uniform(30), shifted(30, 3.0), uneven(30)], ids=["uniform", "shifted", "uneven"]
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_flow(N, B, shape, dtype=torch.float64, seed=0):
    """Velocities that obey nothing: any are a teacher's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, B, *shape, dtype=dtype, generator=generator)


def states_of(v, times, residuals=None):
    """The states that an Euler teacher (with residuals: any) passes from x = 0."""
    h = times.diff().view(-1, *[1] * (v.dim() - 1))
    steps = h * v if residuals is None else h * v + residuals
    return torch.cat([torch.zeros_like(v[:1]), steps.cumsum(0)])


@GRIDS
def test_a_straight_flow_costs_nothing(grid):
    v = torch.randn(4, 3, 8, 8).expand(30, 4, 3, 8, 8)
    assert not bellman_cost(v, grid).any()
    accumulator = BellmanAccumulator(grid)
    for _ in range(30):
        accumulator.step(v[0], v[0], v_uncond=v[0].flip(0), guidance=3.0)
    assert not bellman_cost(accumulator, grid).any()


@pytest.mark.parametrize("alpha", [-2.0, 0.7])
def test_linear_flow_has_its_closed_form(alpha):
    """v = αx: c_jk = ‖x_j‖² ((1 + αh)^(k-j) - 1 - αh (k-j))²."""
    N, times = 40, uniform(40).times
    x, v = roll(lambda x, t: alpha * x, torch.randn(5, 7, dtype=torch.float64), times)
    k = torch.arange(N + 1, dtype=torch.float64)
    steps = k[None] - k[:, None]
    factor = (1 - alpha / N) ** steps - 1 + alpha / N * steps
    expected = x.square().sum(-1).mean(1)[:, None] * factor**2
    found = bellman_cost(v, times)
    assert worst(found, expected) < 1e-9
    assert not found.tril().any()
    # One step costs nothing, up to nothing at all: there is no increment in it.
    assert not found.diagonal(1).any()


@GRIDS
def test_gaussian_flow_has_its_closed_form(grid):
    """Data N(0, s²): x_k = P_k z with P_{k+1} = P_k (1 + h_k S'_k/S_k), S² = (1-t)² s² + t²."""
    s, times = 0.4, grid.times
    slope = (times - (1 - times) * s**2) / ((1 - times) ** 2 * s**2 + times**2)  # S'/S
    z = torch.randn(6, 5, dtype=torch.float64)
    P = torch.cat([torch.ones(1), (1 + times.diff() * slope[:-1]).cumprod(0)]).double()
    span = times[None] - times[:, None]
    expected = z.square().sum(1).mean() * (P[None] - P[:, None] * (1 + span * slope[:, None])) ** 2
    velocities = (slope * P)[:-1, None, None] * z
    assert worst(bellman_cost(velocities, grid), expected) < 1e-9


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 14),
    B=st.integers(1, 3),
    shape=st.sampled_from([(), (1,), (17,), (3, 5, 5), (70, 3)]),
    residuals=st.booleans(),
    power=st.sampled_from([1, 2, 0.5, 3.0]),
)
def test_equals_the_definition_pair_by_pair(N, B, shape, residuals, power):
    """Any grid, any velocities, with residuals and without, every power."""
    grid = uneven(N, seed=N)
    v = random_flow(N, B, shape)
    e = random_flow(N, B, shape, seed=1) * 0.1 if residuals else None
    expected = pairwise(states_of(v, grid.times, e), v, grid.times, power)
    found = bellman_cost(v, grid, e, power=power, per_sample=True)
    assert found.shape == (B, N + 1, N + 1)
    assert found.dtype == torch.float64
    if not residuals:  # the definition's own rounding, for one step and a power below 1
        expected.diagonal(1, 1, 2).zero_()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        bellman_cost(v, grid, e, power=power), found.mean(0), rtol=1e-12, atol=1e-15
    )


def test_times_may_rise():
    """Other conventions of time sample from 0 to 1; the cost does not mind."""
    v, times = random_flow(6, 2, (5,)), uneven(6).times
    found = bellman_cost(v, 1 - times)
    torch.testing.assert_close(found, pairwise(states_of(v, 1 - times), v, 1 - times).mean(0))
    assert torch.equal(bellman_cost(v, times), bellman_cost(v, Schedule(times)))
    assert torch.equal(bellman_cost(v, times), bellman_cost(v, times.tolist()))


@pytest.mark.parametrize("grid", [uniform(100), shifted(100, 3.0)], ids=["uniform", "shifted"])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_float32_stays_near_float64_on_a_nonlinear_flow(grid, spread):
    """1e-5 of the float64 definition over all pairs, where subtracting states in float32 is a
    hundred times as far. What is left is v's own rounding, 6e-8·‖v‖/‖a‖ of an increment: of the
    very numbers given, products in float32 are within 1e-6.
    """
    flow = mixture(256, spread)
    x, v = roll(flow, torch.randn(4, 256, dtype=torch.float64), grid.times)
    truth = pairwise(x, v, grid.times).mean(0)
    single = v.float()
    found = bellman_cost(single, grid)
    assert worst(found, truth) < 1e-5
    assert worst(pairwise(x.float(), single, grid.times.float()).mean(0), truth) > 1e-4
    given_numbers = single.double()
    exact = pairwise(states_of(given_numbers, grid.times), given_numbers, grid.times).mean(0)
    assert worst(found, exact) < 1e-6
    accumulator = BellmanAccumulator(grid)
    for each in single:
        accumulator.add(each)
    assert worst(bellman_cost(accumulator, grid), exact) < 1e-6


@pytest.mark.parametrize("setting", ["tf32", "bf16"])
def test_fast_matmul_settings_are_not_used_and_are_restored(setting):
    v, grid = random_flow(40, 2, (500,), torch.float32), uniform(40)
    expected = bellman_cost(v, grid)
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if backend is backends[0] else setting
        assert torch.equal(bellman_cost(v, grid), expected)
        assert backends[1].fp32_precision == setting
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def heun(flow, x, times):
    """Heun's trajectory: velocities and what its steps have beyond Euler's."""
    states, velocities, residuals = [x], [], []
    for t, t_next in itertools.pairwise(times):
        x, h = states[-1], t_next - t
        v = flow(x, t.expand(len(x)))
        ahead = flow(x + h * v, t_next.expand(len(x)))
        velocities.append(v)
        residuals.append(h / 2 * (ahead - v))
        states.append(x + h * v + residuals[-1])
    return torch.stack(states), torch.stack(velocities), torch.stack(residuals)


@GRIDS
def test_heun_teacher(grid):
    """Its states are not Euler's: with residuals the definition holds, one step included."""
    x, v, e = heun(mixture(6), torch.randn(5, 6, dtype=torch.float64), grid.times)
    truth = pairwise(x, v, grid.times).mean(0)
    found = bellman_cost(v, grid, e)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.diagonal(1), e.square().sum(-1).mean(1))
    accumulator = BellmanAccumulator(grid, residuals=True)
    for velocity, residual in zip(v, e, strict=True):
        accumulator.add(velocity, residual)
    torch.testing.assert_close(bellman_cost(accumulator, grid), found, rtol=1e-12, atol=0)
    assert worst(bellman_cost(v.float(), grid, e.float()), truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_the_accumulator_takes_the_teachers_steps(dtype, guidance):
    """Its states are euler_step's, its cost that of the velocities it was shown."""
    grid = uneven(7)
    v = random_flow(7, 3, (2, 5, 5)).to(dtype)
    uncond = random_flow(7, 3, (2, 5, 5), seed=1).to(dtype)
    options = [
        {} if guidance is None else {"v_uncond": each, "guidance": guidance} for each in uncond
    ]
    x = start = torch.randn(3, 2, 5, 5).to(dtype)
    accumulator = BellmanAccumulator(grid)
    for k in range(7):
        x = accumulator.step(x, v[k], **options[k])
    compute = torch.promote_types(dtype, torch.float32)
    combined = v.to(compute)
    if guidance is not None:
        combined = uncond.to(compute) + guidance * (combined - uncond.to(compute))
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(
        bellman_cost(accumulator, grid), bellman_cost(combined, grid), **tight
    )
    for k, dt in enumerate(grid.times.diff().tolist()):
        start = euler_step(start, v[k], dt, **options[k])
    assert x.dtype == dtype
    torch.testing.assert_close(x, start)


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_micro_batches_change_nothing(size):
    """Ten trajectories, in any portions, the last one smaller or not: the same matrices."""
    grid, v = uniform(12), random_flow(12, 10, (3, 40), torch.float32)
    whole = bellman_cost(v, grid, per_sample=True)
    accumulator = BellmanAccumulator(grid)
    for part in v.split(size, dim=1):
        for velocity in part:
            accumulator.add(velocity)
    assert accumulator.samples == 10
    for per_sample in (True, False):
        torch.testing.assert_close(
            bellman_cost(accumulator, grid, per_sample=per_sample),
            whole if per_sample else whole.mean(0),
            rtol=1e-5,  # float32 products, summed in another order
            atol=1e-9,
        )


def test_views_are_read_where_they_are():
    """Velocities of a transposed, sliced buffer, and a wide sample in several pieces."""
    grid, big = uniform(5), random_flow(2, 6, (40000,))
    v = big.transpose(0, 1)[1:]
    torch.testing.assert_close(
        bellman_cost(v, grid), bellman_cost(v.contiguous(), grid), rtol=1e-12, atol=0
    )
    truth = pairwise(states_of(v, grid.times), v, grid.times).mean(0)
    torch.testing.assert_close(bellman_cost(v, grid), truth, rtol=1e-10, atol=1e-10)


def test_lower_precision_is_widened_first():
    grid, v = uniform(9), random_flow(9, 2, (33,)).bfloat16()
    torch.testing.assert_close(
        bellman_cost(v, grid), bellman_cost(v.double(), grid), rtol=1e-6, atol=1e-12
    )


def test_nan_stays_with_its_sample():
    v = random_flow(5, 3, (4,))
    v[2, 1, 0] = float("nan")
    cost = bellman_cost(v, uniform(5), per_sample=True)
    assert cost[[0, 2]].isfinite().all()
    assert cost[1].triu(1).isnan().any()


def peak_bytes(call):
    """The most that a call holds beyond what there was, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, result


# 100 trajectories of 3×256×256 at N = 100, scaled down by 320: 12 GiB become 38.4 MiB.
SAMPLES, SHAPE, BOUND = 20, (3, 32, 32), 12 * 1024 * MIB // 320


def test_memory_of_velocities_given_whole():
    v, grid = random_flow(100, SAMPLES, SHAPE, torch.float32), uniform(100)
    products = 8 * SAMPLES * 99**2
    peak, _ = peak_bytes(lambda: bellman_cost(v, grid))
    assert peak < MIB + 4 * products
    assert peak + v.nbytes < BOUND


@pytest.mark.parametrize("micro_batch", [5, 20])
def test_memory_of_the_accumulator(micro_batch):
    """Increments of one micro-batch, a few states, and the products of all samples."""
    grid, velocity = uniform(100), torch.randn(micro_batch, *SHAPE)

    def feed():
        accumulator = BellmanAccumulator(grid)
        for _ in range(SAMPLES // micro_batch):
            x = torch.zeros_like(velocity)
            for _ in range(100):
                x = accumulator.step(x, velocity)
        return bellman_cost(accumulator, grid)

    peak, _ = peak_bytes(feed)
    a_state = velocity.nbytes
    assert peak < 99 * a_state + 5 * a_state + 5 * 8 * SAMPLES * 99**2
    assert peak + 3 * a_state < BOUND


def test_no_gradient_is_kept():
    v = random_flow(4, 2, (3,)).requires_grad_()
    assert not bellman_cost(v, uniform(4)).requires_grad
    accumulator = BellmanAccumulator(uniform(4))
    for each in v:
        assert not accumulator.step(each, each).requires_grad


GOOD = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "^velocities: got list", {"velocities": [1.0]}),
        (TypeError, "^velocities: got dtype", {"velocities": GOOD.long()}),
        (
            ValueError,
            r"^velocities: got shape \(3, 2, 3\), need .* N = 4",
            {"velocities": GOOD[1:]},
        ),
        (ValueError, r"^velocities: got shape \(4,\)", {"velocities": torch.zeros(4)}),
        (ValueError, "at least one sample", {"velocities": torch.zeros(4, 0, 3)}),
        (ValueError, "^residuals: got shape", {"residuals": GOOD[:, :1]}),
        (ValueError, "^times: got shape", {"times": torch.zeros(2, 2)}),
        (ValueError, "^times: got .*strictly monotonic", {"times": [1.0, 0.5, 0.5, 0.2, 0.0]}),
        (ValueError, "^times: got .*strictly", {"times": [1.0, float("nan"), 0.5, 0.2, 0.0]}),
        (ValueError, "^times: got str", {"times": "uniform"}),
        (ValueError, "^power: got 0", {"power": 0}),
        (TypeError, "^power: got str", {"power": "two"}),
    ],
)
def test_names_the_argument_of_a_bad_input(error, match, change):
    arguments = {"velocities": GOOD, "times": uniform(4), **change}
    with pytest.raises(error, match=match) as caught:
        bellman_cost(**arguments)
    assert "\n" not in str(caught.value)


def test_the_accumulator_names_what_is_wrong():
    grid, v = uniform(2), torch.zeros(2, 3)
    accumulator = BellmanAccumulator(grid)
    with pytest.raises(ValueError, match="0 samples finished"):
        bellman_cost(accumulator, grid)
    accumulator.step(v, v)
    with pytest.raises(ValueError, match="1 of 2 velocities"):
        bellman_cost(accumulator, grid)
    with pytest.raises(ValueError, match=r"^v: got shape \(2, 4\), need \(2, 3\)"):
        accumulator.step(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one dtype and device"):
        accumulator.step(v.double(), v.double())
    with pytest.raises(ValueError, match=r"^v: got shape \(1, 3\)"):
        accumulator.step(v, v[:1])
    with pytest.raises(ValueError, match="residual: is given"):
        accumulator.add(v, v)
    accumulator.add(v)
    with pytest.raises(ValueError, match="times: are not those"):
        bellman_cost(accumulator, shifted(2, 3.0))
    with pytest.raises(ValueError, match="residuals: is given"):
        bellman_cost(accumulator, grid, GOOD)
    with pytest.raises(ValueError, match="at least one element"):
        accumulator.step(torch.zeros(0, 3), torch.zeros(0, 3))
    assert "2 samples" in repr(accumulator)

    heuns = BellmanAccumulator(grid, residuals=True)
    with pytest.raises(ValueError, match="an Euler step has none"):
        heuns.step(v, v)
    with pytest.raises(ValueError, match="residual: is missing"):
        heuns.add(v)
    with pytest.raises(ValueError, match="times: got"):
        BellmanAccumulator([0.0])
