"""A Runge–Kutta step's stage sum and its error with the norm, of tsit5: six stages, seven."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from bench import peers
from bench.cases import Case, Context, Operation, Random, cases_of
from bench.shapes import latent_shapes
from bench.timing import REPLAY
from flowkernels import ode
from flowkernels.ode.tableaus import TSIT5

Tensor = torch.Tensor

TINY = (2, 4, 4, 4)
DT = 0.05
SOLUTION, ERROR = TSIT5.solution[:-1], TSIT5.error
TOLERANCE = 1e-2


def _combine_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape) for _ in range(1 + len(SOLUTION))]


def _error_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape) for _ in range(2 + len(ERROR))]


def _combine(y: Tensor, *ks: Tensor) -> Tensor:
    return ode.rk_combine(y, ks, SOLUTION, DT)


def _error(y0: Tensor, y1: Tensor, *ks: Tensor) -> tuple[Tensor, Tensor]:
    return ode.rk_error(ks, ERROR, DT, y0, y1, TOLERANCE, TOLERANCE)


OPERATIONS = (
    Operation(
        name="rk_combine", family="step", make=_combine_inputs, ours=_combine,
        eager=partial(peers.rk_combine, SOLUTION, DT),
        names=("y", *(f"k{i}" for i in range(1, 7))),
    ),
    Operation(
        name="rk_error", family="step", make=_error_inputs, ours=_error,
        eager=partial(peers.rk_error, ERROR, DT, TOLERANCE),
        names=("y0", "y1", *(f"k{i}" for i in range(1, 8))),
    ),
)  # fmt: skip


def cases(context: Context) -> list[Case]:
    shapes = latent_shapes(context.level)
    return [case for operation in OPERATIONS for case in cases_of(operation, shapes, tiny=TINY)]


@pytest.mark.benchmark(timer=REPLAY)
def test_runge_kutta(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
