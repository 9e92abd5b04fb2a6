"""FGM against the Gaussian case, where every network is known in closed form (docs/fgm.md).

Data N(0, 1), generator g(z) = θz + μ, t uniform, the fake optimal:
v(x, t) = a(x - (1-t)μ) - μ with a = (t - (1-t)θ²)/S, S = (1-t)²θ² + t²; the teacher the same
with θ = 1, μ = 0. At θ = .5, μ = .3 the gradient in (θ, μ) is (-0.785, 0.471) for the exact
objective L1 + L2, (0.262, -0.157) for L1 alone and (-1.047, 0.628) for L2 alone.
"""

import math

import pytest
import torch
from torch import nn

from flowkernels.distill import FGM
from flowkernels.losses import fgm, interpolate

SAMPLES = 1 << 20
BATCHES = 8
FULL, L1, L2 = (-0.785, 0.471), (0.262, -0.157), (-1.047, 0.628)


class GaussianVelocity(nn.Module):
    """The exact velocity of N(μ, θ²), with constants that do not learn."""

    def __init__(self, theta, mu):
        super().__init__()
        self.theta, self.mu = theta, mu
        self.weight = nn.Parameter(torch.zeros(()))  # FGM asks for something to train

    def forward(self, x, t):
        t = t.view(-1, 1)
        S = (1 - t) ** 2 * self.theta**2 + t**2
        a = (t - (1 - t) * self.theta**2) / S
        return a * (x - (1 - t) * self.mu) - self.mu + 0 * self.weight


class AffineGenerator(nn.Module):
    """The velocity at t* = 1 whose one step is z - v = θz + μ."""

    def __init__(self, theta, mu):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))
        self.mu = nn.Parameter(torch.tensor(mu))

    def forward(self, x, t):
        return x - (self.theta * x + self.mu)


def gradients(theta, mu, lam, **options):
    """[BATCHES, 2] gradients in (θ, μ) through `FGM`, each over SAMPLES / BATCHES samples."""
    torch.manual_seed(0)
    generator = AffineGenerator(theta, mu)
    method = FGM(
        GaussianVelocity(1.0, 0.0),
        generator=generator,
        fake=GaussianVelocity(theta, mu),
        lam=lam,
        **options,
    )
    batch = {"x0": torch.zeros(SAMPLES // BATCHES, 1)}
    rows = []
    for _ in range(BATCHES):
        loss = method.losses(batch, phase="generator")["generator"]
        rows.append(torch.stack(torch.autograd.grad(loss, [generator.theta, generator.mu])))
    return torch.stack(rows).double()


def assert_mean_is(rows, expected):
    """To five standard errors, themselves small enough that the assertion means something."""
    error = rows.std(0) / len(rows) ** 0.5
    assert (error < 0.01).all()
    # 0.0005: the expected values are given to three decimals.
    assert ((rows.mean(0) - torch.tensor(expected)).abs() < 5 * error + 0.0005).all(), rows.mean(0)


@pytest.mark.parametrize("split_vjp", [False, True])
def test_gaussian_oracle_full_objective(split_vjp):
    assert_mean_is(gradients(0.5, 0.3, lam=1.0, split_vjp=split_vjp), FULL)


def test_gaussian_oracle_L2_alone():
    assert_mean_is(gradients(0.5, 0.3, lam=0.0), L2)


def test_gaussian_oracle_L1_alone():
    # The family is L2 + λ L1, and the same seed draws the same z, t and ε for every λ.
    assert_mean_is(gradients(0.5, 0.3, lam=1.0) - gradients(0.5, 0.3, lam=0.0), L1)


@pytest.mark.parametrize("weighting", [None, "t2(1-t)", "sid"])
def test_gradient_vanishes_at_the_true_solution(weighting):
    assert_mean_is(gradients(1.0, 0.0, lam=0.0, weighting=weighting), (0.0, 0.0))


def test_trap_z_reused_as_interpolation_noise():
    """With ε = z the gradient in θ at the true solution is π/2 - 1 = 0.57 instead of 0.

    Then x_t = ((1-t)θ + t) z and w = (1-θ) z, so the fake's optimum is a straight line:
    v(x, t) = (1-θ)/((1-t)θ + t) x, zero at θ = 1. The fake is optimal, and yet d = u ≠ 0.
    """
    torch.manual_seed(0)
    teacher = GaussianVelocity(1.0, 0.0)
    generator = AffineGenerator(1.0, 0.0)
    rows = []
    for _ in range(BATCHES):
        z, t = torch.randn(SAMPLES // BATCHES, 1), torch.rand(SAMPLES // BATCHES)
        x0 = z - generator(z, torch.ones_like(t))
        x_t, noise = interpolate(x0, t, z)
        loss = fgm(teacher(x_t, t), torch.zeros_like(x_t), x0, noise, t, lam=1.0)
        rows.append(torch.stack(torch.autograd.grad(loss, [generator.theta, generator.mu])))
    assert_mean_is(torch.stack(rows).double(), (math.pi / 2 - 1, 0.0))


def test_method_never_reuses_z_as_noise(monkeypatch):
    """The generator's z and every ε of a step are different draws."""
    from flowkernels.distill import fgm as module
    from flowkernels.distill import input_gradient

    seen = []

    def spy(x0, t, noise=None, **options):
        x_t, noise = interpolate(x0, t, noise, **options)
        seen.append(noise)
        return x_t, noise

    inputs = []

    class Recorder(AffineGenerator):
        def forward(self, x, t):
            inputs.append(x.detach())
            return super().forward(x, t)

    monkeypatch.setattr(module, "interpolate", spy)
    monkeypatch.setattr(input_gradient, "interpolate", spy)
    method = FGM(
        GaussianVelocity(1.0, 0.0), generator=Recorder(1.0, 0.0), fake=GaussianVelocity(1.0, 0.0)
    )
    method.losses({"x0": torch.zeros(4096, 1)})
    draws = torch.stack([*inputs, *seen]).squeeze(-1)
    assert len(draws) == 4
    # Independent draws of 4096 correlate by 1/64; a reused one by 1.
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.1
