"""A multimodal diffusion transformer (MM-DiT) that predicts a velocity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flowkernels.nn import diffusers_weights
from flowkernels.nn.block import JointBlock, Modulation
from flowkernels.nn.conditions import check_conditions, check_layers, key_lengths
from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.embeddings import (
    ClassTable,
    ClassTokens,
    PatchEmbedding,
    VectorEmbedding,
    timestep_embedding,
    unpatchify,
)
from flowkernels.nn.positions import Rope, rotary_positions_2d
from flowkernels.nn.single_block import SingleBlock
from flowkernels.ops import modulated_norm


class MMDiT(nn.Module):
    """Velocity network `v(x_t, t, conditions)` with image and context streams: SD3, SD3.5, FLUX.

    The image is cut into patches; the context is text tokens, or tokens learned per class. Each
    joint block normalises, attends jointly and feeds forward, modulated by a vector made of time,
    class, guidance scale and pooled text (adaLN-zero: at initialisation every block is the
    identity and the velocity is zero); single-stream blocks, where there are any, go on with both
    streams as one. Conditions are keyword arguments of `forward`:

    - `labels` [B] int64, where `config.num_classes > 0`; `num_classes` means "no class", and so
      does leaving them out;
    - `text` [B, S, text_dim], where `config.text_dim` is set;
    - `text_lengths` [B] int, with `text`, if some of its tokens are padding: the first
      `text_lengths[b]` count, nothing attends to the others;
    - `pooled` [B, pooled_dim], where `config.pooled_dim` is set;
    - `guidance` [B], the guidance scale that a distilled model is to follow, where
      `config.guidance_embed` is set.

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
        # Without single-stream blocks nobody reads the context that the last block would make.
        pre_only = [index == last and not config.single_depth for index in range(config.depth)]
        dual = [index in config.dual_attention for index in range(config.depth)]
        self.patch_embedding = PatchEmbedding(config)
        self.time_embedding = VectorEmbedding(config.frequency_dim, dim)
        self.class_embedding = (
            ClassTable(config.num_classes + 1, dim) if config.num_classes else None
        )
        self.pooled_embedding = (
            VectorEmbedding(config.pooled_dim, dim) if config.pooled_dim else None
        )
        self.guidance_embedding = (
            VectorEmbedding(config.frequency_dim, dim) if config.guidance_embed else None
        )
        self.context_embedding: nn.Linear | ClassTokens = (
            nn.Linear(config.text_dim, dim)
            if config.text_dim
            else ClassTokens(config.num_classes + 1, config.class_tokens, dim)
        )
        self.blocks = nn.ModuleList(
            JointBlock(config, context_pre_only=pre_only[index], dual=dual[index])
            for index in range(config.depth)
        )
        # One matrix per block makes both streams' modulation: 6 chunks for the image and 3 for
        # its dual attention, then 6 for the context (2 where it is only attended to). They stand
        # outside the blocks because a block's first norm is computed at the end of the block
        # before.
        self.modulations = nn.ModuleList(
            nn.Linear(dim, (6 + 3 * dual[index] + (2 if pre_only[index] else 6)) * dim)
            for index in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.single_modulations = nn.ModuleList(
            nn.Linear(dim, 3 * dim) for _ in range(config.single_depth)
        )
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, config.patch_dim)
        self.reset_parameters()

    @classmethod
    def from_diffusers(cls, model: nn.Module) -> MMDiT:
        """The same network as a diffusers SD3Transformer2DModel or FluxTransformer2DModel.

        Weights are copied to the bit, with their dtype and device; `to_diffusers` gives them all
        back. In float32 the output differs from diffusers' by rounding alone. With

            velocity = MMDiT.from_diffusers(model)(x, t, text=text, pooled=pooled)

        and t in [0, 1], diffusers' forward for the same inputs is:

        - SD3, SD3.5: `model(x, encoder_hidden_states=text, pooled_projections=pooled,
          timestep=1000 * t)`;
        - FLUX: `model(tokens, encoder_hidden_states=text, pooled_projections=pooled, timestep=t,
          guidance=guidance, img_ids=..., txt_ids=...)`, where the tokens are the 2 by 2 packing
          of x [B, C, H, W] that its pipeline makes outside the model (here the model packs and
          unpacks: `patch_size` is 2), `img_ids` are (0, row, column), `txt_ids` are zero, and
          `guidance` is the same number in both, 3.5 say. FLUX takes any size; the configuration
          names 128 by 128, the latents of 1024 pixels.

        Attention processors, hooks and adapters are not weights and do not come along; those
        with weights (LoRA, IP-Adapter) are an error, as is a configuration that this class has no
        blocks for. diffusers clips FLUX's float16 activations at 65504; here they are not.

        Args:
            model: the diffusers model.

        Returns:
            A model that shares no memory with it, in the same mode (train or eval).

        Raises:
            ImportError: diffusers is not installed.
            TypeError: `model` is neither of the two classes.
            ValueError: a configuration entry or a weight that this class cannot hold, by name.
        """
        config, state = diffusers_weights.read(model)
        with torch.device("meta"):
            built = cls(config)
        built.load_state_dict(state, assign=True)
        return built.train(model.training)

    def to_diffusers(self) -> Any:
        """The same network as a diffusers model, the inverse of `from_diffusers`.

        An SD3Transformer2DModel where positions are a table that is cropped, a
        FluxTransformer2DModel where they are rotations. A model that was not made by
        `from_diffusers` has no queries in its last context, whose result diffusers drops: zeros
        stand for them. A "learned" table becomes diffusers' stored one.

        Returns:
            The diffusers model, which shares no memory with this one, in the same mode.

        Raises:
            ImportError: diffusers is not installed.
            ValueError: an option that diffusers' class does not have, by name.
        """
        return diffusers_weights.write(self.config, self.state_dict()).train(self.training)

    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier matrices, small embeddings, zero modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for embedding in (self.time_embedding, self.pooled_embedding, self.guidance_embedding):
            if embedding is not None:
                nn.init.normal_(embedding.fc1.weight, std=0.02)
                nn.init.normal_(embedding.fc2.weight, std=0.02)
        modulations = (*self.modulations, *self.single_modulations, self.final_modulation)
        for linear in (*modulations, self.final):
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
        guidance: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> Tensor:
        """The velocity at `x` and time `t`.

        Args:
            x: [B, C, H, W] noisy images.
            t: [B] times, 0 data and 1 noise.
            labels: [B] int64 class ids.
            text: [B, S, text_dim] tokens.
            pooled: [B, pooled_dim] vector.
            guidance: [B] guidance scales.
            text_lengths: [B] int, valid tokens of `text`; all where left out.

        Returns:
            [B, C, H, W] velocity in the weights' (or autocast's) dtype.

        Raises:
            ValueError: a shape that does not fit the configuration, or a condition that the
                model was not built for or lacks.
        """
        inputs = self._inputs(x, t, labels, text, pooled, guidance, text_lengths)
        h = self.final(self._blocks(*inputs))
        return unpatchify(h, self.config.in_channels, self.config.patch_size, inputs.grid)

    def features(
        self, x: Tensor, t: Tensor, layers: Sequence[int], **conditions: Tensor
    ) -> tuple[Tensor, ...]:
        """The image tokens after chosen blocks, exactly as in `forward`; no later block runs.

        Args:
            x, t: those of `forward`.
            layers: indices of blocks, the joint ones first, then the single-stream ones.
            **conditions: those of `forward`.

        Returns:
            One [B, S, D] tensor per index, in the order of `layers`: the residual stream.

        Raises:
            ValueError: an index that no block has, or what `forward` raises.

        Example:
            >>> model = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=2, heads=1, num_classes=3))
            >>> model.features(torch.randn(2, 4, 4, 4), torch.rand(2), (0, 1))[1].shape
            torch.Size([2, 4, 8])
        """
        check_layers(layers, len(self.blocks) + len(self.single_blocks))
        states: list[Tensor] = []
        self._blocks(*self._inputs(x, t, **conditions), states, max(layers) + 1)
        return tuple(states[index] for index in layers)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in backward instead of storing it: less memory, slower."""
        self.config = dataclasses.replace(self.config, gradient_checkpointing=True)

    def null_conditions(self, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same conditions saying nothing: id "no class", zero text and zero pooled vector.

        Lengths and the guidance scale say nothing about content, and stay.

        Example:
            >>> model = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
            >>> model.null_conditions({"labels": torch.tensor([0, 2])})
            {'labels': tensor([3, 3])}
        """
        nothing = {}
        for name, value in conditions.items():
            if name == "labels":
                nothing[name] = torch.full_like(value, self.config.num_classes)
            elif name in ("guidance", "text_lengths"):
                nothing[name] = value
            else:
                nothing[name] = torch.zeros_like(value)
        return nothing

    def _inputs(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> _Inputs:
        """What the blocks start from, of checked conditions."""
        check_conditions(self.config, x, t, labels, text, pooled, guidance, text_lengths)
        if labels is None:
            labels = torch.full((len(x),), self.config.num_classes, device=x.device)
        vector = F.silu(self._vector(t, labels, pooled, guidance))
        h = self.patch_embedding(x)
        context = self._context(labels, text).to(h.dtype)
        grid = (x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size)
        return _Inputs(h, context, vector, grid, text_lengths)

    def _vector(
        self, t: Tensor, labels: Tensor, pooled: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        vector: Tensor = self.time_embedding(timestep_embedding(t, self.config.frequency_dim))
        if self.class_embedding is not None:
            vector = vector + self.class_embedding(labels).to(vector.dtype)
        if self.guidance_embedding is not None:
            assert guidance is not None  # check_conditions has seen to it
            # A guidance scale goes through the same sinusoids as a time, times a thousand too.
            vector = vector + self.guidance_embedding(
                timestep_embedding(guidance, self.config.frequency_dim)
            )
        if self.pooled_embedding is not None:
            vector = vector + self.pooled_embedding(pooled)
        return vector

    def _context(self, labels: Tensor, text: Tensor | None) -> Tensor:
        embed = self.context_embedding
        if isinstance(embed, ClassTokens):
            tokens: Tensor = embed(labels)
        else:
            assert text is not None  # check_conditions has seen to it
            tokens = embed(text.to(embed.weight.dtype))
        return tokens

    def _blocks(
        self,
        x: Tensor,
        c: Tensor,
        vector: Tensor,
        grid: tuple[int, int],
        text_lengths: Tensor | None,
        states: list[Tensor] | None = None,
        stop: int = 0,
    ) -> Tensor:
        """All blocks and the final norm: [B, S, D] image tokens, normed.

        `states` collects the image tokens after each of the first `stop` blocks; no other runs.
        """
        joint, single, final = self._modulation(vector)
        rope = self._rope(grid, c)
        lengths = key_lengths(x, c, text_lengths)
        after = _Chunks(single[0], single[0]) if single else _Chunks(final, ())
        x_normed = modulated_norm(x, *joint[0].image[:2], eps=self.config.eps)
        c_normed = modulated_norm(c, *joint[0].context[:2], eps=self.config.eps)
        for block, now, following in zip(self.blocks, joint, [*joint[1:], after], strict=True):
            x, x_normed, c, c_normed = self._run(
                block,
                *(x, x_normed, c, c_normed),
                *(now.image[2:], now.context[2:]),
                *(following.image[:2], following.context[:2]),
                *(rope, lengths),
            )
            if states is not None:
                states.append(x)
                if len(states) == stop:
                    return x_normed
        if not single:
            return x_normed
        rows = x.shape[1]
        # The image first: its rows are then the front of each sample, and the text's padding
        # the end, so that one length masks it.
        h, normed = torch.cat([x, c], dim=1), torch.cat([x_normed, c_normed], dim=1)
        if lengths is not None:
            lengths = lengths.sum(dim=1, keepdim=True, dtype=torch.int32)
        next_chunks = [*single[1:], final]
        for block, chunks, next_ in zip(self.single_blocks, single, next_chunks, strict=True):
            h, normed = self._run(block, h, normed, chunks[2], next_[:2], rope, lengths)
            if states is not None:
                states.append(h[:, :rows])
                if len(states) == stop:
                    break
        return normed[:, :rows]

    def _modulation(self, vector: Tensor) -> tuple[list[_Chunks], list[Modulation], Modulation]:
        """All blocks' chunks, views [B, D] of each block's matrix: operators read them in place."""
        dim, joint = self.config.dim, []
        for index, linear in enumerate(self.modulations):
            chunks = linear(vector).split(dim, -1)
            count = 9 if index in self.config.dual_attention else 6
            joint.append(_Chunks(chunks[:count], chunks[count:]))
        single = [linear(vector).split(dim, -1) for linear in self.single_modulations]
        return joint, single, self.final_modulation(vector).split(dim, -1)

    def _rope(self, grid: tuple[int, int], context: Tensor) -> Rope | None:
        config = self.config
        if config.positions != "rope":
            return None
        return rotary_positions_2d(
            config.rope_axes,
            *grid,
            context=context.shape[1],
            theta=config.rope_theta,
            device=context.device,
        )

    def _run(self, block: nn.Module, *arguments: Any) -> Any:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)


class _Inputs(NamedTuple):
    """Image and context tokens, modulation vector [B, D], grid, and valid text tokens."""

    x: Tensor
    c: Tensor
    vector: Tensor
    grid: tuple[int, int]
    text_lengths: Tensor | None


class _Chunks(NamedTuple):
    """A joint block's modulation: (shift, scale, gate) of attention, then of the feed-forward,
    then of the dual attention; or (shift, scale) alone."""

    image: Modulation
    context: Modulation
