"""One dual-stream block of an MM-DiT, on the fused operators.

The residual chain of a block is `h ← h + gate·branch; n ← norm(h)·(1+scale)+shift`, twice per
stream, and the second norm belongs to the *next* block. `gated_residual_norm` computes such a
pair in one pass over memory, so a block takes its input already normed and returns its output
normed with the modulation that follows; no norm is ever a pass of its own, but the one that a
second attention (SD3.5) reads, whose modulation differs.

Source: arXiv 2403.03206 (MM-DiT), arXiv 2212.09748 (adaLN-zero).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.positions import Rope
from flowkernels.nn.projection import QKVProjection, SelfAttention
from flowkernels.ops import (
    gated_residual,
    gated_residual_norm,
    gelu_tanh,
    joint_attention,
    modulated_norm,
)

Modulation = tuple[Tensor, ...]
"""Views [B, D] into one modulation matrix; their row stride is that of the whole matrix."""


class FeedForward(nn.Module):
    """`fc2(gelu_tanh(fc1(x)))`; the bias of `fc1` is added inside the activation's pass."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(activated(self.fc1, x))
        return out


def activated(linear: nn.Linear, x: Tensor) -> Tensor:
    """`gelu_tanh(linear(x))`, the bias added in the activation's pass."""
    hidden = F.linear(x, linear.weight)
    # Under autocast `hidden` is narrower than the bias: the activation stays narrow.
    return gelu_tanh(hidden, linear.bias.to(hidden.dtype))


class Stream(QKVProjection):
    """One stream's half of a joint block: its projections and its feed-forward.

    Args:
        config: the model's configuration.
        keys_only: the stream is only attended to (the context of the last block): it has keys
            and values, and neither queries, output projection nor feed-forward.
        dual: the stream attends to itself alone as well.
    """

    def __init__(self, config: MMDiTConfig, *, keys_only: bool = False, dual: bool = False) -> None:
        super().__init__(config, keys_only=keys_only)
        self.dual: SelfAttention | None = None
        if not keys_only:
            self.out = nn.Linear(config.dim, config.dim)
            self.mlp = FeedForward(config.dim, config.hidden_dim)
            self.dual = SelfAttention(config) if dual else None
        elif config.context_queries:
            self._keep_queries(config)

    def _keep_queries(self, config: MMDiTConfig) -> None:
        """Buffers for the query weights that diffusers' model has here, and whose result it drops.

        Buffers, so that they travel with the weights to the bit: no optimiser decays them.
        """
        self.register_buffer("unused_q_weight", torch.zeros(config.dim, config.dim))
        self.register_buffer("unused_q_bias", torch.zeros(config.dim))
        if config.qk_norm:
            self.register_buffer("unused_q_norm", torch.ones(config.head_dim))

    def finish(
        self,
        h: Tensor,
        attended: Tensor,
        modulation: Modulation,
        following: Modulation,
    ) -> tuple[Tensor, Tensor]:
        """The residual additions, each with the norm after it.

        Args:
            h: [B, S, D] the stream.
            attended: [B, S, D] output of the attention core.
            modulation: (attention gate, shift, scale, feed-forward gate), each [B, D]; then,
                for a dual attention, its (shift, scale, gate).
            following: (shift, scale) of the norm after this block.

        Returns:
            The stream and the stream normed by `following`.
        """
        gate, shift, scale, mlp_gate, *dual = modulation
        branch = self.out(attended)
        if self.dual is not None:
            # It reads the norm of the block's input, as the joint attention does, under another
            # modulation.
            second = self.dual(modulated_norm(h, *dual[:2], eps=self.eps))
            h = gated_residual(h, branch, gate)
            branch, gate = second, dual[2]
        h, normed = gated_residual_norm(h, branch, gate, shift, scale, eps=self.eps)
        return gated_residual_norm(h, self.mlp(normed), mlp_gate, *following, eps=self.eps)


class JointBlock(nn.Module):
    """Joint attention of image and context, then each stream's feed-forward.

    Args:
        config: the model's configuration.
        context_pre_only: the context's output is read by nobody (the last block of a model
            without single-stream blocks).
        dual: the image attends to itself alone as well.
    """

    def __init__(
        self, config: MMDiTConfig, *, context_pre_only: bool = False, dual: bool = False
    ) -> None:
        super().__init__()
        self.context_pre_only = context_pre_only
        self.image = Stream(config, dual=dual)
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
        rope: Rope | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes and returns both streams, each plain and normed for what comes next.

        The modulations are those of `Stream.finish`; where `context_pre_only`, the context's
        are empty and the context is returned as it came. `rope` is of the image's tokens, then
        the context's; `key_lengths` [B, 2] int32 are the valid tokens of each.
        """
        image, image_norms = self.image.project(x_normed)
        context, context_norms = self.context.project(c_normed)
        x_attended, c_attended = joint_attention(
            image,
            context,
            first_norm=image_norms,
            second_norm=context_norms,
            rope=rope,
            key_lengths=key_lengths,
            eps=self.image.eps,
        )
        x, x_normed = self.image.finish(x, x_attended, x_modulation, x_following)
        if not self.context_pre_only:
            c, c_normed = self.context.finish(c, c_attended, c_modulation, c_following)
        return x, x_normed, c, c_normed
