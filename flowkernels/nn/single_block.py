"""One single-stream block: attention and feed-forward side by side, on image and context joined.

    h ← h + gate · out([attention(n), gelu(fc1(n))]),   n = norm(h)·(1+scale)+shift

As in the joint blocks, the norm is computed with the residual addition before it: the block takes
its input normed and returns its output normed for the next.

Source: FLUX.1's design; parallel attention and feed-forward as in arXiv 2302.05442.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowkernels.nn.block import Modulation, activated
from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.positions import Rope
from flowkernels.nn.projection import QKVProjection
from flowkernels.ops import gated_residual_norm, joint_attention


class SingleBlock(QKVProjection):
    """Attention of all tokens among themselves beside their feed-forward.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.fc1 = nn.Linear(config.dim, config.hidden_dim)
        self.out = nn.Linear(config.dim + config.hidden_dim, config.dim)

    def forward(
        self,
        h: Tensor,
        normed: Tensor,
        gate: Tensor,
        following: Modulation,
        rope: Rope | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens, plain and normed by `following`.

        Args:
            h: [B, S, D] image tokens, then context tokens.
            normed: [B, S, D] the same, normed and modulated for this block.
            gate: [B, D].
            following: (shift, scale) of the norm after this block.
            rope: of the tokens, or None.
            key_lengths: [B, 1] int32, the valid tokens; padding of the context comes last.
        """
        heads, norms = self.project(normed)
        attended = joint_attention(
            heads, first_norm=norms, rope=rope, key_lengths=key_lengths, eps=self.eps
        )
        branch = self.out(torch.cat([attended, activated(self.fc1, normed)], dim=-1))
        return gated_residual_norm(h, branch, gate, *following, eps=self.eps)
