"""What the tests of the Bellman schedules hold them against."""

from __future__ import annotations

import itertools

import torch

from flowkernels.nn import GaussianMixture
from flowkernels.ode import Schedule

Tensor = torch.Tensor
# Pairs further apart than one step: an Euler teacher's cost of one step is zero.
FAR = 2


def roll(velocity, x, times) -> tuple[Tensor, Tensor]:
    """Euler states [N+1, B, ...] and velocities [N, B, ...], times as they are."""
    states, velocities = [x], []
    for t, t_next in itertools.pairwise(times.tolist()):
        velocities.append(velocity(states[-1], torch.full((len(x),), t, dtype=torch.float64)))
        states.append(states[-1] + (t_next - t) * velocities[-1])
    return torch.stack(states), torch.stack(velocities)


def pairwise(x: Tensor, v: Tensor, times: Tensor, power: float = 2) -> Tensor:
    """The definition, pair by pair: [B, N+1, N+1]."""
    x, v = x.flatten(2) if x.dim() > 2 else x[..., None], v.reshape(*v.shape[:2], -1)
    N, B = v.shape[:2]
    cost = torch.zeros(B, N + 1, N + 1, dtype=torch.float64)
    for j in range(N):
        for k in range(j + 1, N + 1):
            error = x[k] - x[j] - (times[k] - times[j]) * v[j]
            cost[:, j, k] = error.double().norm(dim=1) ** power
    return cost


def uneven(N: int, seed: int = 0) -> Schedule:
    """A grid whose steps differ by factors."""
    steps = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    times = 1 - steps.cumsum(0) / steps.sum()
    return Schedule(torch.cat([torch.ones(1), times[:-1], torch.zeros(1)]))


def mixture(D: int, spread: float = 2.0, width: float = 0.3) -> GaussianMixture:
    """Six modes; the velocity bends where they part."""
    means = torch.randn(6, D, generator=torch.Generator().manual_seed(5)) * spread
    return GaussianMixture(means, width)


def worst(found: Tensor, truth: Tensor) -> float:
    """The largest relative error over pairs that are at least FAR steps apart."""
    far = torch.ones_like(truth, dtype=torch.bool).triu(FAR)
    return float(((found - truth).abs() / truth)[far].max())


def brute_force(cost: Tensor, K: int, discount: float = 1.0) -> tuple[float, list[int]]:
    """The best of all paths of K jumps, the first in lexical order among equal ones.

    Summed from the end, as the recursion does, so that equal paths have equal bits.
    """
    N = len(cost) - 1
    best: tuple[float, list[int]] = (float("inf"), [])
    for inner in itertools.combinations(range(1, N), K - 1):
        stops = [0, *inner, N]
        total = float(cost[stops[-2], N])
        for j, k in reversed(list(itertools.pairwise(stops[:-1]))):
            total = float(cost[j, k]) + discount * total
        if total < best[0]:
            best = total, stops
    return best
