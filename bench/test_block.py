"""A whole joint block of SD3 as diffusers has it, patched, as it stands and compiled.

Most of a block is matrix products and the attention core, which are the same library calls in all
three: ``python -m bench.block_share`` tells how much is left to gain.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call

import flowkernels
from bench.cases import Case, Context, Operation, Random, cases_of
from bench.shapes import SD3_MEDIUM
from bench.timing import REPLAY

pytest.importorskip("diffusers", reason="the block is diffusers'")
from diffusers.models.attention import JointTransformerBlock

Tensor = torch.Tensor

# [B, image tokens, text tokens, D]
SHAPE = (1, 1024, SD3_MEDIUM.text, SD3_MEDIUM.width)
TINY = (1, 16, 5, 128)


class Pair(NamedTuple):
    """A joint block in the middle of a model and its patched copy; every call brings parameters."""

    eager: nn.Module
    ours: nn.Module
    names: tuple[str, ...]


@cache
def _pair(width: int) -> Pair:
    block = JointTransformerBlock(
        width, width // SD3_MEDIUM.head_dim, SD3_MEDIUM.head_dim, context_pre_only=False
    )
    patched = copy.deepcopy(block)
    flowkernels.patch(patched)
    return Pair(block, patched, tuple(name for name, _ in block.named_parameters()))


# By width, filled where inputs are made: torch.compile would trace the making of a block.
_PAIRS: dict[int, Pair] = {}


def _inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    batch, image, text, width = shape
    pair = _PAIRS[width] = _pair(width)
    weights = [
        random.normal(*parameter.shape, scale=parameter.shape[-1] ** -0.5)
        for parameter in pair.eager.parameters()
    ]
    tokens = [random.normal(batch, image, width), random.normal(batch, text, width)]
    return [*tokens, random.normal(batch, width), *weights]


def _run(block: nn.Module, names: tuple[str, ...], inputs: tuple[Any, ...]) -> Any:
    image, text, temb, *weights = inputs
    named = dict(zip(names, weights, strict=True))
    text, image = functional_call(block, named, (image, text, temb))
    return image, text


def _ours(*inputs: Any) -> tuple[Tensor, Tensor]:
    pair = _PAIRS[inputs[0].shape[-1]]
    return _run(pair.ours, pair.names, inputs)


def _eager(*inputs: Any) -> tuple[Tensor, Tensor]:
    pair = _PAIRS[inputs[0].shape[-1]]
    return _run(pair.eager, pair.names, inputs)


def _operation() -> Operation:
    names = ("image", "text", "temb", *_pair(TINY[-1]).names)
    every = tuple(range(len(names)))
    return Operation(
        name="joint_block", family="block", make=_inputs, ours=_ours, eager=_eager,
        names=names, gradients=every, saved=every,
    )  # fmt: skip


def cases(context: Context) -> list[Case]:
    shapes = [(TINY, 0)] if context.level == "tiny" else [(SHAPE, 1)]
    return [case for case in cases_of(_operation(), shapes, tiny=TINY) if case.kind == "speed"]


@pytest.mark.benchmark(timer=REPLAY)
def test_block(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
