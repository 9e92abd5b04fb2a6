"""Configurations, a velocity and runs that the scheduler tests share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from flowkernels.integrations import FusedFlowMatchEuler, FusedFlowMatchHeun  # noqa: E402

__all__ = [
    "CONFIGS",
    "DTYPES",
    "ONCE",
    "STEPS",
    "FusedFlowMatchEuler",
    "FusedFlowMatchHeun",
    "diffusers",
    "noise",
    "pair",
    "run",
    "velocity",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DYNAMIC = {"use_dynamic_shifting": True}
CONFIGS = {
    "plain": ({}, {}),
    "shift": ({"shift": 3.0}, {}),
    "dynamic": (DYNAMIC, {"mu": 0.8}),
    "linear": ({**DYNAMIC, "time_shift_type": "linear"}, {"mu": 2.5}),
    "terminal": ({**DYNAMIC, "shift_terminal": 0.1}, {"mu": 1.1}),
    "terminal-shift": ({"shift": 3.0, "shift_terminal": 0.1}, {}),
    "karras": ({"use_karras_sigmas": True}, {}),
    "karras-shift": ({"use_karras_sigmas": True, "shift": 3.0}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}),
    "beta": ({"use_beta_sigmas": True}, {}),
    "inverted": ({"invert_sigmas": True}, {}),
    "sigmas": ({}, {"sigmas": [1.0, 0.8, 0.5, 0.3, 0.2, 0.1, 0.05]}),
    "sigmas-shift": ({"shift": 3.0}, {"sigmas": np.linspace(1.0, 1 / 7, 7)}),
    "sigmas-mu": (DYNAMIC, {"sigmas": np.linspace(1.0, 1 / 7, 7), "mu": 1.15}),
    "timesteps": ({}, {"timesteps": [1000.0, 800.0, 500.0, 300.0, 200.0, 100.0, 50.0]}),
    "both": (
        {"shift": 3.0},
        {"sigmas": np.linspace(1, 0.2, 7), "timesteps": np.linspace(999, 100, 7)},
    ),
}
# What diffusers does not shift twice.
ONCE = tuple(name for name in CONFIGS if not (name.endswith("shift") and name != "sigmas-shift"))
STEPS = 7


def pair(name: str, exact: bool, **more: object):
    """diffusers' scheduler and ours, with timesteps set."""
    config, arguments = CONFIGS[name]
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config, **more)
    ours = FusedFlowMatchEuler.from_config(theirs.config, exact=exact)
    theirs.set_timesteps(STEPS, **arguments)
    ours.set_timesteps(STEPS, **arguments)
    return theirs, ours


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Something that depends on both, in x's dtype."""
    return (x * 0.7 - t / 1000).sin().to(x.dtype)


def run(scheduler, x: torch.Tensor, **arguments: object) -> list[torch.Tensor]:
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x, return_dict=False, **arguments)[0]
        states.append(x)
    return states


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
