"""A dual-stream multimodal diffusion transformer (MM-DiT) that predicts a velocity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowkernels.nn.block import JointBlock, Modulation
from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.embeddings import (
    ClassTokens,
    PatchEmbedding,
    VectorEmbedding,
    timestep_embedding,
    unpatchify,
)
from flowkernels.ops import modulated_norm


class MMDiT(nn.Module):
    """Velocity network `v(x_t, t, conditions)` with image and context streams (SD3's design).

    The image is cut into patches; the context is text tokens, or tokens learned per class. Each
    block normalises, attends jointly and feeds forward, modulated by a vector made of time,
    class and pooled text (adaLN-zero: at initialisation every block is the identity and the
    velocity is zero). Conditions are keyword arguments of `forward`:

    - `labels` [B] int64, where `config.num_classes > 0`; `num_classes` means "no class", and so
      does leaving them out;
    - `text` [B, S, text_dim], where `config.text_dim` is set;
    - `pooled` [B, pooled_dim], where `config.pooled_dim` is set.

    Args:
        config: sizes and options.

    Example:
        >>> config = MMDiTConfig(image_size=8, in_channels=1, dim=32, depth=2, heads=2,
        ...                      num_classes=10)
        >>> model = MMDiT(config)
        >>> model(torch.randn(3, 1, 8, 8), torch.rand(3), labels=torch.tensor([1, 2, 10])).shape
        torch.Size([3, 1, 8, 8])

    Source: arXiv 2403.03206.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, last = config.dim, config.depth - 1
        self.patch_embedding = PatchEmbedding(config.patch_dim, config.patch_size, dim, config.grid)
        self.time_embedding = VectorEmbedding(config.frequency_dim, dim)
        self.class_embedding = (
            nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        )
        self.pooled_embedding = (
            VectorEmbedding(config.pooled_dim, dim) if config.pooled_dim else None
        )
        self.context_embedding: nn.Linear | ClassTokens = (
            nn.Linear(config.text_dim, dim)
            if config.text_dim
            else ClassTokens(config.num_classes + 1, config.class_tokens, dim)
        )
        self.blocks = nn.ModuleList(
            JointBlock(config, context_pre_only=index == last) for index in range(config.depth)
        )
        # One matrix per block makes both streams' modulation: 6 chunks for the image, then 6 for
        # the context (2 where it is only attended to). They stand outside the blocks because a
        # block's first norm is computed at the end of the block before.
        self.modulations = nn.ModuleList(
            nn.Linear(dim, (8 if index == last else 12) * dim) for index in range(config.depth)
        )
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, config.patch_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier matrices, small embeddings, zero modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for embedding in (self.time_embedding, self.pooled_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.fc1.weight, std=0.02)
                nn.init.normal_(embedding.fc2.weight, std=0.02)
        for linear in (*self.modulations, self.final_modulation, self.final):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """The velocity at `x` and time `t`.

        Args:
            x: [B, C, H, W] noisy images.
            t: [B] times, 0 data and 1 noise.
            labels: [B] int64 class ids.
            text: [B, S, text_dim] tokens.
            pooled: [B, pooled_dim] vector.

        Returns:
            [B, C, H, W] velocity in the weights' (or autocast's) dtype.

        Raises:
            ValueError: a shape that does not fit the configuration, or a condition that the
                model was not built for or lacks.
        """
        self._check(x, t, labels, text, pooled)
        if labels is None:
            labels = torch.full((len(x),), self.config.num_classes, device=x.device)
        vector = F.silu(self._vector(t, labels, pooled))
        h = self.patch_embedding(x)
        context = self._context(labels, text)
        h = self._blocks(h, context.to(h.dtype), vector)
        return unpatchify(
            self.final(h), self.config.in_channels, self.config.patch_size, self.config.grid
        )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in backward instead of storing it: less memory, slower."""
        self.config = dataclasses.replace(self.config, gradient_checkpointing=True)

    def null_conditions(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same conditions saying nothing: id "no class", zero text and zero pooled vector.

        Example:
            >>> model = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
            >>> model.null_conditions({"labels": torch.tensor([0, 2])})
            {'labels': tensor([3, 3])}
        """
        return {
            name: torch.full_like(value, self.config.num_classes)
            if name == "labels"
            else torch.zeros_like(value)
            for name, value in conditions.items()
        }

    def _vector(self, t: Tensor, labels: Tensor, pooled: Tensor | None) -> Tensor:
        vector: Tensor = self.time_embedding(timestep_embedding(t, self.config.frequency_dim))
        if self.class_embedding is not None:
            vector = vector + self.class_embedding(labels).to(vector.dtype)
        if self.pooled_embedding is not None:
            vector = vector + self.pooled_embedding(pooled)
        return vector

    def _context(self, labels: Tensor, text: Tensor | None) -> Tensor:
        embed = self.context_embedding
        if isinstance(embed, ClassTokens):
            tokens: Tensor = embed(labels)
        else:
            assert text is not None  # _check has seen to it
            tokens = embed(text.to(embed.weight.dtype))
        return tokens

    def _blocks(self, x: Tensor, c: Tensor, vector: Tensor) -> Tensor:
        """All blocks and the final norm: [B, S, D] image tokens, normed."""
        dim, eps = self.config.dim, self.config.eps
        # Views [B, D] of row stride 12 D: the operators read them in place.
        chunks: list[Modulation] = [linear(vector).split(dim, -1) for linear in self.modulations]
        final: Modulation = self.final_modulation(vector).split(dim, -1)
        x_normed = modulated_norm(x, *chunks[0][:2], eps=eps)
        c_normed = modulated_norm(c, *chunks[0][6:8], eps=eps)
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            following = chunks[index + 1] if index + 1 < len(chunks) else final
            arguments = (
                *(x, x_normed, c, c_normed),
                *(chunks[index][2:6], chunks[index][8:]),
                *(following[:2], following[6:8]),
            )
            x, x_normed, c, c_normed = (
                checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else block(*arguments)
            )
        return x_normed

    def _check(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        text: Tensor | None,
        pooled: Tensor | None,
    ) -> None:
        config = self.config
        B = x.shape[0] if x.dim() else 0
        _expect("x", x, (B, config.in_channels, *config.image_shape))
        _expect("t", t, (B,))
        if labels is not None:
            if not config.num_classes:
                raise ValueError("labels given to a model with num_classes=0")
            _expect("labels", labels, (B,))
            if labels.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"labels has dtype {labels.dtype}; it needs int64 class ids")
        for name, value, width, rank in (
            ("text", text, config.text_dim, 3),
            ("pooled", pooled, config.pooled_dim, 2),
        ):
            if (value is None) != (width is None):
                state = "missing: this model needs" if value is None else "given: this model has no"
                raise ValueError(f"{name} is {state} {name}_dim={width}")
            if value is not None:
                tokens = value.shape[1:2] if rank == 3 else ()
                _expect(name, value, (B, *tokens, width))


def _expect(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it needs {shape}")
