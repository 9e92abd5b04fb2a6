"""The attention cores: who computes softmax(scale · q kᵀ) v on the joint layout.

A core is a pair of functions on contiguous q [B, Q, H, E] and k, v [B, S, H, E]:

    forward(q, k, v, lengths, scale) -> (out [B, Q, H, E], tensors that backward needs)
    backward(grad_out, q, k, v, out, saved, lengths, scale) -> (dq, dk, dv)

``lengths`` [B] int32 (or None) counts a sample's valid keys, which lie first; the others are zeros
and their dk, dv are read by nobody but the packing, which drops them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from flowkernels.ops.attention import _cpu
from flowkernels.ops.attention import _operators as operators

Tensor = torch.Tensor
Saved = tuple[Tensor | None, ...]
Gradients = tuple[Tensor, Tensor, Tensor]

_aten = torch.ops.aten


class Core(Protocol):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]: ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients: ...


class Own:
    """The operators ``attention_forward`` and ``attention_backward``: our Triton core."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]:
        out, lse = operators.attention_forward(self.backend, q, k, v, lengths, scale)
        return out, (lse,)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients:
        dq, dk, dv = operators.attention_backward(
            self.backend, grad_out, q, k, v, out, saved[0], lengths, scale
        )
        return dq, dk, dv


class Cpu(Own):
    """Ours or PyTorch's blocks, by length.

    Called past the dispatcher, which a function in Python pays for twice.
    """

    def __init__(self) -> None:
        super().__init__("native")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]:
        if torch.compiler.is_compiling():
            return super().forward(q, k, v, lengths, scale)
        out, lse = _cpu.attention_forward(q, k, v, lengths, scale)
        return out, (lse,)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients:
        if torch.compiler.is_compiling():
            return super().backward(grad_out, q, k, v, out, saved, lengths, scale)
        (lse,) = saved
        assert lse is not None
        return _cpu.attention_backward(grad_out, q, k, v, out, lse, lengths, scale)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


class Flash:
    """PyTorch's FlashAttention; key lengths through its packed form, with no host sync."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]:
        if lengths is None:
            out, lse, _, _, _, _, seed, offset, _ = (
                _aten._scaled_dot_product_flash_attention.default(
                    *_heads_first(q, k, v), 0.0, False, False, scale=scale
                )
            )
            return out.transpose(1, 2), (lse, seed, offset)
        ends_q, ends_k = _interleaved_ends(q, k, lengths)
        out, lse, seed, offset, _ = _aten._flash_attention_forward.default(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            ends_q,
            ends_k,
            q.shape[1],
            k.shape[1],
            0.0,
            False,
            False,
            scale=scale,
        )
        return out.view(q.shape), (lse, seed, offset)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients:
        lse, seed, offset = saved
        rows, keys = q.shape[1], k.shape[1]
        if lengths is None:
            found = _aten._scaled_dot_product_flash_attention_backward.default(
                *_heads_first(grad_out, q, k, v, out),
                lse,
                None,
                None,
                rows,
                keys,
                0.0,
                False,
                seed,
                offset,
                scale=scale,
            )
            dq, dk, dv = _heads_first(*found)
            return dq, dk, dv
        flat = [x.flatten(0, 1) for x in (grad_out, q, k, v, out)]
        ends = _interleaved_ends(q, k, lengths)
        dq, dk, dv = _aten._flash_attention_backward.default(
            *flat, lse, *ends, rows, keys, 0.0, False, seed, offset, scale=scale
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _interleaved_ends(q: Tensor, k: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of 2·B sequences: a sample's queries with its valid keys, then no query with the rest.

    The packed form of FlashAttention has no gaps between sequences; the second of each pair is the
    gap. So lengths stay on the device and padded rows of dk and dv are written as zeros.
    """
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    sample = torch.arange(batch, device=q.device, dtype=torch.int32)
    ends_q = ((sample + 1) * rows).repeat_interleave(2)
    ends_k = torch.stack([sample * keys + lengths, (sample + 1) * keys], dim=1).flatten()
    pad = torch.nn.functional.pad
    return pad(ends_q, (1, 0)).to(torch.int32), pad(ends_k, (1, 0)).to(torch.int32)


class Efficient:
    """PyTorch's memory-efficient attention: float32 on a GPU; key lengths as one row of bias."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]:
        bias = None if lengths is None else _bias(q, k, lengths)
        out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention.default(
            *_heads_first(q, k, v), bias, True, 0.0, False, scale=scale
        )
        out = out.transpose(1, 2)
        return _where_keys(out, lengths), (lse, seed, offset)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients:
        bias = None if lengths is None else _bias(q, k, lengths)
        grad, q_, k_, v_, out_ = _heads_first(grad_out, q, k, v, out)
        found = _aten._scaled_dot_product_efficient_attention_backward.default(
            grad, q_, k_, v_, bias, out_, *saved, 0.0, [True, True, True, False], False, scale=scale
        )
        dq, dk, dv = _heads_first(*found[:3])
        return (
            _where_keys(dq, lengths),
            _where_keys(dk, lengths),
            _where_keys(dv, lengths),
        )


def _bias(q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
    """0 for a valid key, -inf for another: [B, 1, 1, S] in memory, [B, H, Q, S] by strides of 0."""
    keys = k.shape[1]
    # The kernel reads rows of bias that begin at multiples of 16.
    row = torch.arange((keys + 15) // 16 * 16, device=q.device)
    bias = torch.zeros(q.shape[0], row.shape[0], dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(row >= lengths.unsqueeze(1), float("-inf"))[:, None, None, :keys]
    return bias.expand(-1, q.shape[2], q.shape[1], -1)


def _where_keys(x: Tensor, lengths: Tensor | None) -> Tensor:
    """0 in samples with no valid key, whose softmax is 0/0."""
    if lengths is None:
        return x
    return torch.where((lengths > 0)[:, None, None, None], x, torch.zeros_like(x))


class Cudnn:
    """cuDNN's attention through PyTorch; all keys valid."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]:
        out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention.default(
            *_heads_first(q, k, v), None, True, 0.0, False, False, scale=scale
        )
        return out.transpose(1, 2), (lse, seed, offset)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients:
        lse, seed, offset = saved
        found = _aten._scaled_dot_product_cudnn_attention_backward.default(
            *_heads_first(grad_out, q, k, v, out),
            lse,
            seed,
            offset,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            False,
            scale=scale,
        )
        dq, dk, dv = _heads_first(*found)
        return dq, dk, dv


class Xformers:
    """xformers' memory_efficient_attention; lengths as a block-diagonal bias of 2·B sequences."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Saved]:
        from xformers.ops import fmha

        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *self._flat(lengths, q, k, v), self._bias(q, k, lengths), scale=scale
        )
        return out.view(q.shape), (lse,)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        saved: Saved,
        lengths: Tensor | None,
        scale: float,
    ) -> Gradients:
        from xformers.ops import fmha

        grad_out, q_, k_, v_, out = self._flat(lengths, grad_out, q, k, v, out)
        dq, dk, dv = fmha.memory_efficient_attention_backward(
            grad_out, out, saved[0], q_, k_, v_, self._bias(q, k, lengths), scale=scale
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)

    @staticmethod
    def _flat(lengths: Tensor | None, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors if lengths is None else [x.flatten(0, 1).unsqueeze(0) for x in tensors]

    @staticmethod
    def _bias(q: Tensor, k: Tensor, lengths: Tensor | None) -> Any:
        """Each sample's queries with its valid keys, then no query with the rest; reads lengths."""
        if lengths is None:
            return None
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        rows, keys = q.shape[1], k.shape[1]
        valid = lengths.tolist()
        return BlockDiagonalMask.from_seqlens(
            q_seqlen=[each for _ in valid for each in (rows, 0)],
            kv_seqlen=[each for count in valid for each in (count, keys - count)],
        )


CORES: dict[str, Core] = {
    "cpu": Cpu(),
    "triton": Own("triton"),
    "flash": Flash(),
    "efficient": Efficient(),
    "cudnn": Cudnn(),
    "xformers": Xformers(),
}
