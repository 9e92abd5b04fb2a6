"""Feed-forward activations at four times a model's width."""

from __future__ import annotations

from typing import Any

import pytest

from bench import peers
from bench.cases import Case, Context, Operation, Random, cases_of
from bench.shapes import token_shapes
from bench.timing import REPLAY
from flowkernels import ops

TINY = (1, 4, 64)


def _gelu_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape), random.normal(shape[-1])]


def _swiglu_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape)]


OPERATIONS = (
    Operation(
        name="gelu_tanh", family="activation", make=_gelu_inputs,
        ours=ops.gelu_tanh, eager=peers.gelu_tanh,
        names=("x", "bias"), gradients=(0, 1), saved=(0, 1),
    ),
    Operation(
        name="swiglu", family="activation", make=_swiglu_inputs,
        ours=ops.swiglu, eager=peers.swiglu, names=("x",), gradients=(0,), saved=(0,),
    ),
)  # fmt: skip


def cases(context: Context) -> list[Case]:
    # The hidden layer of a feed-forward block is four times as wide; the first shape is enough
    # to show the bandwidth, the rest belongs to a full run.
    listed = token_shapes(context.level, context.device)
    chosen = listed if context.level == "full" else listed[:1]
    shapes = [((*shape[:2], 4 * shape[2]), 1 + priority) for shape, priority in chosen]
    return [case for op in OPERATIONS for case in cases_of(op, shapes, tiny=TINY)]


@pytest.mark.benchmark(timer=REPLAY)
def test_activation(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
