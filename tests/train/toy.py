"""The smallest method that has everything a trainer must carry: two networks of two phases, one of
them repeated, a frozen third one, conditions, and draws from every kind of generator."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flowkernels.train.config import OptimConfig, TrainConfig


@dataclass(frozen=True)
class ToyPhase:
    name: str
    networks: tuple[str, ...]
    repeats: int = 1


class ToyNetwork(nn.Module):
    """A velocity of 8x8 greys with a class."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inward = nn.Linear(65, width)
        self.classes = nn.Embedding(10, width)
        self.outward = nn.Linear(width, 64)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        h = self.inward(torch.cat([x.flatten(1), t.to(x.dtype)[:, None]], 1))
        return self.outward(torch.tanh(h + self.classes(labels))).view_as(x)


class ToyMethod(nn.Module):
    deploy = "generator"

    def __init__(self) -> None:
        super().__init__()
        self.generator = ToyNetwork()
        self.fake = copy.deepcopy(self.generator)
        self.teacher = copy.deepcopy(self.generator).requires_grad_(False).eval()

    def phases(self) -> tuple[ToyPhase, ...]:
        return ToyPhase("fake", ("fake",), repeats=2), ToyPhase("generator", ("generator",))

    def losses(self, batch: dict[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        x0, labels = batch["x0"], batch["labels"]
        t = torch.rand(len(x0), device=x0.device)
        noise = torch.randn_like(x0)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        # Python's and numpy's generators count too: a resume must restore them.
        weight = 1.0 + random.random() + float(np.random.rand())  # noqa: NPY002
        network = getattr(self, phase or "generator")
        return {
            phase or "generator": weight * (network(x_t, t, labels) - noise + x0).square().mean()
        }

    def generate(
        self, noise: Tensor, steps: int, network: nn.Module | None = None, **conditions: Tensor
    ) -> Tensor:
        network = self.generator if network is None else network
        t = torch.ones(len(noise), device=noise.device)
        return noise - network(noise, t, **conditions)


def toy_config(output: object, **changes: object) -> TrainConfig:
    """A run of a second: every step matters, few files."""
    settings: dict[str, object] = {
        "output": str(output),
        "steps": 12,
        "batch_size": 16,
        "save_every": 4,
        "log_every": 4,
        "grid_rows": 1,
        "device": "cpu",
        "tensorboard": False,
        "optim": OptimConfig(lr=1e-2, schedule="cosine", warmup=3, ema_decays=(0.9,)),
    }
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def toy_method(seed: int = 0) -> ToyMethod:
    torch.manual_seed(seed)
    return ToyMethod()
