"""FlowMatching: its loss, dropped conditions, times, and generation."""

import pytest
import torch
from torch import nn

from flowkernels.distill import FlowMatching, Method, Phase
from flowkernels.distill.times import TimeSampling
from flowkernels.ode import sample, shifted

CLASSES = 4


class Recorder(nn.Module):
    """Remembers what it was called with; its velocity is scale·x + label."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def forward(self, x, t, labels=None, pooled=None):
        call = {"x": x, "t": t, "labels": labels, "pooled": pooled, "training": self.training}
        self.calls.append(call)
        shift = 0 if labels is None else labels.view(-1, *[1] * (x.dim() - 1))
        return self.scale * x + shift

    def null_conditions(self, conditions):
        nothing = {"labels": CLASSES, "pooled": 0}
        return {name: torch.full_like(value, nothing[name]) for name, value in conditions.items()}


def test_loss_and_gradient_equal_the_formula():
    model = Recorder()
    method = FlowMatching(model, drop_condition=0.0)
    x0 = torch.randn(5, 2, 3, 3)
    loss = method.losses({"x0": x0})["flow_matching"]
    loss.backward()
    x_t, t = model.calls[0]["x"], model.calls[0]["t"]
    s = t.view(-1, 1, 1, 1)
    noise = (x_t - (1 - s) * x0) / s
    residual = (0.5 * x_t - (noise - x0)).detach()
    # the noise is recovered by a division by t
    torch.testing.assert_close(loss, residual.square().mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.scale.grad, (2 * residual * x_t).mean(), rtol=1e-3, atol=1e-3)


def test_sum_reduction_is_over_elements_and_mean_over_batch():
    losses = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        method = FlowMatching(Recorder(), reduction=reduction)
        losses.append(method.losses({"x0": torch.ones(5, 2, 3, 3)})["flow_matching"])
    torch.testing.assert_close(losses[1], losses[0] * 18)


def test_conditions_are_dropped_with_the_given_probability_and_together():
    torch.manual_seed(0)
    model = Recorder()
    method = FlowMatching(model, drop_condition=0.25)
    labels, pooled = torch.randint(0, CLASSES, (20_000,)), torch.ones(20_000, 2)
    method.losses({"x0": torch.zeros(20_000, 1), "labels": labels, "pooled": pooled})
    seen = model.calls[0]
    dropped = seen["labels"] == CLASSES
    # five standard deviations of a proportion at 20,000 draws
    assert abs(dropped.float().mean() - 0.25) < 0.016
    assert torch.equal(seen["labels"][~dropped], labels[~dropped])
    assert torch.equal(seen["pooled"][:, 0] == 0, dropped)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 1), (1.0, CLASSES)])
def test_drop_never_and_always(probability, expected):
    model = Recorder()
    labels = torch.ones(50, dtype=torch.int64)
    FlowMatching(model, drop_condition=probability).losses(
        {"x0": torch.zeros(50, 1), "labels": labels}
    )
    assert (model.calls[0]["labels"] == expected).all()


def test_custom_null_conditions():
    model = Recorder()
    method = FlowMatching(
        model, drop_condition=1.0, null_conditions=lambda c: {"labels": 0 * c["labels"] - 7}
    )
    method.losses({"x0": torch.zeros(3, 1), "labels": torch.ones(3, dtype=torch.int64)})
    assert (model.calls[0]["labels"] == -7).all()


def test_time_laws():
    torch.manual_seed(0)
    device = torch.device("cpu")
    uniform = TimeSampling("uniform", (0.2, 0.6))(100_000, device)
    assert 0.2 <= uniform.min() < 0.201
    assert 0.599 < uniform.max() < 0.6
    assert abs(uniform.mean() - 0.4) < 0.002
    bell = TimeSampling("logit-normal", (0.0, 1.0), 0.5, 0.8)(100_000, device)
    logit = torch.logit(bell.double())
    # five standard errors of a mean and of a deviation at 100,000 draws
    assert abs(logit.mean() - 0.5) < 0.013
    assert abs(logit.std() - 0.8) < 0.01
    assert uniform.dtype == bell.dtype == torch.float32


def test_generate_is_the_sampler_in_evaluation_mode():
    model = Recorder().train()
    method = FlowMatching(model, sampler="heun", shift=3.0, guidance=2.0)
    noise, labels = torch.randn(6, 2), torch.arange(6) % CLASSES
    x = method.generate(noise, 5, labels=labels)
    assert model.training
    assert not any(call["training"] for call in model.calls)
    assert {len(call["x"]) for call in model.calls} == {12}
    expected = sample(
        model, noise, shifted(5, 3.0), method="heun", guidance=2.0, conditions={"labels": labels}
    )
    assert torch.equal(x, expected)
    other = Recorder()
    method.generate(noise, 2, other)
    assert len(other.calls) == 4


def test_phases_and_deploy():
    method = FlowMatching(Recorder())
    assert method.phases() == (Phase("model", ("model",)),)
    assert method.deployed(None) is method.model
    assert isinstance(method, Method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_condition": 1.5}, "drop_condition is 1.5"),
        ({"t_sampling": "beta"}, "t_sampling is 'beta'"),
        ({"t_range": (0.9, 0.1)}, "t_range is"),
        ({"logit_mean": float("nan")}, "logit_mean is nan"),
        ({"guidance": None}, "guidance is None"),
        ({"sampler": "dopri5"}, "sampler is 'dopri5'"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(Recorder(), **options)


def test_bad_phase_and_missing_null_conditions_are_named():
    with pytest.raises(ValueError, match="networks is 'fake'"):
        Phase("fake", "fake")
    with pytest.raises(ValueError, match="repeats is 0"):
        Phase("fake", ("fake",), 0)
    with pytest.raises(ValueError, match="phase is 'fake'"):
        FlowMatching(Recorder()).losses({"x0": torch.zeros(2, 1)}, phase="fake")
    method = FlowMatching(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="drop_condition needs unconditional inputs"):
        method.losses({"x0": torch.zeros(2, 1), "labels": torch.zeros(2)})
