"""Joint attention of two token streams."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [B, S, H, E], any strides with a unit last one."""


def joint_attention(first: Heads, second: Heads) -> tuple[Tensor, Tensor]:
    """Softmax attention of both streams over both: `softmax(q kᵀ/√E) v` on joined tokens.

    A stream whose own output is not wanted passes queries of length 0, and costs none.

    Args:
        first: (q, k, v) of the first stream, each [B, S₁, H, E].
        second: (q, k, v) of the second stream, each [B, S₂, H, E].

    Returns:
        The streams' outputs, [B, S₁, H·E] and [B, S₂, H·E], by the lengths of their queries.

    Source: arXiv 2403.03206 (MM-DiT).

    Example:
        >>> x, c = torch.randn(3, 2, 5, 1, 4), torch.randn(3, 2, 2, 1, 4)
        >>> [tuple(out.shape) for out in joint_attention(tuple(x), tuple(c))]
        [(2, 5, 4), (2, 2, 4)]
    """
    dtype, device = first[0].dtype, first[0].device
    lengths = [first[0].shape[1], second[0].shape[1]]
    q, k, v = (torch.cat([a, b], dim=1).transpose(1, 2) for a, b in zip(first, second, strict=True))
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # PyTorch's CPU backward in a narrow dtype takes nine times that in float32 (17 tokens,
        # 32 channels), casts included; and under autocast it would be chosen again.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2).flatten(2)
    out_first, out_second = torch.split(out, lengths, dim=1)
    return out_first, out_second
