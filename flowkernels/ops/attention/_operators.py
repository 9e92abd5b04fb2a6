"""Schemas and fakes of the attention family's operators.

Backward operators of the heads return only the gradients asked for by the bits of ``wanted``, in
the order of the forward operator's tensor arguments: q, k, q_weight, k_weight, or q1, k1, v1, q2,
k2, v2, q1_weight, k1_weight, q2_weight, k2_weight.

Joint layout: q [B, Q1+Q2, H, E], k and v [B, S1+S2, H, E], contiguous, rows in the order [first,
second], in the dtype that all streams and weights promote to. Q_i, the rows of stream i's queries,
is S_i, or 0 for a stream that is only attended to; without rope it may be any.

Rope's row of a token is its place in [first, second] as the keys have it, before packing: token s
of the first stream reads row s, token s of the second row S1 + s, its query too (and where Q1 is
0). cos and sin [S1+S2, E] need not be equal within a pair.

key_lengths [B, 1 or 2] packs the keys and values: with l_i = clamp(key_lengths[b, i], 0, S_i), row
s < l1 of the first stream goes to row s, row s < l2 of the second to row l1 + s; the rest of k and
v is zero. The core then needs one length a sample, l1 + l2. Gradients of rows not valid are zero.

rounding: 0 "fp32", 1 "torch", 2 "diffusers", as in ``reference.py``. rstd [B, rows, H] is float32,
of size [0] where nothing is normed; only the operators that write it read it.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops.attention.reference import promoted

Tensor = torch.Tensor

_HEADS = "flowkernels.ops.attention.kernels:"
_CORE = "flowkernels.ops.attention.core_kernels:"


def heads_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the joint layout: what all streams and weights promote to."""
    return promoted(*tensors)


def gradients_like(wanted: int, *operands: Tensor | None) -> list[Tensor]:
    """Empty contiguous gradients for the operands whose bit is set."""
    return [
        operand.new_empty(operand.shape)
        for bit, operand in enumerate(operands)
        if operand is not None and wanted >> bit & 1
    ]


def _qk_norm_rope_forward_fake(  # type: ignore[no-untyped-def]
    q, k, q_weight, k_weight, cos, sin, interleaved, eps, rounding
):
    return (
        q.new_empty(q.shape, dtype=promoted(q, q_weight)),
        k.new_empty(k.shape, dtype=promoted(k, k_weight)),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        k.new_empty(k.shape[:3], dtype=torch.float32),
    )


def _qk_norm_rope_backward_fake(  # type: ignore[no-untyped-def]
    grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd,
    interleaved, eps, rounding, wanted,
):  # fmt: skip
    return gradients_like(wanted, q, k, q_weight, k_weight)


def _joint_heads_forward_fake(  # type: ignore[no-untyped-def]
    q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight, cos, sin, key_lengths,
    norm1, norm2, interleaved, eps, rounding,
):  # fmt: skip
    dtype = heads_dtype(q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight)
    batch, queries, heads, width = q1.shape
    keys = k1.shape[1]
    if q2 is not None:
        queries, keys = queries + q2.shape[1], keys + k2.shape[1]
    normed = norm1 or norm2
    return (
        q1.new_empty((batch, queries, heads, width), dtype=dtype),
        q1.new_empty((batch, keys, heads, width), dtype=dtype),
        q1.new_empty((batch, keys, heads, width), dtype=dtype),
        q1.new_empty((batch, queries, heads) if normed else (0,), dtype=torch.float32),
        q1.new_empty((batch, keys, heads) if normed else (0,), dtype=torch.float32),
    )


def _joint_heads_backward_fake(  # type: ignore[no-untyped-def]
    grad_q, grad_k, grad_v, q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight,
    cos, sin, key_lengths, q_rstd, k_rstd, norm1, norm2, interleaved, eps, rounding, wanted,
):  # fmt: skip
    return gradients_like(
        wanted, q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight
    )


def _attention_forward_fake(q, k, v, lengths, scale):  # type: ignore[no-untyped-def]
    batch, queries, heads, _ = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _attention_backward_fake(grad_out, q, k, v, out, lse, lengths, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


qk_norm_rope_forward = define(
    "qk_norm_rope_forward",
    "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin,"
    " bool interleaved, float eps, int rounding) -> (Tensor, Tensor, Tensor, Tensor)",
    _qk_norm_rope_forward_fake,
    triton=_HEADS + "qk_norm_rope_forward",
)
qk_norm_rope_backward = define(
    "qk_norm_rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight,"
    " Tensor? cos, Tensor? sin, Tensor q_rstd, Tensor k_rstd, bool interleaved, float eps,"
    " int rounding, int wanted) -> Tensor[]",
    _qk_norm_rope_backward_fake,
    triton=_HEADS + "qk_norm_rope_backward",
)

_STREAMS = (
    "Tensor q1, Tensor k1, Tensor v1, Tensor? q2, Tensor? k2, Tensor? v2, Tensor? q1_weight,"
    " Tensor? k1_weight, Tensor? q2_weight, Tensor? k2_weight, Tensor? cos, Tensor? sin,"
    " Tensor? key_lengths"
)
_OPTIONS = "bool norm1, bool norm2, bool interleaved, float eps, int rounding"

joint_heads_forward = define(
    "joint_heads_forward",
    f"({_STREAMS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _joint_heads_forward_fake,
    triton=_HEADS + "joint_heads_forward",
)
joint_heads_backward = define(
    "joint_heads_backward",
    f"(Tensor grad_q, Tensor grad_k, Tensor grad_v, {_STREAMS}, Tensor q_rstd, Tensor k_rstd,"
    f" {_OPTIONS}, int wanted) -> Tensor[]",
    _joint_heads_backward_fake,
    triton=_HEADS + "joint_heads_backward",
)
attention_forward = define(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale) -> (Tensor, Tensor)",
    _attention_forward_fake,
    triton=_CORE + "attention_forward",
)
attention_backward = define(
    "attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lengths,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    _attention_backward_fake,
    triton=_CORE + "attention_backward",
)

# The CPU's core for short sequences, lengths included; any strides with a unit last one.
short_attention_forward = define(
    "short_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale) -> (Tensor, Tensor)",
    _attention_forward_fake,
)
short_attention_backward = define(
    "short_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad_out, q, k, v, lengths, scale: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
