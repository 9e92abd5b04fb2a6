"""One dual-stream block of an MM-DiT, on the fused operators.

The residual chain of a block is `h ← h + gate·branch; n ← norm(h)·(1+scale)+shift`, twice per
stream, and the second norm belongs to the *next* block. `gated_residual_norm` computes such a
pair in one pass over memory, so a block takes its input already normed and returns its output
normed with the modulation that follows; no norm is ever a pass of its own.

Source: arXiv 2403.03206 (MM-DiT), arXiv 2212.09748 (adaLN-zero).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.nn.attention import Heads, joint_attention
from flowkernels.nn.config import MMDiTConfig
from flowkernels.ops import gated_residual_norm, gelu_tanh

Modulation = tuple[Tensor, ...]
"""Views [B, D] into one modulation matrix; their row stride is that of the whole matrix."""


class FeedForward(nn.Module):
    """`fc2(gelu_tanh(fc1(x)))`; the bias of `fc1` is added inside the activation's pass."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.fc1.weight)
        # Under autocast `hidden` is narrower than the bias: the activation stays narrow.
        out: Tensor = self.fc2(gelu_tanh(hidden, self.fc1.bias.to(hidden.dtype)))
        return out


class QKNorm(nn.Module):
    """RMS norm of queries and of keys over each head's channels."""

    def __init__(self, head_dim: int, eps: float, *, keys_only: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.q_weight = None if keys_only else nn.Parameter(torch.ones(head_dim))
        self.k_weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(q, self.q_weight), self._norm(k, self.k_weight)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)


class Stream(nn.Module):
    """One stream's half of a joint block: its projections and its feed-forward.

    Args:
        config: the model's configuration.
        keys_only: the stream is only attended to (the context of the last block): it has keys
            and values, and neither queries, output projection nor feed-forward.
    """

    def __init__(self, config: MMDiTConfig, *, keys_only: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.eps = config.eps
        self.keys_only = keys_only
        self.qkv = nn.Linear(config.dim, (2 if keys_only else 3) * config.dim)
        self.qk_norm = (
            QKNorm(config.head_dim, config.eps, keys_only=keys_only) if config.qk_norm else None
        )
        if not keys_only:
            self.out = nn.Linear(config.dim, config.dim)
            self.mlp = FeedForward(config.dim, config.hidden_dim)

    def project(self, normed: Tensor) -> Heads:
        """Queries, keys and values [B, S, H, E]; queries of length 0 where `keys_only`."""
        qkv = self.qkv(normed).unflatten(-1, (-1, self.heads, normed.shape[-1] // self.heads))
        k, v = qkv[:, :, -2], qkv[:, :, -1]
        q = k[:, :0] if self.keys_only else qkv[:, :, 0]
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return q, k, v

    def finish(
        self, h: Tensor, attended: Tensor, modulation: Modulation, following: Modulation
    ) -> tuple[Tensor, Tensor]:
        """Both residual additions, each with the norm after it.

        Args:
            h: [B, S, D] the stream.
            attended: [B, S, D] output of the attention core.
            modulation: (attention gate, shift, scale, feed-forward gate), each [B, D].
            following: (shift, scale) of the norm after this block.

        Returns:
            The stream and the stream normed by `following`.
        """
        attention_gate, shift, scale, mlp_gate = modulation
        h, normed = gated_residual_norm(
            h, self.out(attended), attention_gate, shift, scale, eps=self.eps
        )
        return gated_residual_norm(h, self.mlp(normed), mlp_gate, *following, eps=self.eps)


class JointBlock(nn.Module):
    """Joint attention of image and context, then each stream's feed-forward.

    Args:
        config: the model's configuration.
        context_pre_only: the last block, whose context output nobody reads.
    """

    def __init__(self, config: MMDiTConfig, *, context_pre_only: bool = False) -> None:
        super().__init__()
        self.context_pre_only = context_pre_only
        self.image = Stream(config)
        self.context = Stream(config, keys_only=context_pre_only)

    def forward(
        self,
        x: Tensor,
        x_normed: Tensor,
        c: Tensor,
        c_normed: Tensor,
        x_modulation: Modulation,
        c_modulation: Modulation,
        x_following: Modulation,
        c_following: Modulation,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes and returns both streams, each plain and normed for what comes next.

        The modulations are those of `Stream.finish`; where `context_pre_only`, the context's
        are empty and the context is returned as it came.
        """
        x_attended, c_attended = joint_attention(
            self.image.project(x_normed), self.context.project(c_normed)
        )
        x, x_normed = self.image.finish(x, x_attended, x_modulation, x_following)
        if not self.context_pre_only:
            c, c_normed = self.context.finish(c, c_attended, c_modulation, c_following)
        return x, x_normed, c, c_normed
