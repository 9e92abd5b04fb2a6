"""Euler steps, plain and with guidance."""

from __future__ import annotations

from typing import Any

import pytest

from bench import peers
from bench.cases import Case, Context, Operation, Random, cases_of
from bench.shapes import latent_shapes
from bench.timing import REPLAY
from flowkernels import ode

TINY = (2, 4, 4, 4)
DT = -1 / 28


def _plain_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape), random.normal(*shape), DT]


def _guided_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [*_plain_inputs(random, shape), random.normal(*shape)]


OPERATIONS = (
    Operation(
        name="euler_step_guided", family="step", make=_guided_inputs,
        ours=lambda x, v, dt, v_uncond: ode.euler_step(
            x, v, dt, v_uncond=v_uncond, guidance=4.5
        ),
        eager=peers.guided_euler_step, names=("x", "v", "dt", "v_uncond"),
    ),
    Operation(
        name="euler_step", family="step", make=_plain_inputs,
        ours=ode.euler_step, eager=peers.euler_step, names=("x", "v", "dt"),
    ),
)  # fmt: skip


def cases(context: Context) -> list[Case]:
    shapes = latent_shapes(context.level)
    guided, plain = OPERATIONS
    found = cases_of(guided, shapes, tiny=TINY)
    if context.level != "tiny":
        shapes = [(shape, 2 + priority) for shape, priority in shapes[:2]]
    return found + cases_of(plain, shapes, tiny=TINY)


@pytest.mark.benchmark(timer=REPLAY)
def test_step(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
