"""The exact mixture velocity against independent computations in float64."""

import math

import pytest
import torch

from flowkernels.nn import (
    GaussianMixture,
    energy_distance,
    mean_log_density,
    mode_spread,
    mode_weights,
)


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    factors = torch.randn(3, 2, 2, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.1 * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(
        2 * torch.randn(3, 2, dtype=torch.float64), covariances, torch.tensor([1.0, 2.0, 5.0])
    )


def naive(mixture, x, t):
    """(velocity, log density of x_t), one sample and one component at a time."""
    velocities, densities = [], []
    for row, time in zip(x, t, strict=True):
        logs, values = [], []
        for k in range(len(mixture.means)):
            Q = mixture.axes[k]
            S = Q @ torch.diag(mixture.variances[k]) @ Q.mT
            C = time**2 * torch.eye(2, dtype=torch.float64) + (1 - time) ** 2 * S
            mean = (1 - time) * mixture.means[k]
            law = torch.distributions.MultivariateNormal(mean, C)
            logs.append(mixture.log_weights[k] + law.log_prob(row))
            gain = (time * torch.eye(2, dtype=torch.float64) - (1 - time) * S) @ torch.linalg.inv(C)
            values.append(gain @ (row - mean) - mixture.means[k])
        logs = torch.stack(logs)
        velocities.append((logs.softmax(0)[:, None] * torch.stack(values)).sum(0))
        densities.append(logs.logsumexp(0))
    return torch.stack(velocities), torch.stack(densities)


def test_velocity_and_density_equal_the_formula(mixture):
    x = 3 * torch.randn(20, 2, dtype=torch.float64)
    t = torch.linspace(0, 1, 20, dtype=torch.float64)
    velocity, density = naive(mixture, x, t)
    # float64 rounding through an inverse of condition number below 100
    torch.testing.assert_close(mixture(x, t), velocity, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.log_prob(x, t), density, rtol=1e-10, atol=1e-10)


def test_velocity_is_x_minus_endpoint_over_t(mixture):
    x = torch.randn(50, 2, dtype=torch.float64)
    t = 0.05 + 0.95 * torch.rand(50, dtype=torch.float64)
    by_endpoint = (x - mixture.endpoint(x, t)) / t[:, None]
    torch.testing.assert_close(mixture(x, t), by_endpoint, rtol=1e-10, atol=1e-10)


def test_velocity_is_the_conditional_mean_of_noise_minus_data(mixture):
    """E[w·f(x_t)] = E[v(x_t)·f(x_t)] for any f: the property that flow matching learns."""
    torch.manual_seed(1)
    N, t = 1 << 18, 0.4
    x0 = mixture.sample(N)
    noise = torch.randn_like(x0)
    x_t = (1 - t) * x0 + t * noise
    gap = mixture(x_t, torch.full((N,), t)) - (noise - x0)
    for f in (torch.ones_like(x_t), x_t, torch.sin(3 * x_t)):
        products = gap * f
        assert (products.mean(0).abs() < 5 * products.std(0) / math.sqrt(N)).all()


def test_velocity_solves_the_continuity_equation(mixture):
    """∂p/∂t + ∇·(p v) = 0, as ∂ log p/∂t + v·∇log p + ∇·v, by automatic differentiation."""
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.1, 0.9, 10, dtype=torch.float64, requires_grad=True)
    score, rate = torch.autograd.grad(mixture.log_prob(x, t).sum(), [x, t])
    v = mixture(x, t)
    divergence = sum(
        torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    residual = rate + (v * score).sum(1) + divergence
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-9)


def test_shapes_dtypes_and_single_gaussian():
    mixture = GaussianMixture(torch.zeros(1, 12), 0.5)
    x = torch.randn(4, 3, 2, 2)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    v = mixture(x, t)
    assert v.shape == x.shape
    assert v.dtype == torch.float32
    s = t.view(-1, 1, 1, 1)
    expected = (s - (1 - s) * 0.25) / (s**2 + (1 - s) ** 2 * 0.25) * x
    torch.testing.assert_close(v, expected)


def test_samples_have_the_mixtures_law(mixture):
    draws = mixture.sample(40_000, generator=torch.Generator().manual_seed(0))
    expected = mixture.log_weights.exp()
    # Overlapping modes: compare with the share that the exact posterior assigns on other draws.
    other = mixture.sample(40_000, generator=torch.Generator().manual_seed(1))
    assert (mixture.responsibilities(draws).mean(0) - expected).abs().max() < 0.01
    assert abs(mean_log_density(draws, mixture) - mean_log_density(other, mixture)) < 0.03
    assert abs(energy_distance(draws[:4000], other[:4000])) < 2e-3


def test_metrics_see_what_they_are_for():
    centres = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    mixture = GaussianMixture(centres, 0.5, torch.tensor([0.2, 0.3, 0.5]))
    generator = torch.Generator().manual_seed(0)
    x = mixture.sample(8000, generator=generator)
    y = mixture.sample(8000, generator=generator)
    assert (mode_weights(x, mixture) - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 0.02
    assert (mode_spread(x, mixture) - 1).abs().max() < 0.06
    nearest = mixture.responsibilities(x).argmax(1)
    wide = mixture.means[nearest] + 1.1 * (x - mixture.means[nearest])
    assert (mode_spread(wide, mixture) - 1.21).abs().max() < 0.07
    assert mean_log_density(wide, mixture) < mean_log_density(x, mixture) - 0.1
    lost = x[nearest != 2]
    assert mode_weights(lost, mixture)[2] == 0
    assert mode_spread(lost, mixture)[2].isnan()
    assert energy_distance(lost, y) > 0.5 > 0.01 > abs(energy_distance(x, y))


def test_energy_distance_equals_its_definition_and_ignores_chunking():
    x, y = torch.randn(7, 3), torch.randn(5, 3) + 1
    distance = lambda a, b: torch.linalg.vector_norm((a - b).double())  # noqa: E731
    cross = sum(distance(a, b) for a in x for b in y) / 35
    within_x = sum(distance(a, b) for a in x for b in x) / 42
    within_y = sum(distance(a, b) for a in y for b in y) / 20
    expected = 2 * cross - within_x - within_y
    for chunk in (2, 4096):
        torch.testing.assert_close(energy_distance(x, y, chunk=chunk), expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="means has shape"):
        GaussianMixture(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="weights is"):
        GaussianMixture(torch.zeros(2, 2), 1.0, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="covariances has shape"):
        GaussianMixture(torch.zeros(2, 2), torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="positive definite"):
        GaussianMixture(torch.zeros(1, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="one time per row"):
        GaussianMixture(torch.zeros(1, 2), 1.0)(torch.zeros(3, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="at least two rows"):
        energy_distance(torch.zeros(1, 2), torch.zeros(4, 2))
