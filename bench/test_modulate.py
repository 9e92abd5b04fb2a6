"""Norm, modulation and gated residual, with the modulation read as strided chunks."""

from __future__ import annotations

from typing import Any

import pytest

from bench import peers
from bench.cases import Case, Context, Operation, Random, cases_of
from bench.shapes import token_shapes
from bench.timing import REPLAY
from flowkernels import ops

TINY = (1, 4, 64)


def _modulation(random: Random, batch: int, width: int, count: int) -> list[Any]:
    """shift, scale, gate: chunks of one [B, 6D] tensor, of row stride 6D."""
    return list(random.normal(batch, 6 * width, scale=0.5).chunk(6, dim=-1)[:count])


def _norm_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape), *_modulation(random, shape[0], shape[2], 2)]


def _gated_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    gate = _modulation(random, shape[0], shape[2], 1)
    return [random.normal(*shape), random.normal(*shape), *gate]


def _chain_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    operands = _modulation(random, shape[0], shape[2], 3)
    return [random.normal(*shape), random.normal(*shape), *operands]


OPERATIONS = (
    Operation(
        name="modulated_norm", family="norm", make=_norm_inputs,
        ours=ops.modulated_norm, eager=peers.modulated_norm,
        names=("x", "shift", "scale"), gradients=(0, 1, 2), saved=(0, 2),
    ),
    Operation(
        name="gated_residual_norm", family="gated", make=_chain_inputs,
        ours=ops.gated_residual_norm, eager=peers.gated_residual_norm,
        names=("residual", "x", "gate", "shift", "scale"), gradients=(0, 1, 2, 3, 4),
        saved=(1, 2, 4), saved_outputs=(0,),
    ),
    Operation(
        name="gated_residual", family="gated", make=_gated_inputs,
        ours=ops.gated_residual, eager=peers.gated_residual,
        names=("residual", "x", "gate"), gradients=(0, 1, 2), saved=(1, 2),
    ),
)  # fmt: skip

RMS = Operation(
    name="modulated_norm_rms", family="norm", make=_norm_inputs,
    ours=lambda x, shift, scale: ops.modulated_norm(x, shift, scale, norm="rms"),
    eager=peers.modulated_rms_norm,
    names=("x", "shift", "scale"), gradients=(0, 1, 2), saved=(0, 2),
)  # fmt: skip


def cases(context: Context) -> list[Case]:
    shapes = token_shapes(context.level, context.device)
    found = [case for op in OPERATIONS for case in cases_of(op, shapes, tiny=TINY)]
    if context.level == "full":
        found += cases_of(RMS, shapes[:1], tiny=TINY)
    return found


@pytest.mark.benchmark(timer=REPLAY)
def test_modulate(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
