"""A stream's way into attention: one matrix for queries, keys and values, and their norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowkernels.nn.config import MMDiTConfig
from flowkernels.ops import joint_attention

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [B, S, H, E], any strides with a unit last one."""

Norms = tuple[Tensor | None, Tensor | None] | None
"""Weights [E] of the norms of queries and of keys, or None where they are not normed."""


class QKNorm(nn.Module):
    """The weights of the RMS norms of queries and of keys; the norms are part of attention."""

    def __init__(self, head_dim: int, *, keys_only: bool = False) -> None:
        super().__init__()
        self.q_weight = None if keys_only else nn.Parameter(torch.ones(head_dim))
        self.k_weight = nn.Parameter(torch.ones(head_dim))

    def weights(self, dtype: torch.dtype) -> Norms:
        """Both in `dtype`: under autocast the heads are narrower than the weights, and stay so."""
        return None if self.q_weight is None else self.q_weight.to(dtype), self.k_weight.to(dtype)


class QKVProjection(nn.Module):
    """What every block has of a stream before attention.

    Args:
        config: the model's configuration.
        keys_only: the stream is only attended to (the context of the last joint block): it has
            keys and values, and no queries.
    """

    def __init__(self, config: MMDiTConfig, *, keys_only: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.eps = config.eps
        self.keys_only = keys_only
        self.qkv = nn.Linear(config.dim, (2 if keys_only else 3) * config.dim)
        self.qk_norm = QKNorm(config.head_dim, keys_only=keys_only) if config.qk_norm else None

    def project(self, normed: Tensor) -> tuple[Heads, Norms]:
        """(q, k, v), views of one projection, and their norms; `q` has no rows if `keys_only`."""
        qkv = self.qkv(normed).unflatten(-1, (-1, self.heads, normed.shape[-1] // self.heads))
        # unbind and not indexing: its gradient is one stack, not a sum of padded copies.
        if self.keys_only:
            k, v = qkv.unbind(2)
            q = k.detach()[:, :0]
        else:
            q, k, v = qkv.unbind(2)
        return (q, k, v), None if self.qk_norm is None else self.qk_norm.weights(q.dtype)


class SelfAttention(QKVProjection):
    """Attention of the image tokens among themselves: SD3.5's second attention of a block."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, normed: Tensor) -> Tensor:
        heads, norms = self.project(normed)
        out: Tensor = self.out(joint_attention(heads, first_norm=norms, eps=self.eps))
        return out
