"""AdaLN blocks whose attention stays diffusers' own: DiT, PixArt, Sana, Qwen-Image, FLUX.2.

Their norms, gates and feed-forwards are the chain of ``sd3.py``; the attention module is called as
it is, so masks, processors, caches and backends are whatever the model has. Also the modulated
norm at the end of nearly every transformer, AdaLayerNormContinuous.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Modulation,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from flowkernels.integrations._chain import (
    FEED_FORWARD_SOURCES,
    feed_forward,
    fusable,
    gated,
    gated_then_modulated,
    modulated,
)
from flowkernels.integrations._checks import plain, refusal
from flowkernels.integrations._state import OPS, Chain, State

Tensor = torch.Tensor


def norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Stands in for ``AdaLayerNormContinuous.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, x, conditioning_embedding, temb=conditioning_embedding)
    why = why or _continuous_structure(self)
    if why is not None:
        state.note(why)
        return type(self).forward(self, x, conditioning_embedding)
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated(state, self.norm, x, shift, scale)


def _continuous_structure(norm: Any) -> str | None:
    return _layer_norms_refusal(norm=norm.norm)


def basic_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Stands in for ``BasicTransformerBlock.forward`` where it is DiT's or PixArt's."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states) or _basic_structure(self)
    if why is None and cross_attention_kwargs:
        why = "cross_attention_kwargs: " + ", ".join(cross_attention_kwargs)
    if why is not None:
        state.note(why)
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    x = hidden_states
    if self.norm_type == "ada_norm_zero":
        emb = temb_of(self.norm1, x, timestep, class_labels)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
        norm1, last_norm = self.norm1.norm, self.norm3
    else:
        assert timestep is not None
        table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        norm1, last_norm = self.norm1, self.norm2
    out = self.attn1(
        modulated(state, norm1, x, shift, scale),
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
    )
    if self.attn2 is None:
        x, x_norm = gated_then_modulated(state, x, out, gate, last_norm, shift_mlp, scale_mlp)
    else:
        x = gated(state, x, out, gate)
        query = x if self.norm_type == "ada_norm_single" else self.norm2(x)
        x = x + self.attn2(
            query,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
        )
        x_norm = modulated(state, last_norm, x, shift_mlp, scale_mlp)
    return gated(state, x, feed_forward(state, self.ff, x_norm), gate_mlp)


def temb_of(norm: Any, x: Tensor, timestep: Tensor | None, class_labels: Tensor | None) -> Tensor:
    return norm.linear(norm.silu(norm.emb(timestep, class_labels, hidden_dtype=x.dtype)))


def _basic_structure(block: Any) -> str | None:
    """Why the block as it now stands must take diffusers' forward, or None."""
    if block.norm_type not in ("ada_norm_zero", "ada_norm_single"):
        return f"not served: norm_type {block.norm_type!r} has no gates"
    if block.pos_embed is not None:
        return "not served: positional embeddings inside the block"
    if hasattr(block, "fuser"):
        return "not served: gated self-attention (GLIGEN)"
    if block._chunk_size is not None:
        return "feed-forward chunking"
    if block.norm_type == "ada_norm_single":
        return _layer_norms_refusal(norm1=block.norm1, norm2=block.norm2)
    if not plain(block.norm1, AdaLayerNormZero) or block.norm1.emb is None:
        return "norm1 is not diffusers' own module, or has a hook"
    return _layer_norms_refusal(norm1=block.norm1.norm, norm3=block.norm3)


def _basic_ops(block: Any) -> tuple[str, ...]:
    left_out = {"joint_attention", "qk_norm_rope"}
    if block.attn2 is not None:
        left_out.add("gated_residual_norm")
    if not fusable(block.ff):
        left_out.add("gelu_tanh")
    return tuple(op for op in OPS if op not in left_out)


def sana_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Stands in for ``SanaTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, timestep) or _sana_structure(self)
    if why is None and self.scale_shift_table.dtype != hidden_states.dtype:
        why = "scale_shift_table and hidden_states differ in dtype"
    if why is not None:
        state.note(why)
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, height, width,
        )  # fmt: skip
    x = hidden_states
    assert timestep is not None
    table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
    x = gated(state, x, self.attn1(modulated(state, self.norm1, x, shift, scale)), gate)
    if self.attn2 is not None:
        x = x + self.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
    x_norm = modulated(state, self.norm2, x, shift_mlp, scale_mlp)
    # The convolutional feed-forward works on pictures; its output is read back as tokens.
    picture = self.ff(x_norm.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    tokens = picture.flatten(2, 3).permute(0, 2, 1)
    return gated(state, x, tokens if state.exact else tokens.contiguous(), gate_mlp)


def _sana_structure(block: Any) -> str | None:
    return _layer_norms_refusal(norm1=block.norm1, norm2=block.norm2)


def qwen_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> tuple[Tensor, Tensor]:
    """Stands in for ``QwenImageTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, encoder_hidden_states, temb, temb=temb)
    why = why or _qwen_structure(self)
    if why is None and modulate_index is not None:
        why = "modulation chosen per token"
    if why is not None:
        state.note(why)
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
            image_rotary_emb, joint_attention_kwargs, modulate_index,
        )  # fmt: skip
    image, text = hidden_states, encoder_hidden_states
    shift, scale, *image_modulation = self.img_mod(temb).chunk(6, dim=-1)
    image_norm = modulated(state, self.img_norm1, image, shift, scale)
    shift, scale, *text_modulation = self.txt_mod(temb).chunk(6, dim=-1)
    text_norm = modulated(state, self.txt_norm1, text, shift, scale)
    image_out, text_out = self.attn(
        hidden_states=image_norm,
        encoder_hidden_states=text_norm,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image = _rest(state, image, image_out, image_modulation, self.img_norm2, self.img_mlp)
    text = _rest(state, text, text_out, text_modulation, self.txt_norm2, self.txt_mlp)
    return _within_half(text), _within_half(image)


def _qwen_structure(block: Any) -> str | None:
    if block.zero_cond_t:
        return "not served: modulation chosen per token (zero_cond_t)"
    return _layer_norms_refusal(
        img_norm1=block.img_norm1,
        img_norm2=block.img_norm2,
        txt_norm1=block.txt_norm1,
        txt_norm2=block.txt_norm2,
    )


def flux2_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Stands in for ``Flux2TransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt)
    why = why or _flux2_structure(self)
    if why is not None:
        state.note(why)
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt,
            image_rotary_emb, joint_attention_kwargs,
        )  # fmt: skip
    image, text = hidden_states, encoder_hidden_states
    (shift, scale, gate), image_mlp = Flux2Modulation.split(temb_mod_img, 2)
    image_norm = modulated(state, self.norm1, image, shift, scale)
    image_modulation = [gate, *image_mlp]
    (shift, scale, gate), text_mlp = Flux2Modulation.split(temb_mod_txt, 2)
    text_norm = modulated(state, self.norm1_context, text, shift, scale)
    text_modulation = [gate, *text_mlp]
    image_out, text_out = self.attn(
        hidden_states=image_norm,
        encoder_hidden_states=text_norm,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image = _rest(state, image, image_out, image_modulation, self.norm2, self.ff)
    text = _rest(state, text, text_out, text_modulation, self.norm2_context, self.ff_context)
    return _within_half(text), image


def _flux2_structure(block: Any) -> str | None:
    return _layer_norms_refusal(
        norm1=block.norm1,
        norm2=block.norm2,
        norm1_context=block.norm1_context,
        norm2_context=block.norm2_context,
    )


def flux2_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """Stands in for ``Flux2SingleTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, encoder_hidden_states, temb_mod)
    why = why or _flux2_single_structure(self)
    if why is not None:
        state.note(why)
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb,
            joint_attention_kwargs, split_hidden_states, text_seq_len,
        )  # fmt: skip
    x = hidden_states
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    shift, scale, gate = Flux2Modulation.split(temb_mod, 1)[0]
    out = self.attn(
        hidden_states=modulated(state, self.norm, x, shift, scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = _within_half(gated(state, x, out, gate))
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


def _flux2_single_structure(block: Any) -> str | None:
    return _layer_norms_refusal(norm=block.norm)


def _rest(
    state: State, x: Tensor, out: Tensor, modulation: list[Tensor], norm: Any, ff: Any
) -> Tensor:
    """What follows the attention in one stream; modulation: gate, then the feed-forward's."""
    gate, shift_mlp, scale_mlp, gate_mlp = modulation
    x, x_norm = gated_then_modulated(state, x, out, gate, norm, shift_mlp, scale_mlp)
    return gated(state, x, feed_forward(state, ff, x_norm), gate_mlp)


def _within_half(x: Tensor) -> Tensor:
    """diffusers' guard against infinities in float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _layer_norms_refusal(**norms: Any) -> str | None:
    for name, norm in norms.items():
        if not plain(norm, nn.LayerNorm):
            return f"{name} is not nn.LayerNorm, or has a hook"
    return None


def _ops(*names: str) -> Any:
    return lambda block: names


_NORM_AND_GATE = ("modulated_norm", "gated_residual")
_ALL_BUT_ATTENTION = (*_NORM_AND_GATE, "gated_residual_norm")

CHAINS = {
    AdaLayerNormContinuous: Chain(
        norm_continuous,
        _continuous_structure,
        _ops("modulated_norm"),
        (AdaLayerNormContinuous.forward,),
    ),
    BasicTransformerBlock: Chain(
        basic_block,
        _basic_structure,
        _basic_ops,
        (BasicTransformerBlock.forward, AdaLayerNormZero.forward, *FEED_FORWARD_SOURCES),
    ),
    SanaTransformerBlock: Chain(
        sana_block, _sana_structure, _ops(*_NORM_AND_GATE), (SanaTransformerBlock.forward,)
    ),
    QwenImageTransformerBlock: Chain(
        qwen_block,
        _qwen_structure,
        _ops(*_ALL_BUT_ATTENTION, "gelu_tanh"),
        (
            QwenImageTransformerBlock.forward,
            QwenImageTransformerBlock._modulate,
            *FEED_FORWARD_SOURCES,
        ),
    ),
    Flux2TransformerBlock: Chain(
        flux2_block,
        _flux2_structure,
        _ops(*_ALL_BUT_ATTENTION),
        (Flux2TransformerBlock.forward, Flux2Modulation.split),
    ),
    Flux2SingleTransformerBlock: Chain(
        flux2_single_block,
        _flux2_single_structure,
        _ops(*_NORM_AND_GATE),
        (Flux2SingleTransformerBlock.forward, Flux2Modulation.split),
    ),
}
