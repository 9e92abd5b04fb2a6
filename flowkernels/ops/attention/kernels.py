"""Launchers of the heads' Triton kernels: one launch for each stream."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from flowkernels.ops._triton import Partials, launch, warps_for
from flowkernels.ops.attention._device import heads_backward_kernel, heads_forward_kernel
from flowkernels.ops.attention._operators import gradients_like, heads_dtype
from flowkernels.ops.attention.reference import FP32, promoted

Tensor = torch.Tensor

# Elements of a tile: whole vectors of 16 bytes for each thread of a few warps.
_TILE = 1024
# Tiles of a token in flight: with two, the next heads are on their way to shared memory while some
# are normed. One until a GPU has shown the gain (bench.tune).
_STAGES = 1
# Registers of a thread. Left to itself ptxas may aim at fewer than a tile needs, and spill. Halves
# take two loads of 16 bytes a thread, so a thread holds twice as many elements; mixed dtypes are
# converted from one layout to another.
_FORWARD_REGISTERS, _FORWARD_REGISTERS_HALVES = 64, 96
_BACKWARD_REGISTERS, _BACKWARD_REGISTERS_HALVES, _BACKWARD_REGISTERS_MIXED = 128, 168, 224


class Stream(NamedTuple):
    """One stream's operands; v is None for ``qk_norm_rope``."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    norm: bool


class Layout(NamedTuple):
    """Where a stream's rows lie in the joint tensors."""

    stream: int
    streams: int
    q_total: int
    k_total: int
    q_offset: int
    k_offset: int
    position: int
    first_keys: int
    second_keys: int

    def scalars(self) -> tuple[int, ...]:
        return self[2:]


class Rope(NamedTuple):
    """cos and sin [S, E]; None where nothing turns."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool

    def arguments(self) -> tuple[Any, ...]:
        if self.cos is None or self.sin is None:
            return None, 0, None, 0
        return self.cos, self.cos.stride(0), self.sin, self.sin.stride(0)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, row, head) strides of [B, S, H, E]."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def _lengths(key_lengths: Tensor | None) -> tuple[Any, ...]:
    return (None, 0, 0) if key_lengths is None else (key_lengths, *key_lengths.stride())


def _options(q: Tensor, rope: Rope, layout: Layout, norm: bool) -> dict[str, Any]:
    """The tile: heads enough for a tile of ``_TILE``, unless an eighth of the lanes would idle."""
    heads, width = q.shape[2:]
    half = triton.next_power_of_2((width + 1) // 2)
    block = min(max(1, _TILE // (2 * half)), triton.next_power_of_2(heads))
    while block > 4 and triton.cdiv(heads, block) * block * 8 > heads * 9:
        block //= 2
    # Whole rows are read at once, also where nothing turns; halves are read one after the other.
    interleaved = rope.interleaved or rope.cos is None
    elements = block * 2 * half if interleaved else block * half
    return {
        "HEADS": heads,
        "HEAD_DIM": width,
        "HALF": half,
        "BLOCK_H": block,
        "INTERLEAVED": interleaved,
        "NORM": norm,
        "STREAM": layout.stream,
        "STREAMS": layout.streams,
        "STAGES": _STAGES,
        "num_warps": warps_for(elements, q.element_size()),
    }


def _forward(
    stream: Stream,
    layout: Layout,
    outs: tuple[Tensor, Tensor, Tensor | None],
    rstds: tuple[Tensor | None, Tensor | None],
    rope: Rope,
    key_lengths: Tensor | None,
    eps: float,
    rounding: int,
) -> None:
    q, k, v = stream.q, stream.k, stream.v
    rows = max(q.shape[1], k.shape[1])
    options = _options(q, rope, layout, stream.norm)
    whole = options["INTERLEAVED"]
    options["maxnreg"] = _FORWARD_REGISTERS if whole else _FORWARD_REGISTERS_HALVES
    if rounding != FP32:  # products are rounded before they are added, as separate operators do
        options["enable_fp_fusion"] = False
    launch(
        heads_forward_kernel, (q.shape[0] * rows, 2 if v is None else 3),
        q, *_strides(q), stream.q_weight, outs[0], rstds[0],
        k, *_strides(k), stream.k_weight, outs[1], rstds[1],
        v, *_strides(v), outs[2], *rope.arguments(), *_lengths(key_lengths),
        q.shape[1], k.shape[1], *layout.scalars(), eps, ROUNDING=rounding, **options,
    )  # fmt: skip


def qk_norm_rope_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    eps: float,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_out = q.new_empty(q.shape, dtype=promoted(q, q_weight))
    k_out = k.new_empty(k.shape, dtype=promoted(k, k_weight))
    q_rstd = q.new_empty(q.shape[:3], dtype=torch.float32)
    k_rstd = k.new_empty(k.shape[:3], dtype=torch.float32)
    _forward(
        Stream(q, k, None, q_weight, k_weight, True),
        _separate(q, k),
        (q_out, k_out, None),
        (q_rstd, k_rstd),
        Rope(cos, sin, interleaved),
        None,
        eps,
        rounding,
    )
    return q_out, k_out, q_rstd, k_rstd


def _separate(q: Tensor, k: Tensor) -> Layout:
    return Layout(0, 1, q.shape[1], k.shape[1], 0, 0, 0, k.shape[1], 0)


def _layouts(q1: Tensor, k1: Tensor, q2: Tensor | None, k2: Tensor | None) -> list[Layout]:
    """Of each stream. Positions in the rope are those of the keys: queries may be absent."""
    if q2 is None or k2 is None:
        return [_separate(q1, k1)]
    queries, keys = q1.shape[1] + q2.shape[1], k1.shape[1] + k2.shape[1]
    sizes = (k1.shape[1], k2.shape[1])
    return [
        Layout(0, 2, queries, keys, 0, 0, 0, *sizes),
        Layout(1, 2, queries, keys, q1.shape[1], k1.shape[1], k1.shape[1], *sizes),
    ]


def joint_heads_forward(
    q1: Tensor,
    k1: Tensor,
    v1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    q1_weight: Tensor | None,
    k1_weight: Tensor | None,
    q2_weight: Tensor | None,
    k2_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_lengths: Tensor | None,
    norm1: bool,
    norm2: bool,
    interleaved: bool,
    eps: float,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = heads_dtype(q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight)
    layouts = _layouts(q1, k1, q2, k2)
    batch, _, heads, width = q1.shape
    sizes = (layouts[0].q_total, layouts[0].k_total)
    q, k, v = (
        q1.new_empty((batch, rows, heads, width), dtype=dtype) for rows in (*sizes, sizes[1])
    )
    normed = norm1 or norm2
    q_rstd, k_rstd = (
        q1.new_empty((batch, rows, heads) if normed else (0,), dtype=torch.float32)
        for rows in sizes
    )
    streams = [Stream(q1, k1, v1, q1_weight, k1_weight, norm1)]
    if q2 is not None and k2 is not None:
        streams.append(Stream(q2, k2, v2, q2_weight, k2_weight, norm2))
    rstds = (q_rstd, k_rstd) if normed else (None, None)
    rope = Rope(cos, sin, interleaved)
    for stream, layout in zip(streams, layouts, strict=True):
        _forward(stream, layout, (q, k, v), rstds, rope, key_lengths, eps, rounding)
    return q, k, v, q_rstd, k_rstd


def _tokens_per_chunk(tokens: int) -> int:
    """Tokens whose shares of a weight's gradient are one float32 row.

    Enough chunks to fill a GPU (some 512 of each of q, k, v), and as few partial rows as that
    allows. A function of the shape alone, so results repeat on any device.
    """
    return max(1, min(32, 1 << max(tokens // 512, 1).bit_length() - 1))


class Wanted(NamedTuple):
    """Gradients of a stream's operands, by the names of :class:`Stream`; None where not asked."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None


def _backward(
    stream: Stream,
    layout: Layout,
    grads: tuple[Tensor, Tensor, Tensor | None],
    rstds: tuple[Tensor | None, Tensor | None],
    rope: Rope,
    key_lengths: Tensor | None,
    wanted: Wanted,
    partials: Partials,
) -> None:
    q, k, v = stream.q, stream.k, stream.v
    q_grad, k_grad, v_grad, q_weight_grad, k_weight_grad = wanted
    tokens = q.shape[0] * max(q.shape[1], k.shape[1])
    per_chunk = _tokens_per_chunk(tokens)
    chunks = triton.cdiv(tokens, per_chunk)
    q_rstd, k_rstd = rstds if stream.norm else (None, None)
    options = _options(q, rope, layout, stream.norm)
    options["maxnreg"] = _backward_registers(options["INTERLEAVED"], grads[0], *stream[:5])
    launch(
        heads_backward_kernel, (chunks, 2 if v_grad is None else 3),
        grads[0], *_strides(grads[0]), q, *_strides(q), stream.q_weight, q_rstd,
        q_grad, partials.sink(q_weight_grad, chunks),
        grads[1], *_strides(grads[1]), k, *_strides(k), stream.k_weight, k_rstd,
        k_grad, partials.sink(k_weight_grad, chunks),
        grads[2], *_strides(grads[2]), v, *_strides(v), v_grad,
        *rope.arguments(), *_lengths(key_lengths),
        q.shape[0], q.shape[1], k.shape[1], *layout.scalars(),
        ROWS=per_chunk, **options,
    )  # fmt: skip


def _backward_registers(whole: bool, *operands: Tensor | None) -> int:
    if len({operand.dtype for operand in operands if operand is not None}) > 1:
        return _BACKWARD_REGISTERS_MIXED
    return _BACKWARD_REGISTERS if whole else _BACKWARD_REGISTERS_HALVES


def _partials(q: Tensor) -> Partials:
    """Of weights [E]; each stream has a number of chunks of its own."""
    return Partials(1, 0, q.shape[3], 0, q)


def _scattered(wanted: int, *operands: Tensor | None) -> list[Tensor | None]:
    """The gradients asked for, in the places of their operands."""
    made = iter(gradients_like(wanted, *operands))
    return [
        next(made) if operand is not None and wanted >> bit & 1 else None
        for bit, operand in enumerate(operands)
    ]


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    interleaved: bool,
    eps: float,
    rounding: int,
    wanted: int,
) -> list[Tensor]:
    found = _scattered(wanted, q, k, q_weight, k_weight)
    partials = _partials(q)
    _backward(
        Stream(q, k, None, q_weight, k_weight, True),
        _separate(q, k),
        (grad_q, grad_k, None),
        (q_rstd, k_rstd),
        Rope(cos, sin, interleaved),
        None,
        Wanted(found[0], found[1], None, found[2], found[3]),
        partials,
    )
    partials.reduce()
    return [gradient for gradient in found if gradient is not None]


def joint_heads_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q1: Tensor,
    k1: Tensor,
    v1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    q1_weight: Tensor | None,
    k1_weight: Tensor | None,
    q2_weight: Tensor | None,
    k2_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_lengths: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    norm1: bool,
    norm2: bool,
    interleaved: bool,
    eps: float,
    rounding: int,
    wanted: int,
) -> list[Tensor]:
    found = _scattered(
        wanted, q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight
    )  # fmt: skip
    streams = [(Stream(q1, k1, v1, q1_weight, k1_weight, norm1), (0, 1, 2, 6, 7))]
    if q2 is not None and k2 is not None:
        streams.append((Stream(q2, k2, v2, q2_weight, k2_weight, norm2), (3, 4, 5, 8, 9)))
    partials = _partials(q1)
    rope = Rope(cos, sin, interleaved)
    for (stream, bits), layout in zip(streams, _layouts(q1, k1, q2, k2), strict=True):
        gradients = Wanted(*(found[bit] for bit in bits))
        if any(gradient is not None for gradient in gradients):
            _backward(
                stream, layout, (grad_q, grad_k, grad_v), (q_rstd, k_rstd), rope, key_lengths,
                gradients, partials,
            )  # fmt: skip
    partials.reduce()
    return [gradient for gradient in found if gradient is not None]
