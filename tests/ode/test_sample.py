"""The samplers: orders of convergence, guidance, what is called when, and bad input."""

import math

import pytest
import torch
from torch import nn

from flowkernels.nn import GaussianMixture
from flowkernels.ode import METHODS, Schedule, euler_step, sample, shifted, uniform

CALLS = {"euler": 1, "ab2": 1, "heun": 2, "midpoint": 2, "rk4": 4}
ORDER = {"euler": 1, "ab2": 2, "heun": 2, "midpoint": 2, "rk4": 4}


def field(x, t):
    """dx/dt = x (1+t)²: x(0) = x(1) exp(-7/3)."""
    return x * (1 + t.double()).square().view(-1, 1)


NOISE = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
EXACT = NOISE * math.exp(-7 / 3)


def test_every_method_is_tested():
    assert set(METHODS) == set(CALLS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [uniform, lambda n: shifted(n, 3.0)], ids=["uniform", "shifted"])
def test_convergence_order(method, make):
    # t reaches the velocity in float32, so errors below 1e-7 say nothing about the order.
    steps = (8, 16) if method == "rk4" else (64, 128)
    coarse, fine = (
        (sample(field, NOISE, make(n), method=method) - EXACT).abs().max() for n in steps
    )
    assert fine > 1e-7
    observed = math.log2(coarse / fine)
    assert abs(observed - ORDER[method]) < 0.25, observed


@pytest.mark.parametrize("method", METHODS)
def test_one_step_equals_the_formula(method):
    def f(x, t):
        return x * x + t.double().view(-1, 1)

    x, k1 = NOISE, NOISE * NOISE + 1
    expected = {
        "euler": lambda: x - k1,
        "ab2": lambda: x - k1,
        "heun": lambda: x - (k1 + (x - k1) ** 2) / 2,
        "midpoint": lambda: x - ((x - k1 / 2) ** 2 + 0.5),
        "rk4": lambda: rk4(x),
    }

    def rk4(x):
        k2 = (x - k1 / 2) ** 2 + 0.5
        k3 = (x - k2 / 2) ** 2 + 0.5
        k4 = (x - k3) ** 2
        return x - (k1 + 2 * k2 + 2 * k3 + k4) / 6

    torch.testing.assert_close(sample(f, x, uniform(1), method=method), expected[method]())


def test_ab2_on_uneven_steps_equals_the_formula():
    schedule = Schedule([1.0, 0.7, 0.1, 0.0])

    def f(x, t):
        return torch.sin(3 * x) + t.double().view(-1, 1)

    h = schedule.times.diff().tolist()
    t32 = schedule.times.float().double()
    x = NOISE
    before = None
    for i in range(3):
        now = torch.sin(3 * x) + t32[i]
        slope = now
        if before is not None:
            r = h[i] / h[i - 1]
            slope = (1 + r / 2) * now - r / 2 * before
        x, before = x + h[i] * slope, now
    torch.testing.assert_close(sample(f, NOISE, schedule, method="ab2"), x)


class Conditional(nn.Module):
    """v = x·gain[label] + t, and a record of every call."""

    def __init__(self):
        super().__init__()
        self.gain = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
        self.calls = []

    def forward(self, x, t, labels):
        self.calls.append((len(x), t))
        return x * self.gain[labels].view(-1, 1) + t.double().view(-1, 1)

    def null_conditions(self, conditions):
        return {"labels": torch.full_like(conditions["labels"], 3)}


@pytest.mark.parametrize("method", METHODS)
def test_guidance_equals_integrating_the_hand_formula(method):
    model, labels, s = Conditional(), torch.tensor([0, 2]), 4.5
    nothing = torch.tensor([3, 3])

    def by_hand(x, t):
        v_uncond = model(x, t, nothing)
        return v_uncond + s * (model(x, t, labels) - v_uncond)

    expected = sample(by_hand, NOISE, shifted(6, 2.0), method=method)
    model.calls.clear()
    for uncond in (None, {"labels": nothing}):
        x = sample(
            model,
            NOISE,
            shifted(6, 2.0),
            method=method,
            guidance=s,
            conditions={"labels": labels},
            uncond=uncond,
        )
        # float64, another order of the same sums
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    assert {rows for rows, _ in model.calls} == {4}  # both halves in one call
    assert len(model.calls) == 2 * 6 * CALLS[method]


@pytest.mark.parametrize("guidance", [None, 1.0, 1])
def test_no_guidance_calls_b_rows(guidance):
    model = Conditional()
    sample(model, NOISE, uniform(3), guidance=guidance, conditions={"labels": torch.tensor([0, 1])})
    assert [rows for rows, _ in model.calls] == [2, 2, 2]
    times = torch.stack([t for _, t in model.calls])
    assert times.dtype == torch.float32
    torch.testing.assert_close(times, torch.tensor([1, 2 / 3, 1 / 3])[:, None].expand(3, 2))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_samples_an_exact_mixture(method):
    torch.manual_seed(0)
    mixture = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), 0.4)
    noise = torch.randn(64, 2, dtype=torch.float64)
    exact = sample(mixture, noise, uniform(400), method="rk4")
    far = (sample(mixture, noise, uniform(40), method=method) - exact).norm(dim=1).median()
    assert far < (0.2 if method == "euler" else 0.02)


def test_trajectory_and_callback():
    seen = []
    x = sample(
        field,
        NOISE,
        uniform(4),
        callback=lambda *event: seen.append(event),
        return_trajectory=True,
    )
    assert x.shape == (5, 2, 1)
    assert torch.equal(x[0], NOISE)
    assert torch.equal(x[-1], sample(field, NOISE, uniform(4)))
    assert [(step, t) for step, t, _ in seen] == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    for (_, _, state), row in zip(seen, x[1:], strict=True):
        assert torch.equal(state, row)


def test_progress_shows_a_bar(capsys):
    sample(field, NOISE, uniform(4), progress=True)
    assert "sampling" in capsys.readouterr().out


def test_inputs_are_not_changed_and_no_graph_is_kept():
    noise = NOISE.clone()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = sample(lambda x, t: x * weight, noise, uniform(2), method="rk4")
    assert torch.equal(noise, NOISE)
    assert not x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_states_written_over_are_seen_by_nobody(dtype):
    noise = torch.linspace(-2, 2, 1 << 18).to(dtype).view(2, -1)
    before, gain, seen = noise.clone(), torch.ones(2, 1), []

    def velocity(x, t, gain):
        seen.append((x, x.clone(), t, t.clone()))
        return torch.tanh(x) * gain + t[:, None]

    options = {
        "guidance": 2.0,
        "conditions": {"gain": gain},
        "uncond": {"gain": torch.zeros_like(gain)},
    }
    x = sample(velocity, noise, uniform(4), **options)
    assert torch.equal(noise, before)
    assert len(seen) == 4
    for x_held, x_then, t_held, t_then in seen:
        assert torch.equal(x_held, x_then)
        assert torch.equal(t_held, t_then)
    trajectory = sample(velocity, noise, uniform(4), return_trajectory=True, **options)
    assert torch.equal(trajectory[-1], x)
    assert not torch.equal(trajectory[2], x)


def test_a_velocity_may_overwrite_its_guided_state_and_change_its_dtype():
    labels = {"gain": torch.tensor([[1.0], [2.0], [0.5]])}
    options = {"guidance": 2.0, "conditions": labels, "uncond": {"gain": torch.zeros(3, 1)}}
    noise = torch.linspace(-1, 1, 3 * (1 << 18)).view(3, -1)

    def plain(x, t, gain):
        v = x * gain + t[:, None]
        return v.bfloat16() if t[0] < 0.6 else v

    def overwriting(x, t, gain):
        dtype = torch.bfloat16 if t[0] < 0.6 else torch.float32
        return x.mul_(gain).add_(t[:, None]).to(dtype)

    expected = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        times = torch.full((3,), t)
        v, other = (plain(expected, times, each["gain"]) for each in (labels, options["uncond"]))
        expected = euler_step(expected, v, -0.25, v_uncond=other, guidance=2.0)
    for velocity in (plain, overwriting):
        assert torch.equal(sample(velocity, noise, uniform(4), **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_velocity_may_overwrite_its_time(method):
    def scaled(x, t):
        t *= 2
        return field(x, t / 2)

    assert torch.equal(
        sample(scaled, NOISE, uniform(4), method=method),
        sample(field, NOISE, uniform(4), method=method),
    )


def test_a_velocity_of_other_rows_is_named():
    labels = {"labels": torch.tensor([0, 1])}
    options = {"guidance": 2.0, "conditions": labels, "uncond": labels}
    with pytest.raises(ValueError, match=r"velocity gave shape \(2, 1\); .* x's, \(4, 1\)"):
        sample(lambda x, t, labels: x[:2], NOISE, uniform(2), **options)
    with pytest.raises(ValueError, match=r"velocity gave shape \(1, 1\); .* x's, \(2, 1\)"):
        sample(lambda x, t: x[:1], NOISE, uniform(2))


@pytest.mark.parametrize("method", METHODS)
def test_a_velocity_that_gives_no_tensor_is_named(method):
    with pytest.raises(TypeError, match="velocity gave NoneType"):
        sample(lambda x, t: None, NOISE, uniform(2), method=method)


def test_noise_keeps_its_dtype_and_empty_batches_work():
    assert sample(field, NOISE.float(), uniform(2), method="euler").shape == (2, 1)
    for method in METHODS:
        x = sample(lambda x, t: x, torch.zeros(0, 3), uniform(2), method=method)
        assert x.shape == (0, 3)
        assert x.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fallback is for machines without CUDA")
def test_cuda_graph_on_cpu_warns_and_runs():
    with pytest.warns(UserWarning, match="cuda_graph ignored: noise is on cpu"):
        x = sample(field, NOISE, uniform(4), cuda_graph=True)
    assert torch.equal(x, sample(field, NOISE, uniform(4)))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_graph_equals_eager(method):
    torch.manual_seed(0)
    network = nn.Linear(8, 8, device="cuda")
    noise, gain = torch.randn(5, 8, device="cuda"), torch.rand(5, 1, device="cuda")

    def velocity(x, t, gain):
        return torch.tanh(network(x)) * gain + t[:, None]

    options = {
        "method": method,
        "guidance": 2.0,
        "conditions": {"gain": gain},
        "uncond": {"gain": torch.zeros_like(gain)},
    }
    graphed = sample(velocity, noise, uniform(6), cuda_graph=True, **options)
    assert torch.equal(graphed, sample(velocity, noise, uniform(6), **options))


def test_bad_input_is_named():
    labels = {"labels": torch.tensor([0, 1])}
    model = Conditional()
    with pytest.raises(ValueError, match="method is 'dopri5'"):
        sample(field, NOISE, uniform(2), method="dopri5")
    with pytest.raises(ValueError, match="guidance needs uncond"):
        sample(lambda x, t, labels: x, NOISE, uniform(2), guidance=2.0, conditions=labels)
    with pytest.raises(ValueError, match="needs conditions to guide by"):
        sample(model, NOISE, uniform(2), guidance=2.0)
    with pytest.raises(ValueError, match=r"conditions\['labels'\]"):
        sample(model, NOISE, uniform(2), conditions={"labels": torch.tensor([0, 1, 2])})
    with pytest.raises(ValueError, match="uncond has the keywords"):
        sample(model, NOISE, uniform(2), guidance=2.0, conditions=labels, uncond={"text": NOISE})
    with pytest.raises(ValueError, match=r"uncond\['labels'\]"):
        sample(
            model,
            NOISE,
            uniform(2),
            guidance=2.0,
            conditions=labels,
            uncond={"labels": torch.tensor([3])},
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("noise", {"noise": None}),
        ("noise", {"noise": torch.ones(())}),
        ("schedule", {"schedule": 4}),
        ("schedule", {"schedule": [1.0, 0.0]}),
        ("conditions", {"conditions": {"y": 3}}),
        ("guidance", {"guidance": "a"}),
    ],
)
def test_names_the_argument_of_the_wrong_type(name, change):
    arguments = {"noise": torch.ones(2, 3), "schedule": uniform(2), **change}
    with pytest.raises(TypeError, match=rf"^{name}") as caught:
        sample(lambda x, t, y=None: x, **arguments)
    assert "\n" not in str(caught.value)
