"""SiD (arXiv 2404.04057) is FGM with λ = 2(1 - α): its loss written out, against the method.

In SiD's terms: f_φ = x_t - t·u and f_ψ = x_t - t·v are the denoisers of teacher and fake, x_g the
generated sample, and the generator descends on

    (1-α) ω ‖f_φ - f_ψ‖² + ω ⟨f_φ - f_ψ, f_ψ - x_g⟩,   ω = 1 / sg[mean |x_g - f_φ|].
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flowkernels.distill import FGM
from flowkernels.losses import interpolate

F64 = torch.float64


class Network(nn.Module):
    """A small curved velocity in float64."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 16, dtype=F64)
        self.second = nn.Linear(16, 5, dtype=F64)

    def forward(self, x, t):
        return self.second(torch.tanh(self.first(torch.cat([x, t.to(F64)[:, None]], 1))))


def sid_loss(teacher, fake, generator, z, t, noise, alpha):
    """The definition, with denoisers; t stays float32 where the networks see it."""
    x_g = z - generator(z, torch.ones(len(z)))
    x_t = interpolate(x_g, t, noise)[0]
    time = t.to(F64)[:, None]
    f_phi = x_t - time * teacher(x_t, t)
    f_psi = x_t - time * fake(x_t, t)
    weight = 1 / (x_g - f_phi).abs().mean(1).detach()
    squared = (f_phi - f_psi).square().mean(1)
    crossed = ((f_phi - f_psi) * (f_psi - x_g)).mean(1)
    return (weight * ((1 - alpha) * squared + crossed)).mean()


@pytest.mark.parametrize("alpha", [1.2, 1.0, 0.5])
@pytest.mark.parametrize("split_vjp", [False, True])
@pytest.mark.parametrize("B", [1, 7])
def test_sid_is_fgm_with_lambda_two_less_two_alpha(alpha, split_vjp, B):
    teacher, fake, generator = (Network(seed) for seed in range(3))
    method = FGM(
        teacher,
        generator=copy.deepcopy(generator),
        fake=fake,
        lam=2 * (1 - alpha),
        weighting="sid",
        t_range=(0.02, 0.98),
        split_vjp=split_vjp,
    )
    torch.manual_seed(5)
    loss = method.losses({"x0": torch.zeros(B, 5, dtype=F64)}, phase="generator")["generator"]
    ours = torch.autograd.grad(loss, list(method.generator.parameters()))
    torch.manual_seed(5)
    z = torch.randn(B, 5, dtype=F64)
    t = 0.02 + 0.96 * torch.rand(B)
    noise = torch.randn(B, 5, dtype=F64)
    expected = sid_loss(teacher, fake, generator, z, t, noise, alpha)
    # 1e-6: the method's t and its weights are float32; the networks and the loss are float64.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    theirs = torch.autograd.grad(expected, list(generator.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in theirs)
