"""Consistency-FM: the literal loss, exact flows, segments, the average it is compared with.

The Gaussian case is exact for every Δ (docs/siblings.md): for data N(0, s²) a velocity a(t)·x that
solves the method's own recursion has no expected gradient, whatever the recursion's step.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowkernels.distill import ConsistencyFM, Phase
from flowkernels.losses import consistency_flow_matching, interpolate
from flowkernels.nn import GaussianMixture
from flowkernels.ode import sample, uniform

F64 = torch.float64


def along(value, like):
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def literal(v, v_target, x0, noise, t, r, end, alpha):
    """[B]: the paper's two squares, with both states formed and both endpoints taken."""
    t, r, end = (along(time, v) for time in (t, r, end))
    x_t, x_r = (1 - t) * x0 + t * noise, (1 - r) * x0 + r * noise
    endpoint, target = x_t + (end - t) * v, x_r + (end - r) * v_target
    velocities = torch.where(r > end, (v - v_target).square(), torch.zeros_like(v))
    return ((endpoint - target).square() + alpha * velocities).flatten(1).mean(1)


def draws(B, segments, delta, dtype=F64):
    """v, v⁻, x0, ε and t, r, e with a time at each end, just above one, and at 0 and 1."""
    v, v_target, x0, noise = torch.randn(4, B, 3, 5, dtype=dtype).unbind()
    t = torch.rand(B, dtype=dtype)
    special = torch.tensor([0.0, 1.0, 1 / segments, delta / 2])[:B]
    t[: len(special)] = special.to(dtype)
    end = ConsistencyFM(Linear(), segments=segments).segment_end(t)
    return v, v_target, x0, noise, t, torch.maximum(t - delta, end), end


class Linear(nn.Module):
    """v = scale·x + label; remembers its calls."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=F64))
        self.register_buffer("offset", torch.zeros((), dtype=F64))
        self.calls = []

    def forward(self, x, t, labels=None):
        self.calls.append({"x": x, "t": t, "labels": labels, "training": self.training})
        shift = 0 if labels is None else along(labels, x)
        return (self.scale.to(x.dtype) * x + self.offset.to(x.dtype)) + shift


@pytest.mark.parametrize("alpha", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize(("segments", "delta", "B"), [(1, 0.1, 1), (2, 0.01, 17), (3, 0.4, 6)])
def test_completed_square_is_the_literal_loss(alpha, segments, delta, B):
    """In value and gradient; 1e-12: a dozen roundings of float64, over β's division by W ≥ α."""
    torch.manual_seed(B)
    v, *rest = draws(B, segments, delta)
    v.requires_grad_()
    ours = consistency_flow_matching(v, *rest, alpha=alpha, reduction="none")
    theirs = literal(v, *rest, alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    weight = torch.randn(B, dtype=F64)
    gradients = [torch.autograd.grad((each * weight).sum(), v)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    for reduction, expected in (("mean", theirs.mean()), ("sum", 15 * theirs.sum())):
        value = consistency_flow_matching(v, *rest, alpha=alpha, reduction=reduction)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_the_literal_loss(dtype):
    """float32 kernels against float64: 2e-5 in value, 2e-4 in gradient; bfloat16 as rounded."""
    torch.manual_seed(0)
    v, v_target, *rest = draws(32, 2, 1e-2, torch.float32)
    v, v_target = v.to(dtype).requires_grad_(), v_target.to(dtype)
    exact = v.detach().double().requires_grad_()
    expected = literal(exact, *(each.double() for each in (v_target, *rest)), 1e-5).mean()
    ours = consistency_flow_matching(v, v_target, *rest)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=0)
    ours.backward()
    expected.backward()
    rounding = 2e-4 if dtype == torch.float32 else 2**-8  # of the gradient as it is returned
    close = {"rtol": rounding, "atol": rounding * float(exact.grad.abs().max())}
    torch.testing.assert_close(v.grad.double(), exact.grad, **close)


def test_only_the_velocity_gets_a_gradient():
    operands = [each.requires_grad_() for each in draws(4, 2, 0.1)[:4]]
    loss = consistency_flow_matching(*operands, *draws(4, 2, 0.1)[4:])
    assert torch.autograd.grad(loss, operands, allow_unused=True)[1:] == (None, None, None)


def test_bad_operands_of_the_loss_are_named():
    operands = draws(4, 2, 0.1)
    with pytest.raises(ValueError, match=r"alpha: got -1\.0"):
        consistency_flow_matching(*operands, alpha=-1)
    with pytest.raises(ValueError, match="alpha: got nan"):
        consistency_flow_matching(*operands, alpha=float("nan"))
    with pytest.raises(ValueError, match="v_target: got shape"):
        consistency_flow_matching(operands[0], operands[1][:2], *operands[2:])
    with pytest.raises(ValueError, match="end: "):
        consistency_flow_matching(*operands[:6], operands[6][:1])


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.parametrize("target_decay", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_method_is_the_literal_loss_of_its_own_draws(B, target_decay, reduction):
    torch.manual_seed(3)
    model = Linear()
    method = ConsistencyFM(
        model,
        segments=3,
        delta=0.1,
        alpha=0.2,
        target_decay=target_decay,
        drop_condition=0.0,
        reduction=reduction,
    )
    if target_decay:
        with torch.no_grad():
            method.target.scale.fill_(0.8)
    x0, labels = torch.randn(B, 2, 3, dtype=F64), torch.arange(B)
    torch.manual_seed(7)
    loss = method.losses({"x0": x0, "labels": labels}, phase="model")["consistency"]
    torch.manual_seed(7)
    t = torch.rand(B)
    noise = torch.randn_like(x0)
    end = (torch.ceil(3 * t) - 1) / 3
    r = torch.maximum(t - 0.1, end)
    fixed = torch.tensor(0.8 if target_decay else 0.5, dtype=F64)
    shift = along(labels, x0)
    velocities = []
    for scale, time in ((model.scale, t), (fixed, r)):
        x, _ = interpolate(x0, time, noise)
        velocities.append(scale * x + shift)
    expected = literal(*velocities, x0, noise, t, r, end, 0.2).mean()
    expected = expected * (6 if reduction == "sum" else 1)
    # Times are float32: t - e and t - r carry its rounding, 6e-8 of values down to about 0.1.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(each, model.scale)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
    target_call = (method.target if target_decay else model).calls[0]
    assert not target_call["training"]
    assert torch.equal(target_call["t"], r)
    assert torch.equal(model.calls[-1]["t"], t)
    assert model.calls[-1]["training"]


def test_the_same_seed_gives_the_same_loss():
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        values.append(ConsistencyFM(Linear()).losses({"x0": torch.randn(5, 4)})["consistency"])
    assert torch.equal(*values)


def test_dropped_conditions_are_the_same_for_both_networks():
    model = Linear()
    method = ConsistencyFM(
        model, drop_condition=0.5, null_conditions=lambda c: {"labels": 0 * c["labels"] - 1}
    )
    method.losses({"x0": torch.zeros(64, 2), "labels": torch.ones(64, dtype=torch.int64)})
    seen = model.calls[0]["labels"]
    assert {*seen.tolist()} == {1, -1}
    assert torch.equal(seen, method.target.calls[0]["labels"])


def test_times_of_16_bits_are_widened_first():
    """Differences of times would otherwise be rounded to their three digits."""
    operands = [x.float() for x in draws(6, 3, 0.1)]
    narrow = [*operands[:4], *(time.bfloat16() for time in operands[4:])]
    wide = [*operands[:4], *(time.float() for time in narrow[4:])]
    assert torch.equal(consistency_flow_matching(*narrow), consistency_flow_matching(*wide))


@pytest.mark.parametrize("segments", range(1, 65))
def test_a_boundary_begins_the_segment_below_it(segments):
    method = ConsistencyFM(Linear(), segments=segments)
    boundaries = torch.arange(segments + 1) / segments
    assert torch.equal(method.segment_end(boundaries[1:]), boundaries[:-1])


@pytest.mark.parametrize("segments", [1, 2, 3, 7])
def test_segments_end_at_even_times_and_begin_where_the_one_above_ends(segments):
    method = ConsistencyFM(Linear(), segments=segments)
    t = torch.rand(10_000)
    end = method.segment_end(t)
    assert {round(e * segments, 4) for e in end.tolist()} == {*range(segments)}
    assert bool((end <= t).all())
    assert bool((t - end <= 1 / segments + 1e-6).all())  # float32's i/K
    boundaries = torch.arange(1, segments + 1) / segments
    torch.testing.assert_close(method.segment_end(boundaries), boundaries - 1 / segments)
    assert method.segment_end(torch.zeros(1)).item() == 0


class OnePoint(nn.Module):
    """The exact velocity of data that is one point: straight flows. At t = 0 it has no say."""

    def __init__(self, point):
        super().__init__()
        self.point = nn.Parameter(point)

    def forward(self, x, t):
        t = along(t, x)
        return torch.where(t > 0, (x - self.point) / t.clamp(min=1e-6), 1e3)


@pytest.mark.parametrize("segments", [1, 3])
def test_an_exact_straight_flow_has_no_loss_and_no_gradient(segments):
    """And the network's value at the segment's end, 1000 at t = 0, is not in it."""
    torch.manual_seed(0)
    point = torch.randn(4, dtype=F64)
    method = ConsistencyFM(OnePoint(point), segments=segments, delta=0.05, t_range=(0.05, 1.0))
    loss = method.losses({"x0": point.expand(4096, 4).clone()})["consistency"]
    assert float(loss.detach()) < 1e-10  # float32 times: (6e-8/0.05)² of values of about 1
    (gradient,) = torch.autograd.grad(loss, method.model.point)
    assert float(gradient.abs().max()) < 1e-5


# ---- the Gaussian case --------------------------------------------------------------------------


SPREAD = 0.5


def spread(t):
    """S(t)², the variance of x_t."""
    return ((1 - t) * SPREAD) ** 2 + t**2


class Recursion(nn.Module):
    """a(t)·x with a(t) = β u(t) + (1-β) a(r) c(r, t): the method's solution for N(0, SPREAD²).

    u(t)·x is the exact velocity E[w|x_t], c(r, t)·x = E[x_r|x_t]. Two weights of no effect let the
    gradient be looked at.
    """

    def __init__(self, segments, delta, alpha, exact=False):
        super().__init__()
        self.segments, self.delta, self.alpha, self.exact = segments, delta, alpha, exact
        self.free = nn.Parameter(torch.zeros(2, dtype=F64))

    @staticmethod
    def u(t):
        return (t - (1 - t) * SPREAD**2) / spread(t)

    def a(self, t):
        end = (torch.ceil(t * self.segments) - 1).clamp(min=0) / self.segments
        steps = torch.ceil((t - end) / self.delta).clamp(min=1) - 1
        time = t - steps * self.delta  # the lowest of t, t - Δ, …: its r is the end
        value = self.u(time)
        for k in range(int(steps.max())):
            r, rising = time, steps > k
            now = torch.where(rising, t - (steps - k - 1) * self.delta, time)
            span = now - end
            beta = span * self.delta / (span**2 + self.alpha)
            c = ((1 - r) * (1 - now) * SPREAD**2 + r * now) / spread(now)
            value = torch.where(rising, beta * self.u(now) + (1 - beta) * value * c, value)
            time = now
        return value

    def forward(self, x, t):
        t = t.double()
        a = self.u(t) if self.exact else self.a(t)
        free = self.free[0] + self.free[1] * t
        return ((a + free)[:, None] * x.double()).to(x.dtype)


def free_gradients(model, **options):
    """[8, 2] gradients in the weights of no effect, each over 2¹⁶ samples."""
    torch.manual_seed(0)
    method = ConsistencyFM(model, t_range=(1e-3, 1.0), **options)
    rows = []
    for _ in range(8):
        loss = method.losses({"x0": SPREAD * torch.randn(1 << 16, 1, dtype=F64)})["consistency"]
        rows.append(torch.autograd.grad(loss, model.free)[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("segments", "delta", "alpha"), [(1, 0.1, 0.0), (2, 0.1, 0.05), (2, 0.013, 1e-5), (1, 1.0, 0.0)]
)
def test_the_gaussian_solution_has_no_expected_gradient(segments, delta, alpha):
    options = {"segments": segments, "delta": delta, "alpha": alpha}
    rows = free_gradients(Recursion(**options), **options)
    error = rows.std(0) / len(rows) ** 0.5
    assert (rows.mean(0).abs() < 5 * error).all()
    # The exact velocity of the curved flow is no solution, unless Δ spans the segment.
    exact = free_gradients(Recursion(**options, exact=True), **options)
    curved = (exact.mean(0).abs() > 10 * error).any()
    assert curved == (delta < 1 / segments)


def test_as_delta_falls_a_step_ends_where_the_exact_flow_does():
    """S(e)/S(t)·x at first order in Δ: ten times smaller, ten times nearer."""
    t = torch.linspace(0.1, 1, 10, dtype=F64)
    for segments in (1, 2):
        end = (torch.ceil(t * segments) - 1).clamp(min=0) / segments
        exact = (spread(end) / spread(t)).sqrt()
        errors = []
        for delta in (1e-2, 1e-3):
            model = Recursion(segments, delta, 0.0)
            errors.append((1 - (t - end) * model.a(t) - exact).abs().max())
        assert errors[1] < 2e-3
        assert 8 < errors[0] / errors[1] < 12


def test_delta_of_a_whole_segment_is_weighted_flow_matching():
    """Every r is 0: the exact mixture velocity then has no expected gradient."""
    torch.manual_seed(0)
    mixture = GaussianMixture(torch.tensor([[1.0, 0.0], [-0.5, 0.8]]), 0.4)

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale, dtype=F64))

        def forward(self, x, t):
            return self.scale * mixture(x, t)

    for scale, solved in ((1.0, True), (0.9, False)):
        method = ConsistencyFM(Scaled(scale), segments=1, delta=1.0, target_decay=0.0)
        rows = []
        for _ in range(8):
            loss = method.losses({"x0": mixture.sample(1 << 14)})["consistency"]
            rows.append(torch.autograd.grad(loss, method.model.scale)[0])
        gradient = torch.stack(rows)
        near = gradient.mean().abs() < 5 * gradient.std() / len(rows) ** 0.5
        assert bool(near) == solved


# ---- the average, options, sampling -------------------------------------------------------------


def test_the_target_is_a_moving_average_of_the_model():
    model = Linear(1.0)
    method = ConsistencyFM(model, target_decay=0.9)
    assert method.phases() == (Phase("model", ("model",)),)
    assert not method.target.scale.requires_grad
    with torch.no_grad():
        model.scale.fill_(2.0)
        model.offset.fill_(3.0)
    method.after_step()
    assert float(method.target.scale) == pytest.approx(1.1)
    assert float(method.target.offset) == 3.0
    assert not method.train().target.training
    assert model.training
    assert ConsistencyFM(Linear(), target_decay=0.0).after_step() is None


def test_the_state_holds_the_target():
    method = ConsistencyFM(Linear(1.0), target_decay=0.9)
    with torch.no_grad():
        method.target.scale.fill_(5.0)
    other = ConsistencyFM(Linear(0.0), target_decay=0.9)
    other.load_state_dict(method.state_dict())
    assert other.target.scale.item() == 5.0
    assert other.model.scale.item() == 1.0


def test_generate_walks_even_euler_steps():
    model = Linear()
    noise = torch.randn(3, 2)
    for steps in (1, 2, 5):
        images = ConsistencyFM(model, segments=2).generate(noise, steps)
        assert torch.equal(images, sample(model, noise, uniform(steps)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments is 0"),
        ({"segments": 2.0}, r"segments is 2\.0"),
        ({"delta": 0.0}, r"delta is 0\.0"),
        ({"delta": 1.5}, r"delta is 1\.5"),
        ({"alpha": -1e-5}, "alpha is -1e-05"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"target_decay": 1.0}, r"target_decay is 1\.0"),
        ({"drop_condition": 2.0}, r"drop_condition is 2\.0"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyFM(Linear(), **options)


def test_weights_of_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"model has weights in torch\.bfloat16"):
        ConsistencyFM(nn.Linear(2, 2, dtype=torch.bfloat16))
