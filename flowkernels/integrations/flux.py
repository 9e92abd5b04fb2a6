"""FLUX.1: the forwards of diffusers' double and single blocks as chains of fused operators.

The double block is SD3's chain (see ``sd3.py``) with RoPE and the text in front; the single block

    x' = norm([c, i])·(1+scale)+shift                                      modulated_norm
    q, k, v, m of x';   a = attention, m = gelu(m)                   joint_attention, gelu_tanh
    [c, i] + gate·out([a, m])                                              gated_residual
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    _get_fused_projections,
    _get_projections,
)
from torch import nn

from flowkernels.integrations._attention import (
    NORM_AND_ROPE_SOURCES,
    Rope,
    Stream,
    attend,
    backend_of,
)
from flowkernels.integrations._chain import (
    FEED_FORWARD_SOURCES,
    feed_forward,
    gated,
    gated_then_modulated,
    linear_then_gelu,
    modulated,
)
from flowkernels.integrations._checks import plain, refusal, sharded
from flowkernels.integrations._state import OPS, Chain, State

Tensor = torch.Tensor

_WHOLE = "_flowkernels_whole"


def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Stands in for ``FluxTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, encoder_hidden_states, temb, temb=temb)
    why = (
        why
        or _double_structure(self)
        or _call_refusal(hidden_states, image_rotary_emb, joint_attention_kwargs)
    )
    if why is not None:
        state.note(why)
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    image, text = hidden_states, encoder_hidden_states
    shift, scale, *image_modulation = _modulation(self.norm1, temb, 6)
    image_norm = modulated(state, self.norm1.norm, image, shift, scale)
    shift, scale, *text_modulation = _modulation(self.norm1_context, temb, 6)
    text_norm = modulated(state, self.norm1_context.norm, text, shift, scale)

    attn = self.attn
    backend = backend_of(attn.processor, image.device, sdpa=False)
    streams = (_text_stream(attn, text_norm), _stream(attn, image_norm))
    text_out, image_out = attend(state, streams, image_rotary_emb, backend)
    # Contiguous: a layer adds its bias to a strided input in a pass, and a rounding, of its own.
    image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
    text_out = attn.to_add_out(text_out.contiguous())

    gate, shift_mlp, scale_mlp, gate_mlp = image_modulation
    image, image_norm = gated_then_modulated(
        state, image, image_out, gate, self.norm2, shift_mlp, scale_mlp
    )
    image = gated(state, image, feed_forward(state, self.ff, image_norm), gate_mlp)
    gate, shift_mlp, scale_mlp, gate_mlp = text_modulation
    text, text_norm = gated_then_modulated(
        state, text, text_out, gate, self.norm2_context, shift_mlp, scale_mlp
    )
    text = gated(state, text, feed_forward(state, self.ff_context, text_norm), gate_mlp)
    return _within_half(text), image


def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Stands in for ``FluxSingleTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, encoder_hidden_states, temb, temb=temb)
    why = (
        why
        or _single_structure(self)
        or _call_refusal(hidden_states, image_rotary_emb, joint_attention_kwargs)
    )
    if why is not None:
        state.note(why)
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    x = _joined(encoder_hidden_states, hidden_states)
    shift, scale, gate = _modulation(self.norm, temb, 3)
    x_norm = modulated(state, self.norm.norm, x, shift, scale)
    mlp = linear_then_gelu(state, self.proj_mlp, self.act_mlp, x_norm)
    backend = backend_of(self.attn.processor, x.device, sdpa=False)
    (out,) = attend(state, (_stream(self.attn, x_norm),), image_rotary_emb, backend)
    x = gated(state, x, self.proj_out(torch.cat([out, mlp], dim=2)), gate)
    return _parted(_within_half(x), encoder_hidden_states.shape[1])


def _modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


def _within_half(x: Tensor) -> Tensor:
    """diffusers' guard against infinities in float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _joined(text: Tensor, image: Tensor) -> Tensor:
    """Both streams in one tensor: the one that the block before took them from, if untouched.

    A tensor that was replaced on the way (a ControlNet's residual, another device) is another
    object. Where someone waits for the gradient of a stream, it must be on its path.
    """
    if torch.compiler.is_compiling():
        return torch.cat([text, image], dim=1)
    whole, tokens = getattr(text, _WHOLE, None), text.shape[1]
    shared = getattr(image, _WHOLE, None) is whole
    awaited = any(x.retains_grad or x._backward_hooks for x in (text, image))
    if (
        not isinstance(whole, Tensor)
        or not shared
        or whole.shape[1] != tokens + image.shape[1]
        or awaited
    ):
        return torch.cat([text, image], dim=1)
    return whole


def _parted(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The streams as views, which remember what they are views of."""
    text, image = x[:, :tokens], x[:, tokens:]
    if not torch.compiler.is_compiling():
        setattr(text, _WHOLE, x)
        setattr(image, _WHOLE, x)
    return text, image


def _heads(x: Tensor, attn: Any) -> Tensor:
    return x.unflatten(-1, (-1, attn.head_dim))


def _stream(attn: Any, x: Tensor) -> Stream:
    if attn.fused_projections:
        q, k, v = (_heads(part, attn) for part in attn.to_qkv(x).chunk(3, dim=-1))
    else:
        q, k, v = (_heads(layer(x), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
    return Stream(q, k, v, attn.norm_q, attn.norm_k)


def _text_stream(attn: Any, x: Tensor) -> Stream:
    if attn.fused_projections:
        q, k, v = (_heads(part, attn) for part in attn.to_added_qkv(x).chunk(3, dim=-1))
    else:
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = (_heads(layer(x), attn) for layer in layers)
    return Stream(q, k, v, attn.norm_added_q, attn.norm_added_k)


def _double_structure(block: Any) -> str | None:
    """Why the block as it now stands must take diffusers' forward, or None."""
    return (
        _attention_refusal(block.attn)
        or _norm_refusal(block.norm1, "norm1", AdaLayerNormZero)
        or _norm_refusal(block.norm1_context, "norm1_context", AdaLayerNormZero)
        or _layer_norm_refusal(block.norm2, "norm2")
        or _layer_norm_refusal(block.norm2_context, "norm2_context")
    )


def _single_structure(block: Any) -> str | None:
    return _attention_refusal(block.attn) or _norm_refusal(
        block.norm, "norm", AdaLayerNormZeroSingle
    )


def _attention_refusal(attn: Any) -> str | None:
    if type(attn.processor) is not FluxAttnProcessor:
        return f"attn: attention processor {type(attn.processor).__name__}"
    if attn.processor._parallel_config is not None:
        return "context parallel"
    if sharded(attn.to_q):
        return "tensor parallel"
    if not plain(attn, FluxAttention):
        return "attn is not diffusers' own module, or has a hook"
    return None


def _call_refusal(x: Tensor, rope: Rope | None, kwargs: dict[str, Any] | None) -> str | None:
    if kwargs:
        return "joint_attention_kwargs: " + ", ".join(kwargs)
    if rope is None:
        return None
    fits = (
        isinstance(rope, (tuple, list))
        and len(rope) == 2
        and all(y.dim() == 2 and y.dtype == torch.float32 and y.device == x.device for y in rope)
        and rope[0].shape == rope[1].shape
    )
    return None if fits else "image_rotary_emb is not (cos, sin), each [S, E] float32"


def _norm_refusal(norm: Any, name: str, kind: type) -> str | None:
    if not plain(norm, kind):
        return f"{name} is not diffusers' own module, or has a hook"
    if getattr(norm, "emb", None) is not None:
        return f"{name} has an embedding of its own"
    return _layer_norm_refusal(norm.norm, f"{name}.norm")


def _layer_norm_refusal(norm: Any, name: str) -> str | None:
    return None if plain(norm, nn.LayerNorm) else f"{name} is not nn.LayerNorm, or has a hook"


def _single_ops(block: Any) -> tuple[str, ...]:
    return tuple(op for op in OPS if op != "gated_residual_norm")


_SHARED_SOURCES = (
    FluxAttnProcessor.__call__,
    FluxAttention.forward,
    _get_projections,
    _get_fused_projections,
    *NORM_AND_ROPE_SOURCES,
)

CHAINS = {
    FluxTransformerBlock: Chain(
        double_block,
        _double_structure,
        lambda block: OPS,
        (
            FluxTransformerBlock.forward,
            AdaLayerNormZero.forward,
            *_SHARED_SOURCES,
            *FEED_FORWARD_SOURCES,
        ),
        exact_layout=True,
    ),
    FluxSingleTransformerBlock: Chain(
        single_block,
        _single_structure,
        _single_ops,
        (FluxSingleTransformerBlock.forward, AdaLayerNormZeroSingle.forward, *_SHARED_SOURCES),
    ),
}
