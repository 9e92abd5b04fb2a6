"""Small networks that SCFlow's tests watch, and its losses written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.distill import SCFlow


class Velocity(nn.Module):
    """A velocity that depends on everything, with "no class" as class 3; it notes its calls."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inward = nn.Linear(size + 1, 16)
        self.classes = nn.Embedding(4, 16)
        self.outward = nn.Linear(16, size)
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls.append((x.detach(), t, torch.is_grad_enabled()))
        labels = torch.full((len(x),), 3) if labels is None else labels
        h = self.inward(torch.cat([x, t[:, None].to(x.dtype)], 1)) + self.classes(labels)
        return self.outward(torch.tanh(h))

    def null_conditions(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"labels": torch.full_like(conditions["labels"], 3)}


class Judge(nn.Module):
    """Logits of points, twice differentiable; it notes its calls."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inward = nn.Linear(size, 16)
        self.classes = nn.Embedding(4, 16)
        self.outward = nn.Linear(16, 1)
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.calls.append((x.detach(), t))
        labels = torch.full((len(x),), 3) if labels is None else labels
        h = self.inward(x) + self.classes(labels)
        if t is not None:
            h = h + t[:, None].to(h.dtype)
        return self.outward(torch.tanh(h)).squeeze(1)


def draws(x0: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ε, t, t', t''), in the order in which the method draws them."""
    noise = torch.randn(x0.shape, dtype=x0.dtype)
    t = torch.rand(len(x0))
    down, up = torch.rand((2, len(x0)))
    return noise, t, t - down * t.clamp(max=delta), t + up * (1 - t).clamp(max=delta)


def literal(method: SCFlow, x0: Tensor, labels: Tensor, null: Tensor) -> dict[str, Tensor]:
    """All losses as the paper writes them: states and endpoints formed, a call for each."""
    noise, t, t_post, t_prev = draws(x0, method.delta)
    T, T_post, T_prev = (time[:, None].to(x0.dtype) for time in (t, t_post, t_prev))

    def f(network: nn.Module, x: Tensor, time: Tensor) -> Tensor:
        return x - time[:, None].to(x.dtype) * network(x, time, labels)

    def rho(d: Tensor) -> Tensor:
        return (d.square() + method.huber**2).sqrt() - method.huber

    x_t = (1 - T) * x0 + T * noise
    v_uncond, v_cond = method.teacher(x_t, t, null), method.teacher(x_t, t, labels)
    v_teacher = v_uncond + method.guidance * (v_cond - v_uncond)
    f_post = f(method.target, x_t - (T - T_post) * v_teacher, t_post)
    f_prev = f(method.target, x_t + (T_prev - T) * v_teacher, t_prev)
    endpoint = f(method.student, x_t, t)
    goal = torch.where(T_post < method.trunc, x0, f_post)
    fake = f(method.student, noise, torch.ones(len(x0)))
    x_r = (1 - T) * fake.detach() + T * noise
    judge, seen = method.discriminator, lambda x: x
    real = x0.clone().requires_grad_()
    times = None
    if method.discriminator_input == "noised":
        again = torch.randn(x0.shape, dtype=x0.dtype)
        seen, times = lambda x: (1 - T_post) * x + T_post * again, t_post
    real_logits = judge(seen(real), times, labels)
    (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    weights = method.weights
    consistency, back = rho(endpoint - goal).mean(), rho(endpoint - f_prev).mean()
    reflow = (f(method.student, x_r, t) - fake.detach()).square().mean()
    fake_logits = judge(seen(fake.detach()), times, labels)
    return {
        "self_corrected": consistency + weights["bidirectional"] * back,
        "gan": weights["gan"] * F.softplus(-judge(seen(fake), times, labels)).mean(),
        "reflow": weights["reflow"] * reflow,
        "discriminator": F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean(),
        "r1": method.r1 / 2 * slope.square().sum(1).mean(),
    }


def gradients(network: nn.Module) -> list[Any]:
    return [parameter.grad for parameter in network.parameters()]
