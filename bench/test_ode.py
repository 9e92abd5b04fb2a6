"""Whole solves less the right-hand side: what a step costs outside func.

The right-hand side here returns slopes that are already there, and the step size is held, so that
all solvers do the same arithmetic. The peer is torchdiffeq.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import HOST, Case, Context, Operation, Random, prepare
from bench.shapes import label, latent_shapes
from bench.timing import REPLAY
from flowkernels import ode

torchdiffeq = pytest.importorskip("torchdiffeq")

Tensor = torch.Tensor
STEPS = 20
SLOPES = 8
"""In turn: more than a step has stages, so that none is handed out twice within one."""
TINY = (2, 4, 4, 4)
HELD = {"first_step": 1 / STEPS, "max_step": 1 / STEPS}


def _inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    """A state, slopes, and the times."""
    times = torch.tensor([0.0, 1.0], device=random.device)
    return [random.normal(*shape), random.normal(SLOPES, *shape), times]


def _adaptive(solver: Callable[..., Tensor], method: str) -> Callable[..., Tensor]:
    def solve(y0: Tensor, slopes: Tensor, times: Tensor) -> Tensor:
        slope = itertools.cycle(slopes.unbind(0))
        return solver(
            lambda t, y: next(slope), y0, times, method=method, rtol=1.0, atol=1.0,
            options=dict(HELD),
        )[-1]  # fmt: skip

    return solve


def _fixed(solver: Callable[..., Tensor], method: str) -> Callable[..., Tensor]:
    def solve(y0: Tensor, slopes: Tensor, times: Tensor) -> Tensor:
        slope = itertools.cycle(slopes.unbind(0))
        options = {"step_size": 1 / STEPS}
        return solver(lambda t, y: next(slope), y0, times, method=method, options=options)[-1]

    return solve


def _operation(make: Any, method: str, family: str) -> Operation:
    return Operation(
        f"odeint_{method}", family, _inputs, make(ode.odeint, method),
        make(torchdiffeq.odeint, method), names=("y0", "slopes", "times"),
    )  # fmt: skip


OPERATIONS = (
    _operation(_adaptive, "dopri5", "adaptive solver"),
    _operation(_adaptive, "bosh3", "adaptive solver"),
    _operation(_fixed, "euler", "fixed solver"),
    _operation(_fixed, "rk4", "fixed solver"),
)


def _case(operation: Operation, shape: tuple[int, ...], priority: int) -> Case:
    return Case(
        op=operation.name,
        family=operation.family,
        shape=label(shape),
        elements=torch.Size(shape).numel(),
        dtype="float32",
        direction="forward",
        kind="speed",
        priority=priority,
        variants=HOST,  # a loop is neither compiled nor compared with one copy
        build=lambda context: prepare(operation, shape, torch.float32, "forward", "loop", context),
    )


def cases(context: Context) -> list[Case]:
    shapes = [(TINY, 1)]
    if context.level != "tiny":
        shapes += [(shape, 1 + rank) for shape, rank in latent_shapes(context.level)[:2]]
    return [
        _case(operation, shape, priority) for operation in OPERATIONS for shape, priority in shapes
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_ode(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
