"""FlowMatching(contrastive=λ): the literal loss, the draw of negatives, the exact optimum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowkernels.distill import FlowMatching
from flowkernels.distill.flow_matching import others
from flowkernels.losses import interpolate
from flowkernels.nn import GaussianMixture

F64 = torch.float64
CPU = torch.device("cpu")


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, x, t, labels=None):
        shift = 0 if labels is None else labels.view(-1, *[1] * (x.dim() - 1))
        return self.scale.to(x.dtype) * x + shift


def loss_of(contrastive, x0, *, seed=0, reduction="mean", **conditions):
    torch.manual_seed(seed)
    model = Linear()
    method = FlowMatching(model, contrastive=contrastive, drop_condition=0.0, reduction=reduction)
    loss = method.losses({"x0": x0, **conditions}, phase="model")["flow_matching"]
    return loss, torch.autograd.grad(loss, model.scale)[0]


@pytest.mark.parametrize("B", [2, 3, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_the_literal_formula_of_its_own_draws(B, reduction):
    x0, labels = torch.randn(B, 2, 3, dtype=F64), torch.arange(B)
    ours = loss_of(0.3, x0, reduction=reduction, labels=labels)
    torch.manual_seed(0)
    model = Linear()
    t, noise = torch.rand(B), torch.randn_like(x0)
    distance = int(torch.randint(1, B, (1,)))
    u = noise - x0
    x_t = interpolate(x0, t, noise)[0]
    v = model(x_t, t, labels)
    squares = (v - u).square() - 0.3 * (v - u.roll(-distance, 0)).square()
    expected = squares.mean() if reduction == "mean" else squares.sum() / B
    torch.testing.assert_close(ours[0], expected, rtol=1e-12, atol=1e-14)
    gradient = torch.autograd.grad(expected, model.scale)[0]
    torch.testing.assert_close(ours[1], gradient, rtol=1e-12, atol=1e-14)


def test_lambda_zero_draws_nothing_more_than_plain_flow_matching():
    x0 = torch.randn(4, 3)
    loss_of(0.0, x0)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(4), torch.randn(4, 3)
    assert torch.equal(after, torch.get_rng_state())


def test_a_batch_of_one_is_plain_flow_matching():
    x0 = torch.randn(1, 3)
    for ours, plain in zip(loss_of(0.5, x0), loss_of(0.0, x0), strict=True):
        assert torch.equal(ours, plain)


def test_the_same_seed_gives_the_same_loss():
    x0 = torch.randn(6, 3)
    assert torch.equal(loss_of(0.1, x0)[0], loss_of(0.1, x0)[0])
    assert not torch.equal(loss_of(0.1, x0)[0], loss_of(0.1, x0, seed=1)[0])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_negatives_are_others_each_once_and_each_as_likely(count):
    torch.manual_seed(0)
    tally = torch.zeros(count, count)
    draws = 2000
    for _ in range(draws):
        negatives = others(count, CPU)
        assert sorted(negatives.tolist()) == [*range(count)]
        tally[torch.arange(count), negatives] += 1
    assert (tally.diagonal() == 0).all()
    share = 1 / (count - 1)
    off = tally[~torch.eye(count, dtype=torch.bool)] / draws
    # five standard deviations of a proportion (none where there is one other item only)
    assert ((off - share).abs() <= 5 * (share * (1 - share) / draws) ** 0.5).all()


class Affine(nn.Module):
    """a·u(x, t) + b·m of an exact mixture velocity u and its data's mean m."""

    def __init__(self, mixture, a, b):
        super().__init__()
        self.mixture = mixture
        self.coefficients = nn.Parameter(torch.tensor([a, b], dtype=F64))
        self.register_buffer("mean", mixture.means.mean(0))

    def forward(self, x, t):
        a, b = self.coefficients
        return a * self.mixture(x, t) + b * self.mean


@pytest.mark.parametrize("lam", [0.05, 0.4])
def test_the_optimum_is_the_shifted_and_scaled_velocity(lam):
    """(u + λm)/(1-λ): a negative's velocity averages to -m, whatever x_t is. u is no optimum."""
    mixture = GaussianMixture(torch.tensor([[1.0, 0.3], [-0.4, 0.9], [1.2, 1.5]]), 0.3)
    for a, b, solved in ((1 / (1 - lam), lam / (1 - lam), True), (1.0, 0.0, False)):
        torch.manual_seed(0)
        method = FlowMatching(Affine(mixture, a, b), contrastive=lam)
        rows = []
        for _ in range(16):
            loss = method.losses({"x0": mixture.sample(1 << 14)})["flow_matching"]
            rows.append(torch.autograd.grad(loss, method.model.coefficients)[0])
        gradients = torch.stack(rows)
        error = gradients.std(0) / len(rows) ** 0.5
        assert bool((gradients.mean(0).abs() < 5 * error).all()) == solved


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "much", True])
def test_bad_lambda_is_named(value):
    with pytest.raises(ValueError, match="contrastive is"):
        FlowMatching(Linear(), contrastive=value)
