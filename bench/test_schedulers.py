"""Whole sampling loops less the model: what schedulers and samplers cost beside it.

The model here returns velocities that are already there, so that all the time is spent outside it.
The peer is diffusers: its scheduler, and for the guided sampler the loop of its pipelines as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import DTYPES, HOST, Case, Context, Operation, Random, prepare
from bench.shapes import label, latent_shapes
from bench.timing import REPLAY
from flowkernels import ode

diffusers = pytest.importorskip("diffusers")
from flowkernels.integrations import FusedFlowMatchEuler, FusedFlowMatchHeun  # noqa: E402

Tensor = torch.Tensor
STEPS, GUIDANCE = 28, 4.5
OUTPUTS = 4
"""Velocities in turn: with one alone bfloat16 would round the same way in every step."""
TINY = (2, 4, 4, 4)


def _inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    """A state, and the velocities with and without conditions, each time as one batch."""
    return [random.normal(*shape), random.normal(OUTPUTS, 2 * shape[0], *shape[1:])]


def _walk(kind: type) -> Callable[[Tensor, Tensor], Tensor]:
    scheduler = kind()

    def loop(x: Tensor, outputs: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS, device=x.device)
        velocities = itertools.cycle(outputs[:, : len(x)])
        for t, velocity in zip(scheduler.timesteps, velocities, strict=False):
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        return x

    return loop


def _sampled(x: Tensor, outputs: Tensor) -> Tensor:
    both = itertools.cycle(outputs)
    nothing = {"labels": torch.zeros(len(x), dtype=torch.int64, device=x.device)}
    return ode.sample(
        lambda x, t, labels: next(both),
        x,
        ode.uniform(STEPS),
        guidance=GUIDANCE,
        conditions=nothing,
        uncond=nothing,
    )


def _pipelined(x: Tensor, outputs: Tensor) -> Tensor:
    """The denoising loop of diffusers' pipelines, over the same times."""
    both = itertools.cycle(outputs)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    ode.uniform(STEPS).to_diffusers(scheduler, x.device)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        batch = torch.cat([x] * 2)
        t.expand(len(batch))
        conditional, unconditional = next(both).chunk(2)
        velocity = unconditional + GUIDANCE * (conditional - unconditional)
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
    return x


def _operation(name: str, family: str, ours: Any, eager: Any) -> Operation:
    return Operation(name, family, _inputs, ours, eager, names=("x", "outputs"))


OPERATIONS = (
    _operation("sampler_guided", "sampler", _sampled, _pipelined),
    _operation(
        "scheduler_euler", "scheduler",
        _walk(FusedFlowMatchEuler), _walk(diffusers.FlowMatchEulerDiscreteScheduler),
    ),
    _operation(
        "scheduler_heun", "scheduler",
        _walk(FusedFlowMatchHeun), _walk(diffusers.FlowMatchHeunDiscreteScheduler),
    ),
)  # fmt: skip


def _case(operation: Operation, shape: tuple[int, ...], dtype: str, priority: int) -> Case:
    return Case(
        op=operation.name,
        family=operation.family,
        shape=label(shape),
        elements=torch.Size(shape).numel(),
        dtype=dtype,
        direction="forward",
        kind="speed",
        priority=priority,
        variants=HOST,  # a loop is neither compiled nor compared with one copy
        build=lambda context: prepare(operation, shape, DTYPES[dtype], "forward", "loop", context),
    )


def cases(context: Context) -> list[Case]:
    shapes = [(TINY, 1)]
    if context.level != "tiny":
        shapes += [(shape, 1 + rank) for shape, rank in latent_shapes(context.level)[:2]]
    return [
        _case(operation, shape, dtype, priority)
        for operation in OPERATIONS
        for shape, priority in shapes
        for dtype in DTYPES
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_schedulers(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
