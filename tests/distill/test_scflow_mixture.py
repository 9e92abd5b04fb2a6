"""SCFlow on an exact teacher: one student that beats it in one step and in two."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from flowkernels.distill import SCFlow
from flowkernels.nn import GaussianMixture, energy_distance
from flowkernels.ode import sample, uniform

STEPS, BATCH = 250, 256


class Corrected(nn.Module):
    """The exact teacher and a correction to it, zero at first."""

    def __init__(self, teacher: nn.Module, width: int = 64) -> None:
        super().__init__()
        self.teacher = teacher
        self.layers = layers(2 + 1 + 8, width, 2)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t):
        angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        features = torch.cat([x, t[:, None], angles.sin(), angles.cos()], 1)
        return self.teacher(x, t) + self.layers(features)


class Judge(nn.Module):
    """Logits of points of the plane."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = layers(2, width, 1)

    def forward(self, x, t=None):
        return self.layers(x).squeeze(1)


def layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    sizes = [inputs, width, width]
    hidden = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, outputs))


@pytest.fixture
def one_thread():
    """Threads cannot share operators this small, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(exact, judge=None, **options):
    method = SCFlow(exact, judge, student=Corrected(exact), **options)
    rates = {"student": 2e-3, "discriminator": 4e-3}
    optimizers = {
        phase.name: torch.optim.Adam(
            (p for p in method.get_submodule(phase.name).parameters() if p.requires_grad),
            rates[phase.name],
        )
        for phase in method.phases()
    }
    for step in range(STEPS):
        batch = {"x0": exact.sample(BATCH)}
        for phase in method.phases():
            optimizer = optimizers[phase.name]
            optimizer.param_groups[0]["lr"] = rates[phase.name] * (1 - step / STEPS)
            optimizer.zero_grad()
            sum(method.losses(batch, phase.name).values()).backward()
            optimizer.step()
        method.after_step()
    return method


@pytest.mark.usefixtures("one_thread")
def test_one_student_beats_its_teacher_in_one_step_and_in_two():
    torch.manual_seed(0)
    angles = torch.arange(5) * (2 * math.pi / 5)
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    exact = GaussianMixture(means, 0.3, dtype=torch.float32)
    method = trained(copy.deepcopy(exact), Judge(), delta=0.2, gan=0.1, gan_warmup=50)
    truth, noise = exact.sample(2000), torch.randn(2000, 2)
    found = {
        steps: (
            energy_distance(sample(exact, noise, uniform(steps)), truth).item(),
            energy_distance(method.generate(noise, steps), truth).item(),
        )
        for steps in (1, 2)
    }
    # A fifteenth and less was seen over three seeds, of 1.45 in one step and 0.18 in two.
    for steps in (1, 2):
        before, after = found[steps]
        assert after < before / 8, found
