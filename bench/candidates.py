"""The choices that :mod:`bench.tune` measures, and what stands to choose from.

A candidate replaces a name or a table's entry in the package while it is measured; one that changes
no launch is an error of this file (tests/bench/test_tune.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from bench import test_activation, test_attention, test_losses, test_modulate, test_step
from bench.cases import Operation
from bench.shapes import FLUX_DEV, SD3_MEDIUM, Model
from bench.tune import Candidate, Choice, Patch
from flowkernels import ops
from flowkernels.ops import _triton
from flowkernels.ops.attention import _core_config, _select
from flowkernels.ops.attention._core_config import FORWARD, KEYS, QUERIES, Tiles

PACKAGE = "flowkernels.ops"
HALF = torch.bfloat16
BOTH = "forward+backward"
# Of a thread's registers, what a tile's sums may take: the rest is for addresses and operands.
SUMS_OF_REGISTERS = 0.8
LEAST_SUMS = 40  # below, a tile's operands are read for too few products
SHARED_BYTES = 227 * 1024


def put(target: str, value: Any) -> Patch:
    """``value`` in the place of a name in the package; an error where there is none."""
    return lambda: mock.patch(f"{PACKAGE}.{target}", value)


def entry(table: dict[Any, Any], key: Any, value: Any) -> Patch:
    return lambda: mock.patch.dict(table, {key: value})


def _values(name: str, values: Iterable[Any], *targets: str) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(f"{name} {value}", tuple(put(target, value) for target in targets))
        for value in values
    )


def _scaled_warps(factor: float) -> Callable[..., int]:
    def warps_for(elements: int, itemsize: int, most: int = 16) -> int:
        return max(1, min(32, int(factor * _triton.warps_for(elements, itemsize, most))))

    return warps_for


def _warps(module: str) -> tuple[Candidate, ...]:
    """Half and twice the warps: two loads of 16 bytes a thread for each tensor, or half of one."""
    return tuple(
        Candidate(f"warps × {factor}", (put(f"{module}.warps_for", _scaled_warps(factor)),))
        for factor in (0.5, 2)
    )


def _chunks(target: str, spread: Callable[[int], Callable[..., int]]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(f"some {count} chunks", (put(target, spread(count)),))
        for count in (128, 256, 1024, 2048)
    )


def _rows_of(count: int) -> Callable[[int, int], int]:
    return lambda batch, rows: max(1, batch * rows // count)


def _tokens_of(count: int) -> Callable[[int], int]:
    return lambda tokens: max(1, tokens // count)


# -- attention ------------------------------------------------------------------------------------


def _by_triton(operation: Operation) -> Operation:
    def ours(q1: Any, k1: Any, v1: Any, q2: Any, k2: Any, v2: Any) -> Any:
        core = "reference" if q1.dtype == torch.float64 else "triton"  # the truth is float64
        return ops.joint_attention((q1, k1, v1), (q2, k2, v2), core=core)

    return replace(operation, name=f"{operation.name} (triton)", ours=ours)


def _sums(which: str, tiles: Tiles, width: int) -> float:
    """float32 numbers that a thread holds: gradients or outputs, and scores."""
    scores = tiles.M * tiles.N
    held = {
        FORWARD: tiles.M * width + scores,
        KEYS: 2 * tiles.N * width + 2 * scores,
        QUERIES: tiles.M * width + 2 * scores,
    }[which]
    return held / (32 * tiles.warps)


def _shared(which: str, tiles: Tiles, width: int) -> int:
    """Bytes of the tiles in shared memory: the pair that is streamed, and the pair that stays."""
    streamed, stays = (tiles.M, tiles.N) if which == KEYS else (tiles.N, tiles.M)
    return 2 * 2 * width * (streamed * tiles.stages + (stays if which != FORWARD else stays // 2))


def tiles(which: str, width: int, now: Tiles) -> tuple[Tiles, ...]:
    """Tiles whose sums fit the registers and whose operands fit the shared memory."""
    settings = ((4, 255), (8, 128), (8, 255))
    found = (
        Tiles(M, N, warps, stages, registers)
        for M, N, (warps, registers), stages in itertools.product(
            (64, 128), (32, 64, 128), settings, (2, 3, 4)
        )
    )
    return tuple(
        each for each in found
        if each != now
        and LEAST_SUMS <= _sums(which, each, width) <= SUMS_OF_REGISTERS * (each.registers or 255)
        and _shared(which, each, width) <= SHARED_BYTES
    )  # fmt: skip


def _tile_choices(capability: int) -> list[Choice]:
    chip = _core_config.chip_of(capability)
    table = _core_config._TABLE[chip if (chip, 2) in _core_config._TABLE else 80, 2]
    operation = _by_triton(test_attention.JOINT)
    found = []
    for which, model in itertools.product((FORWARD, KEYS, QUERIES), (SD3_MEDIUM, FLUX_DEV)):
        width = model.head_dim
        now = _core_config.tiles_for(which, width, HALF, capability)
        candidates = tuple(
            Candidate(
                f"{t.M}×{t.N}, {t.warps} warps, {t.stages} stages, {t.registers} registers",
                (entry(table[which], width, t),),
            )
            for t in tiles(which, width, now)
        )
        direction = "forward" if which == FORWARD else BOTH
        name = f"attention {which} tiles, now {now.M}×{now.N}, {now.warps}, {now.stages}"
        found.append(Choice(name, operation, _joint(model, 2, 1024), HALF, direction, candidates))
    return found


def _joint(model: Model, batch: int, tokens: int) -> tuple[int, ...]:
    return (batch, tokens, model.text, model.heads, model.head_dim)


def _core_choices() -> list[Choice]:
    """The order of cores: one at a time at its head. Not xformers: it may not be installed."""
    found = []
    for operation, lengths, cores, models in (
        (test_attention.JOINT, False, ("triton", "efficient", "cudnn"), (SD3_MEDIUM, FLUX_DEV)),
        (test_attention.PADDED, True, ("flash", "efficient"), (SD3_MEDIUM,)),
    ):
        candidates = tuple(
            Candidate(core, (entry(_select._AUTO_CUDA, ("half", lengths), (core,)),))
            for core in cores
        )
        for model, direction in itertools.product(models, ("forward", BOTH)):
            shape = _joint(model, 4, 1024)
            found.append(Choice("attention core", operation, shape, HALF, direction, candidates))
    return found


def _heads_choices() -> list[Choice]:
    at = "attention.kernels"
    shape = (4, 1024, FLUX_DEV.heads, FLUX_DEV.head_dim)
    tile = _values("tile", (256, 512), f"{at}._TILE")
    stages = _values("stages", (2, 3), f"{at}._STAGES")
    chunks = _chunks(f"{at}._tokens_per_chunk", _tokens_of)
    forward, backward = (*stages, *tile, *_warps(at)), (*stages, *chunks, *tile)
    return [
        Choice("heads forward", test_attention.QK, shape, HALF, "forward", forward),
        Choice("heads backward", test_attention.QK, shape, HALF, BOTH, backward),
    ]


# -- rows and samples -----------------------------------------------------------------------------


def _modulate_choices() -> list[Choice]:
    at = "modulate.kernels"
    registers = _values(
        "registers", (96, 255), f"{at}.BACKWARD_REGISTERS", f"{at}.BACKWARD_REGISTERS_SMALL"
    )
    stages = _values("stages", (2, 3), f"{at}.BACKWARD_STAGES")
    chunks = _chunks(f"{at}._rows_per_chunk", _rows_of)
    named = {operation.name: operation for operation in test_modulate.OPERATIONS}
    norm, chain = named["modulated_norm"], named["gated_residual_norm"]
    shapes = ((4, 1024, SD3_MEDIUM.width), (4, 4096, FLUX_DEV.width))
    found = [
        Choice("norm forward", norm, shape, HALF, "forward", _warps(at)) for shape in shapes
    ]  # fmt: skip
    candidates = (*stages, *chunks, *registers, *_warps(at))
    return found + [
        Choice("norm backward", operation, shape, HALF, BOTH, candidates)
        for operation, shape in itertools.product((norm, chain), shapes)
    ]


def _sample_choices() -> list[Choice]:
    shape = (16, 16, 128, 128)
    tile = _values("tile", (1024, 4096, 8192), "_sample_tiles.TILE")
    activation = _values("tile", (512, 2048, 4096), "activation.kernels._TILE")
    guided = next(each for each in test_step.OPERATIONS if each.name == "euler_step_guided")
    gelu = test_activation.OPERATIONS[0]

    def warps(module: str) -> tuple[Candidate, ...]:
        return _values("warps", (4, 16), f"{module}.WARPS")

    return [
        *(
            Choice("loss", each, shape, HALF, BOTH, (*tile, *warps("_loss_kernels")))
            for each in (test_losses.FLOW_MATCHING, test_losses.FGM)
        ),
        Choice("step", guided, shape, HALF, "forward", (*tile, *warps("step.kernels"))),
        Choice("activation", gelu, (4, 4096, 6144), HALF, BOTH, activation),
    ]


def choices(capability: int | None = None) -> list[Choice]:
    """Everything there is to choose, what the targets hang on first.

    Args:
        capability: whose tiles; by default of the GPU that is present, of Hopper where none is.
    """
    if capability is None:
        present = torch.cuda.is_available()
        capability = _triton.capability_of(torch.device("cuda")) if present else 90
    return [
        *_modulate_choices(),
        *_heads_choices(),
        *_core_choices(),
        *_tile_choices(capability),
        *_sample_choices(),
    ]
