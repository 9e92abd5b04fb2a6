"""bellman_schedule: the teacher rolled, guidance, stability, the report, picture and file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowkernels.nn import GaussianMixture
from flowkernels.ode import (
    BellmanAccumulator,
    Schedule,
    bellman_cost,
    bellman_path,
    bellman_schedule,
    sample,
    shifted,
    uniform,
)
from flowkernels.ode.bellman.gram import row_count
from flowkernels.ode.bellman.path import schedules_of
from flowkernels.ode.bellman.result import even_stops, total_cost
from flowkernels.ode.bellman.schedule import MICRO_BATCH_BYTES, _micro_batches, stability_of
from tests.ode.bellman_oracles import mixture, pairwise, roll, uneven

QUICK = {"grid": 20, "bootstrap": 0}


@pytest.fixture
def noise():
    torch.manual_seed(0)
    return torch.randn(12, 3, dtype=torch.float64)


class Conditional(nn.Module):
    """v = x·gain[label]·t³, and a record of how many rows each call had."""

    def __init__(self):
        super().__init__()
        self.gain = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
        self.calls = []

    def forward(self, x, t, labels):
        self.calls.append((len(x), t.dtype))
        return x * (self.gain[labels] * t.double() ** 3).view(-1, 1)

    def null_conditions(self, conditions):
        return {"labels": torch.full_like(conditions["labels"], 3)}


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"grid": 30}, uniform(30)),
        ({"grid": 30, "shift": 3.0}, shifted(30, 3.0)),
        ({"grid": uneven(30)}, uneven(30)),
    ],
    ids=["uniform", "shifted", "given"],
)
def test_is_roll_cost_and_path(noise, options, grid):
    found = bellman_schedule(mixture(3), noise, budgets=[1, 3, 5, 30], bootstrap=0, **options)
    # Times reach the velocity as float32, in the teacher as in the sampler.
    x, v = roll(lambda x, t: mixture(3)(x, t.float()), noise, grid.times)
    truth = pairwise(x, v, grid.times).mean(0)
    torch.testing.assert_close(found.cost, truth, rtol=1e-9, atol=1e-12)
    expected = bellman_path(found.cost, grid, [1, 3, 5, 30])
    assert found.schedules == dict(expected)
    assert found.stops == expected.stops
    assert found.grid == grid
    assert found.samples == 12
    assert torch.equal(sample(mixture(3), noise, found.schedules[30]), x[-1])


def test_the_teacher_may_take_heuns_steps(noise):
    found = bellman_schedule(mixture(3), noise, method="heun", **QUICK)
    states = sample(mixture(3), noise, uniform(20), method="heun", return_trajectory=True)
    times = uniform(20).times
    pairs = zip(states[:-1], times[:-1].float(), strict=True)
    v = torch.stack([mixture(3)(x, t.expand(12)) for x, t in pairs])
    truth = pairwise(states, v, times).mean(0)
    torch.testing.assert_close(found.cost, truth, rtol=1e-9, atol=1e-12)
    assert (found.cost.diagonal(1) > 0).all()


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_guidance_is_part_of_the_teacher(noise, method, micro_batch):
    model, labels, s = Conditional(), torch.arange(12) % 3, 4.5
    nothing = torch.full_like(labels, 3)

    def by_hand(x, t, labels):
        uncond = model(x, t, torch.full_like(labels, 3))
        return uncond + s * (model(x, t, labels) - uncond)

    options = {**QUICK, "method": method, "conditions": {"labels": labels}}
    expected = bellman_schedule(by_hand, noise, **options)
    model.calls.clear()
    for uncond in (None, {"labels": nothing}):
        found = bellman_schedule(
            model, noise, guidance=s, uncond=uncond, micro_batch=micro_batch, **options
        )
        torch.testing.assert_close(found.cost, expected.cost, rtol=1e-9, atol=1e-12)
        assert found.schedules == expected.schedules
    sizes = {24} if micro_batch is None else {8}  # 12 in batches of at most 5: three of 4
    assert {rows for rows, _ in model.calls} == sizes
    assert {dtype for _, dtype in model.calls} == {torch.float32}
    model.calls.clear()
    bellman_schedule(model, noise, guidance=1.0, **options)
    assert {rows for rows, _ in model.calls} == {12}


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 50])
def test_micro_batches_change_nothing(noise, micro_batch):
    whole = bellman_schedule(mixture(3), noise, grid=20, bootstrap=30)
    parts = bellman_schedule(mixture(3), noise, grid=20, bootstrap=30, micro_batch=micro_batch)
    torch.testing.assert_close(parts.cost, whole.cost, rtol=1e-12, atol=1e-15)
    assert parts.schedules == whole.schedules
    assert str(parts.report()) == str(whole.report())


def test_power_and_discount_are_passed_on(noise):
    found = bellman_schedule(mixture(3), noise, power=1, discount=1.15, **QUICK)
    accumulator, x = BellmanAccumulator(uniform(20)), noise
    for t in found.grid.times[:-1].tolist():
        x = accumulator.step(x, mixture(3)(x, torch.full((12,), t)))
    cost = bellman_cost(accumulator, uniform(20), power=1)
    assert torch.equal(found.cost, cost)
    assert found.schedules == dict(bellman_path(cost, uniform(20), (2, 4, 6, 8), discount=1.15))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_full_size_fits_in_12_gib_by_construction(method):
    """N = 100, 100 noises of 3×256×256: what the portions hold, by their sizes (the peaks of such
    portions are measured in test_bellman_cost.py).
    """
    noise = torch.empty(100, 3, 256, 256, device="meta")
    batches = _micro_batches(noise, 100, method, None)
    assert [b.start for b in batches[1:]] == [b.stop for b in batches[:-1]]
    assert batches[0].start == 0
    assert batches[-1].start < 100 <= batches[-1].stop
    rows = max(b.stop - b.start for b in batches)
    a_state = rows * noise[0].numel() * 4
    increments = row_count(100, method == "heun") * a_state
    assert increments <= MICRO_BATCH_BYTES
    products = 2 * 8 * 100 * 100**2  # of each noise, and its costs
    assert increments + 6 * a_state + noise.numel() * 4 + products < 12 << 30


def test_states_keep_their_dtype_and_velocities_may_be_lower():
    seen = []

    def velocity(x, t):
        seen.append(x.dtype)
        return (x * t.view(-1, 1) ** 2).bfloat16()

    found = bellman_schedule(velocity, torch.randn(4, 8), grid=10, budgets=[2], bootstrap=0)
    assert set(seen) == {torch.float32}
    assert found.cost.dtype == torch.float64


def test_gain_is_the_cost_of_even_steps_over_that_of_the_schedule(noise):
    found = bellman_schedule(mixture(3), noise, grid=20, budgets=[3, 4], bootstrap=0)
    for K, row in found.report().items():
        even = [round(i * 20 / K) for i in range(K + 1)]
        assert even_stops(K, 20) == even
        assert row.even_cost == pytest.approx(total_cost(found.cost, even))
        assert row.cost == pytest.approx(found_optimum(found, K))
        assert row.gain == pytest.approx(row.even_cost / row.cost)
        assert row.gain >= 1
        assert row.stability is None


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_endpoints_are_what_untrained_samplers_reach(noise, guidance, micro_batch):
    model, options = Conditional(), {"conditions": {"labels": torch.arange(12) % 3}}
    options["guidance"] = guidance
    found = bellman_schedule(
        model, noise, budgets=[2, 20], endpoints=True, micro_batch=micro_batch, **QUICK, **options
    )
    end = sample(model, noise, uniform(20), **options)
    for steps, schedule in found.schedules.items():
        errors = [
            float((sample(model, noise, each, **options) - end).square().sum(1).mean().sqrt())
            for each in (schedule, uniform(steps))
        ]
        assert found.endpoints[steps] == pytest.approx(errors)
    assert found.endpoints[20] == (0, 0)
    assert found.report()[2].endpoint is found.endpoints[2]
    assert "endpoint" in str(found.report())


def test_the_report_says_where_even_steps_end_nearer():
    """Guided, a mixture's late steps pull in what early ones did wrong: there the schedule of
    least cost ends farther off than even steps do.
    """
    angle = torch.arange(8) * (math.pi / 4)
    everything = GaussianMixture(4 * torch.stack([angle.cos(), angle.sin()], 1), 0.3)
    one = GaussianMixture(everything.means[:1], 0.3)

    def velocity(x, t, told):
        return torch.where(told[:, None], one(x, t), everything(x, t))

    told = torch.ones(64, dtype=torch.bool)
    torch.manual_seed(0)
    found = bellman_schedule(
        velocity,
        torch.randn(64, 2),
        budgets=[2],
        guidance=3.0,
        conditions={"told": told},
        uncond={"told": ~told},
        endpoints=True,
    )
    assert found.report()[2].gain > 2
    assert found.endpoints[2].error > found.endpoints[2].even_error
    assert "At K = 2 untrained samples end farther from the teacher's" in str(found.report())


def found_optimum(found, K):
    return bellman_path(found.cost, found.grid, [K]).optima[K]


def test_a_bend_at_one_end_is_worth_a_schedule():
    """v = x·t⁸ bends near the noise alone: steps go there, and every noise agrees on it."""
    found = bellman_schedule(lambda x, t: x * t.view(-1, 1) ** 8, torch.randn(16, 4))
    report = found.report()
    for K, schedule in found.schedules.items():
        assert schedule.times[-2] > 1 / K  # the last step is the longest
        assert report[K].gain > 3
        # Costs of different noises differ by a factor here, so the schedule never does.
        assert report[K].stability.agreement == 1
        assert report[K].stability.spread == 0
        assert report[K].stability.gain_low == pytest.approx(report[K].gain)
    assert "expect nothing" not in str(report)


def test_a_straight_flow_needs_none():
    found = bellman_schedule(lambda x, t: torch.ones_like(x), torch.randn(5, 3), grid=10)
    for row in found.report().values():
        assert row.cost == row.even_cost == 0
        assert row.gain == 1
        assert not row.rises
    assert "At K = 2, 4, 6, 8 even steps cost nearly as little" in str(found.report())


def test_a_rise_is_reported():
    values = iter([1.0, 0.0, 2.0])
    with pytest.warns(UserWarning, match=r"^bellman_schedule: .* at K = 2$") as caught:
        found = bellman_schedule(
            lambda x, t: torch.full_like(x, next(values)),
            torch.zeros(1, 1),
            grid=3,
            budgets=[1, 2, 3],
        )
    assert caught[0].filename == __file__
    assert found.rises == (2,)
    assert [row.rises for row in found.report().values()] == [False, True, False]
    assert "At K = 2 fewer steps cost less" in str(found.report())


def test_stability_tells_agreeing_samples_from_disagreeing_ones():
    """Half of the samples want the stop early, half late: the resamples waver between them."""
    early, late = torch.ones(2, 5, 5, dtype=torch.float64).triu(1)
    early[1, 4] = early[0, 1] = late[0, 3] = late[3, 4] = 0.1
    grid = uniform(4)

    def stability(samples):
        cost = torch.stack(samples)
        stops = schedules_of(cost.mean(0).numpy(), grid, [2], 1.0).stops
        return stability_of(cost, grid, stops, 1.0, 200, 0)[2]

    agreeing = stability([early] * 10)
    assert agreeing.agreement == 1
    assert agreeing.spread == 0
    assert (agreeing.gain_low, agreeing.gain_high) == pytest.approx((10, 10))
    torn = stability([early, late] * 5)
    assert 0.3 < torn.agreement < 0.9
    assert torn.spread == pytest.approx(0.25, abs=0.03)  # stops at t = .75 or .25
    assert torn.gain_low < 2 < agreeing.gain_low


def test_the_seed_makes_the_bootstrap_repeatable(noise):
    first, again, other = (
        bellman_schedule(mixture(3), noise, grid=20, bootstrap=40, seed=seed).stability
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    state = torch.get_rng_state()
    bellman_schedule(mixture(3), noise, grid=20, bootstrap=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("samples", [0, 1])
def test_without_a_bootstrap_there_is_no_stability(samples, noise):
    found = bellman_schedule(mixture(3), noise[:1], grid=8, bootstrap=samples * 10)
    assert found.stability == {}
    assert "K" in str(found.report())


LABELS = {"labels": torch.zeros(12, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "^noise: got NoneType", {"noise": None}),
        (TypeError, "^noise: got Tensor", {"noise": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"^noise: got shape \(0, 3\)", {"noise": torch.ones(0, 3)}),
        (TypeError, "^grid: got 2.5", {"grid": 2.5}),
        (ValueError, "^grid: got 0", {"grid": 0}),
        (ValueError, "^budgets: got 21, need .* 20", {"budgets": [21]}),
        (ValueError, "^shift: got 3.0, need 1", {"grid": uniform(20), "shift": 3.0}),
        (ValueError, "^shift is -1", {"shift": -1}),
        (ValueError, "^method: got 'rk45'", {"method": "rk45"}),
        (ValueError, "^power: got -2", {"power": -2}),
        (ValueError, "^discount: got nan", {"discount": float("nan")}),
        (TypeError, "^bootstrap: got 'many'", {"bootstrap": "many"}),
        (ValueError, "^bootstrap: got -1", {"bootstrap": -1}),
        (ValueError, "^micro_batch: got 0", {"micro_batch": 0}),
        (ValueError, "^guidance: got 2.0, need conditions", {"guidance": 2.0}),
        (TypeError, r"^conditions\['labels'\]: got int", {"conditions": {"labels": 3}}),
        (
            ValueError,
            r"^conditions\['labels'\]: got shape \(2,\)",
            {"conditions": {"labels": torch.zeros(2)}},
        ),
        (ValueError, "^velocity: gave values", {"velocity": lambda x, t: x / 0}),
        (ValueError, "guidance needs uncond", {"guidance": 2.0, "conditions": LABELS}),
    ],
)
def test_names_the_argument_of_a_bad_input(noise, error, match, change):
    arguments = {
        "velocity": lambda x, t, labels=None: x,
        "noise": noise,
        "grid": 20,
        "budgets": [2],
        **change,
    }
    with pytest.raises(error, match=match) as caught:
        bellman_schedule(arguments.pop("velocity"), arguments.pop("noise"), **arguments)
    assert "\n" not in str(caught.value)


def test_schedules_are_schedules(noise):
    found = bellman_schedule(mixture(3), noise, **QUICK)
    for K, schedule in found.schedules.items():
        assert isinstance(schedule, Schedule)
        assert schedule.steps == K
        assert Schedule.from_json(schedule.to_json()) == schedule
