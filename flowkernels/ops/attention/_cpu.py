"""The CPU's attention core: our C++ for short sequences, PyTorch's blocks for longer ones.

No mask is ever made. Ours takes the keys' lengths. For PyTorch's, keys come packed (valid ones
first), so a sample's keys are a slice, and neighbouring samples of equal length share one call.
The tensors are [B, S, H, E] in memory, which PyTorch's kernel reads by its strides and is also
what it writes.
"""

from __future__ import annotations

import torch

from flowkernels.ops import _native
from flowkernels.ops.attention import _operators as operators

Tensor = torch.Tensor

# Up to here a head's scores stay in the cache, and its products are too small for a library's: 1.2
# to 3.9 times as fast as PyTorch's (two cores with AVX-512).
_SHORT = 256
_NATIVE = _native.OFF["cpu"] is None
# Rows of NaN with fewer keys than a vector register holds are masked rows to PyTorch's kernel: it
# writes 0 for them. Ours does not.
_FEW = 16

# PyTorch multiplies narrow operands on CPU by instructions that this tells of, if at all.
_BFLOAT16_PRODUCTS = torch.cpu._is_avx512_bf16_supported()
_LONG = 512

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _runs(lengths: Tensor, keys: int) -> list[tuple[int, int, int]]:
    """(first sample, samples, keys of each) for neighbours of equal length."""
    found: list[tuple[int, int, int]] = []
    for sample, length in enumerate(lengths.clamp(0, keys).tolist()):
        if found and found[-1][2] == length:
            found[-1] = (found[-1][0], found[-1][1] + 1, length)
        else:
            found.append((sample, 1, length))
    return found


def _narrow_is_slow(forward: bool, dtype: torch.dtype, rows: int, keys: int) -> bool:
    """Whether PyTorch's kernel takes longer in ``dtype`` than in float32, casts included.

    In float16 it always does: 2-3 times forward, 7-12 times backward. In bfloat16 backward does
    below 512 tokens (5 times at 81, as long at 512, 0.8 times at 1357; AVX-512 with bfloat16).
    """
    if dtype == torch.float32:
        return False
    if dtype == torch.float16:
        return True
    return not forward and (min(rows, keys) < _LONG or not _BFLOAT16_PRODUCTS)


def _forward_run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    keys, dtype = k.shape[1], q.dtype
    if keys == 0 or q.numel() == 0:
        lse = q.new_full((batch, heads, rows), float("-inf"), dtype=torch.float32)
        return q.new_zeros(q.shape), lse
    if keys < _FEW and _NATIVE:
        return operators.short_attention_forward.default(q, k, v, None, scale)
    if _narrow_is_slow(True, dtype, rows, keys):
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False, scale=scale
    )
    return out.transpose(1, 2).to(dtype), lse


def _is_short(q: Tensor, k: Tensor) -> bool:
    return _NATIVE and q.shape[1] <= _SHORT and k.shape[1] <= _SHORT


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the first ``lengths`` keys, and its log-sum-exp [B, H, Q]."""
    if _is_short(q, k):
        return operators.short_attention_forward.default(q, k, v, lengths, scale)
    runs = None if lengths is None else _runs(lengths, k.shape[1])
    if not runs:
        out, lse = _forward_run(q, k, v, scale)
    elif len(runs) == 1:
        out, lse = _forward_run(q, k[:, : runs[0][2]], v[:, : runs[0][2]], scale)
    else:
        parts = [
            _forward_run(
                q.narrow(0, start, count),
                k.narrow(0, start, count)[:, :keys],
                v.narrow(0, start, count)[:, :keys],
                scale,
            )
            for start, count, keys in runs
        ]
        out, lse = (torch.cat(each) for each in zip(*parts, strict=True))
    return out.contiguous(), lse.contiguous()


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; those of keys beyond ``lengths`` are zero."""
    if _is_short(q, k):
        return operators.short_attention_backward.default(grad_out, q, k, v, lengths, scale)
    if lengths is None and q.numel() and k.numel():
        return _backward_run(grad_out, q, k, v, out, lse, scale)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    runs = [] if lengths is None else _runs(lengths, k.shape[1])
    for start, count, keys in runs:
        if keys == 0 or q.shape[1] == 0:
            continue
        samples = slice(start, start + count)
        dq[samples], dk[samples, :keys], dv[samples, :keys] = _backward_run(
            grad_out[samples],
            q[samples],
            k[samples, :keys],
            v[samples, :keys],
            out[samples],
            lse[samples],
            scale,
        )
    return dq, dk, dv


def _backward_run(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    if _narrow_is_slow(False, dtype, q.shape[1], k.shape[1]):
        grad_out, q, k, v, out = (x.float() for x in (grad_out, q, k, v, out))
    dq, dk, dv = _backward(
        grad_out.transpose(1, 2),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        out.transpose(1, 2),
        lse,
        0.0,
        False,
        scale=scale,
    )
    return (
        dq.transpose(1, 2).to(dtype).contiguous(),
        dk.transpose(1, 2).to(dtype).contiguous(),
        dv.transpose(1, 2).to(dtype).contiguous(),
    )
