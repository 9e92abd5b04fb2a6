"""Joint attention as diffusers' processors compute it, with our operators or with their own calls.

The user's attention backend decides the core: ours where ``joint_attention`` has it, diffusers'
``dispatch_attention_fn`` on the joint q, k, v where it has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import nn

from flowkernels.integrations._checks import plain
from flowkernels.integrations._state import State
from flowkernels.ops import _library, joint_attention, qk_norm_rope
from flowkernels.ops._validate import kernels_read
from flowkernels.ops.attention import _joint_heads
from flowkernels.ops.attention._select import select

Tensor = torch.Tensor
Rope = tuple[Tensor, Tensor]

_NATIVE = AttentionBackendName.NATIVE

# Backends that are a core of joint_attention, on CUDA; on the CPU there is SDPA alone.
_CORES = {
    AttentionBackendName._NATIVE_CUDNN: "cudnn",
    AttentionBackendName._NATIVE_FLASH: "flash",
    AttentionBackendName.XFORMERS: "xformers",
}


NORM_AND_ROPE_SOURCES = (RMSNorm.forward, apply_rotary_emb)


class Stream(NamedTuple):
    """One stream's projections [B, S, H, E] and the modules that norm them, if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Any
    norm_k: Any


class Backend(NamedTuple):
    """Where attention runs.

    Attributes:
        name: diffusers' backend.
        core: The core of ``joint_attention`` that is this backend, or None.
        sdpa: Whether diffusers itself would call SDPA whatever the user set, as it does for SD3.
    """

    name: AttentionBackendName
    core: str | None
    sdpa: bool


def backend_of(processor: Any, device: torch.device, sdpa: bool) -> Backend:
    """The backend of a processor: its own, else the one active now (a context, a variable)."""
    chosen = getattr(processor, "_attention_backend", None)
    name = _AttentionBackendRegistry._active_backend if chosen is None else chosen
    if name == _NATIVE:
        # "native" is also what nobody chose: then the best core known is taken.
        core: str | None = "auto" if chosen is None else "sdpa"
    else:
        core = _CORES.get(name) if device.type == "cuda" else None
    return Backend(name, core, sdpa)


def attend(
    state: State, streams: Sequence[Stream], rope: Rope | None, backend: Backend
) -> tuple[Tensor, ...]:
    """Attention of the joint tokens: each stream's output, [B, S_i, H·E]."""
    if state.exact:
        return _exact(state, streams, rope, backend)
    norms = [_norm_weights(stream) for stream in streams]
    eps = {norm.eps for norm in norms if norm is not None and norm.eps is not None}
    fused = len(eps) <= 1 and None not in norms
    core = core_for(state, backend, streams[0].q)
    if core is not None:
        if not fused:
            streams = [_normed(stream, backend.sdpa) for stream in streams]
            norms, eps = [_NO_NORM] * len(streams), set()
        return _joint(streams, norms, rope, eps.pop() if eps else 1e-6, core)
    if (state.qk_norm_rope or state.joint_attention) and fused and eps:
        streams = _normed_rotated(streams, norms, rope, eps.pop())
        rope = None
    else:
        streams = [_normed(stream, backend.sdpa) for stream in streams]
    return _dispatched(streams, rope, backend, keep_sdpa=False)


def _exact(
    state: State, streams: Sequence[Stream], rope: Rope | None, backend: Backend
) -> tuple[Tensor, ...]:
    """Norms, rotation and softmax by diffusers' own calls, so that every rounding is theirs.

    Ours is then the joint layout alone, which rounds nothing, and only where diffusers' own is the
    same: SD3 has heads before tokens, and what a kernel sums in which order may hang on strides.
    """
    streams = [_normed(stream, backend.sdpa) for stream in streams]
    parts = [x for stream in streams for x in stream[:3]]
    laid_out = (
        state.joint_attention
        and not backend.sdpa
        and len(streams) == 2
        and all(x.dtype == parts[0].dtype for x in parts)
    )
    if not laid_out:
        return _dispatched(streams, rope, backend, keep_sdpa=True)
    parts = [x for stream in _rotated(streams, rope) for x in stream[:3]]
    kernels = _library.choose("joint_attention", parts[0].device, kernels_read(*parts))
    operands = (*parts, *([None] * 7))
    q, k, v = _joint_heads(kernels, parts[0].dtype, operands, (False, False, True, 1e-6, 0))
    out = dispatch_attention_fn(q, k, v, backend=backend.name)
    lengths = [stream.q.shape[1] for stream in streams]
    return tuple(out.flatten(2).to(q.dtype).split_with_sizes(lengths, dim=1))


def core_for(state: State, backend: Backend, q: Tensor) -> str | None:
    """The core with which ``joint_attention`` serves these heads, or None: then diffusers does.

    A core that the user chose may take fewer dtypes and widths than diffusers' backend.
    """
    if not state.joint_attention or state.exact:
        return None
    if backend.core is None or backend.core == "auto":
        return backend.core
    try:
        select(backend.core, "triton", q.device, q.dtype, q.shape[-1], lengths=False)
    except ValueError:
        return None
    return backend.core


class _Norm(NamedTuple):
    """A stream's weights as ``joint_attention`` takes them; eps is None where nothing is normed."""

    weights: tuple[Tensor | None, Tensor | None] | None
    eps: float | None


_NO_NORM = _Norm(None, None)


def _norm_weights(stream: Stream) -> _Norm | None:
    """The weights of a stream's RMS norms; None where only the modules themselves will do."""
    q, k = stream.norm_q, stream.norm_k
    if q is None and k is None:
        return _NO_NORM
    if not (plain(q, RMSNorm, nn.RMSNorm) and plain(k, RMSNorm, nn.RMSNorm)):
        return None
    if q.eps is None or q.eps != k.eps or _has_bias(q) or _has_bias(k):
        return None
    # Under autocast q and k are narrower than the weights; the weights follow them.
    weights = tuple(
        None if norm.weight is None else norm.weight.to(stream.q.dtype) for norm in (q, k)
    )
    return _Norm(weights, float(q.eps))  # type: ignore[arg-type]


def _has_bias(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is not None


def _normed(stream: Stream, heads_first: bool) -> Stream:
    """q and k through their modules, in the layout in which diffusers calls them."""

    def through(norm: Any, x: Tensor) -> Tensor:
        if norm is None:
            return x
        return norm(x.transpose(1, 2)).transpose(1, 2) if heads_first else norm(x)

    q, k = through(stream.norm_q, stream.q), through(stream.norm_k, stream.k)
    return Stream(q, k, stream.v, None, None)


def _ropes(streams: Sequence[Stream], rope: Rope | None) -> list[Rope | None]:
    """Each stream's rows of the joint rope."""
    found: list[Rope | None] = []
    start = 0
    for stream in streams:
        rows = slice(start, start + stream.k.shape[1])
        start = rows.stop
        found.append(None if rope is None else (rope[0][rows], rope[1][rows]))
    return found


def _rotated(streams: Sequence[Stream], rope: Rope | None) -> list[Stream]:
    """q and k rotated by diffusers' own function."""
    if rope is None:
        return list(streams)
    return [
        stream._replace(q=_turned(stream.q, own), k=_turned(stream.k, own))
        for stream, own in zip(streams, _ropes(streams, rope), strict=True)
    ]


def _turned(x: Tensor, rope: Any) -> Tensor:
    return apply_rotary_emb(x, rope, sequence_dim=1)  # type: ignore[return-value]


def _normed_rotated(
    streams: Sequence[Stream], norms: Sequence[_Norm | None], rope: Rope | None, eps: float
) -> list[Stream]:
    """q and k through ``qk_norm_rope``; a stream without norms only rotated."""
    found = []
    for stream, norm, own in zip(streams, norms, _ropes(streams, rope), strict=True):
        if norm is None or norm.weights is None:
            found += [stream] if own is None else _rotated([stream], own)
            continue
        q_weight, k_weight = norm.weights
        q, k = qk_norm_rope(
            stream.q, stream.k, q_weight=q_weight, k_weight=k_weight, rope=own, eps=eps
        )
        found.append(Stream(q, k, stream.v, None, None))
    return found


def _joint(
    streams: Sequence[Stream],
    norms: Sequence[_Norm | None],
    rope: Rope | None,
    eps: float,
    core: str,
) -> tuple[Tensor, ...]:
    weights = [None if norm is None else norm.weights for norm in norms]
    if len(streams) == 1:
        return (
            joint_attention(streams[0][:3], first_norm=weights[0], rope=rope, eps=eps, core=core),
        )
    return joint_attention(
        streams[0][:3],
        streams[1][:3],
        first_norm=weights[0],
        second_norm=weights[1],
        rope=rope,
        eps=eps,
        core=core,
    )


def _dispatched(
    streams: Sequence[Stream], rope: Rope | None, backend: Backend, keep_sdpa: bool
) -> tuple[Tensor, ...]:
    """diffusers' own calls on q, k, v that are normed already: bit for bit its processors'."""
    lengths = [stream.q.shape[1] for stream in streams]
    columns = ([s.q for s in streams], [s.k for s in streams], [s.v for s in streams])
    if backend.sdpa and (keep_sdpa or backend.name == _NATIVE):
        q, k, v = (_together([x.transpose(1, 2) for x in parts], 2) for parts in columns)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2)
    else:
        q, k, v = (_together(parts, 1) for parts in columns)
        if rope is not None:
            q, k = _turned(q, rope), _turned(k, rope)
        out = dispatch_attention_fn(q, k, v, backend=backend.name)
    return tuple(out.flatten(2).to(q.dtype).split_with_sizes(lengths, dim=1))


def _together(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
