"""QK norm with RoPE, and joint attention: plain, normed, rotated, and with padded text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import attention_peers as peers
from bench.cases import Case, Context, Operation, Random, cases_of
from bench.shapes import FLUX_DEV, LEVELS, SD3_MEDIUM, SD35_LARGE, Model
from bench.timing import REPLAY
from flowkernels import ops

Shape = tuple[int, ...]
Ranked = list[tuple[Shape, int]]

TINY_HEADS = (1, 4, 2, 16)
TINY = (1, 4, 2, 2, 16)


def _fused(random: Random, batch: int, rows: int, heads: int, width: int) -> list[Any]:
    """q, k, v as views of one projection of row stride 3D."""
    return list(random.normal(batch, rows, 3, heads, width).unbind(2))


def _angles(random: Random, rows: int, width: int) -> list[Any]:
    """cos and sin as FLUX has them: float32, both of a pair alike."""
    turns = random.normal(rows, width // 2).float().repeat_interleave(2, dim=-1)
    return [turns.cos(), turns.sin()]


def _weights(random: Random, width: int, count: int) -> list[Any]:
    return [1 + random.normal(width, scale=0.1) for _ in range(count)]


def _qk_inputs(random: Random, shape: Shape) -> list[Any]:
    batch, rows, heads, width = shape
    q, k, _ = _fused(random, batch, rows, heads, width)
    return [q, k, *_weights(random, width, 2), *_angles(random, rows, width)]


def _qk(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> Any:
    return ops.qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, rope=(cos, sin))


def _streams(random: Random, shape: Shape) -> list[Any]:
    batch, first, second, heads, width = shape
    return [x for rows in (first, second) for x in _fused(random, batch, rows, heads, width)]


def _normed_inputs(random: Random, shape: Shape) -> list[Any]:
    return [*_streams(random, shape), *_weights(random, shape[-1], 4)]


def _rotated_inputs(random: Random, shape: Shape) -> list[Any]:
    angles = _angles(random, shape[1] + shape[2], shape[-1])
    return [*_normed_inputs(random, shape), *angles]


def _padded_inputs(random: Random, shape: Shape) -> list[Any]:
    """All image tokens and the first fifth of the text, a prompt's usual share of 333."""
    lengths = torch.tensor([[shape[1], shape[2] // 5]], dtype=torch.int32, device=random.device)
    return [*_streams(random, shape), lengths.repeat(shape[0], 1)]


def _joint(q1: Any, k1: Any, v1: Any, q2: Any, k2: Any, v2: Any, *rest: Any) -> Any:
    """By what follows the streams: nothing, lengths, four weights, or weights and a rotation."""
    if len(rest) == 1:
        return ops.joint_attention((q1, k1, v1), (q2, k2, v2), key_lengths=rest[0])
    return ops.joint_attention(
        (q1, k1, v1),
        (q2, k2, v2),
        first_norm=rest[:2] or None,
        second_norm=rest[2:4] or None,
        rope=rest[4:] or None,
    )


STREAMS = ("q1", "k1", "v1", "q2", "k2", "v2")
WEIGHTS = ("q1_weight", "k1_weight", "q2_weight", "k2_weight")

QK = Operation(
    name="qk_norm_rope", family="heads", make=_qk_inputs, ours=_qk, eager=peers.qk_norm_rope,
    names=("q", "k", "q_weight", "k_weight", "cos", "sin"), gradients=(0, 1, 2, 3), saved=(0, 1),
)  # fmt: skip
JOINT = Operation(
    name="joint_attention", family="joint", make=_streams, ours=_joint,
    eager=peers.joint_attention, names=STREAMS, gradients=tuple(range(6)), saved=tuple(range(6)),
    saved_outputs=(0, 1),
)  # fmt: skip
NORMED = Operation(
    name="joint_attention_norm", family="normed joint", make=_normed_inputs, ours=_joint,
    eager=peers.normed_joint_attention, names=(*STREAMS, *WEIGHTS), gradients=tuple(range(10)),
    saved=tuple(range(10)), saved_outputs=(0, 1),
)  # fmt: skip
ROTATED = Operation(
    name="joint_attention_norm_rope", family="normed joint", make=_rotated_inputs, ours=_joint,
    eager=peers.rotated_joint_attention, names=(*STREAMS, *WEIGHTS, "cos", "sin"),
    gradients=tuple(range(10)), saved=tuple(range(12)), saved_outputs=(0, 1),
)  # fmt: skip
PADDED = Operation(
    name="joint_attention_padded", family="padded joint", make=_padded_inputs, ours=_joint,
    eager=peers.masked_joint_attention, names=(*STREAMS, "key_lengths"), gradients=tuple(range(6)),
    saved=tuple(range(7)), saved_outputs=(0, 1),
)  # fmt: skip


def _joint_shape(model: Model, batch: int, tokens: int) -> Shape:
    return (batch, tokens, model.text, model.heads, model.head_dim)


def _shapes(context: Context) -> dict[str, Ranked]:
    """Shapes with priorities, by operation: real models; on CPU a batch of one."""
    assert context.level in LEVELS
    if context.level == "tiny":
        tiny: Ranked = [((2, 8, 3, 2, 16), 0)]
        tiny_heads: Ranked = [((2, 8, 2, 16), 0)]
        joint = [JOINT, NORMED, ROTATED, PADDED]
        return {QK.name: tiny_heads, **{operation.name: tiny for operation in joint}}
    batch = 4 if context.device == "cuda" else 1
    tokens = [1024, 4096] if context.device == "cuda" else [1024]
    sd3, large, flux = (
        [(_joint_shape(model, batch, count), rank) for rank, count in enumerate(tokens)]
        for model in (SD3_MEDIUM, SD35_LARGE, FLUX_DEV)
    )
    heads: Ranked = [
        ((batch, 1024, m.heads, m.head_dim), rank) for rank, m in ((0, FLUX_DEV), (1, SD35_LARGE))
    ]
    found: dict[str, Ranked] = {
        QK.name: heads, JOINT.name: sd3, NORMED.name: sd3, ROTATED.name: flux, PADDED.name: sd3,
    }  # fmt: skip
    if context.level == "full":
        found[NORMED.name] = [*sd3, *((shape, 3) for shape, _ in large)]
        found[JOINT.name] = [*sd3, (_joint_shape(SD3_MEDIUM, 4 * batch, 1024), 3)]
    return found


def cases(context: Context) -> list[Case]:
    shapes = _shapes(context)
    operations = (QK, JOINT, NORMED, ROTATED, PADDED)
    return [
        case
        for op in operations
        for case in cases_of(op, shapes[op.name], tiny=TINY_HEADS if op is QK else TINY)
    ]


@pytest.mark.benchmark(timer=REPLAY)
def test_attention(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
