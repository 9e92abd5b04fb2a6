"""What both discriminators are asked: R1's gradient, and to learn."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def r1(model, x, *arguments, **conditions):
    """Half the mean squared norm of the logits' gradient, differentiable."""
    x = x.detach().requires_grad_()
    logits = model(x, *arguments, **conditions)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1).mean() / 2


def assert_r1_gradient(model, x, *arguments, **conditions):
    """R1's gradient in the weights against central differences along random directions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    value = r1(model, x, *arguments, **conditions)
    assert value > 0
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    torch.manual_seed(7)
    step = 1e-5
    for _ in range(3):
        directions = [torch.randn_like(p) for p in parameters]
        slope = sum(
            (g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None
        )
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * step * direction
            values.append(r1(model, x, *arguments, **conditions).item())
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter -= sign * step * direction
        measured = torch.tensor((values[0] - values[1]) / (2 * step), dtype=torch.float64)
        # The third derivative times step², and rounding over step: far below 1e-5 of the slope.
        scale = max(slope.abs().item(), value.item())
        torch.testing.assert_close(slope.detach(), measured, rtol=0, atol=1e-5 * scale)


def separate(model, noise, *, steps, lr=3e-3, **conditions):
    """Share of fresh samples told right after learning N(0.3, 1) from N(-0.3, 1)."""
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        real, fake = model.pairs(noise() + 0.3, noise() - 0.3, **conditions)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        real, fake = model.pairs(noise() + 0.3, noise() - 0.3, **conditions)
    return torch.cat([real > 0, fake < 0]).float().mean()
