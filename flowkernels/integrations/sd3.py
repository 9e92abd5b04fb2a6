"""Stable Diffusion 3 and 3.5: the forwards of diffusers' joint blocks as chains of fused operators.

One block, each line an operator or a layer (i: image tokens, c: text tokens):

    i' = norm(i)·(1+scale)+shift          c' likewise                      modulated_norm
    q, k, v of i' and c'                                                   the block's own layers
    a_i, a_c = attention of both                                           joint_attention
    i, i' = i + gate·out(a_i), its modulated norm                          gated_residual_norm
    i = i + gate·ff(i')                                                    gelu_tanh, gated_residual

SD3.5's dual attention has a second norm of the same i and an attention of the image alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
from torch import nn

from flowkernels.integrations._attention import (
    NORM_AND_ROPE_SOURCES,
    Stream,
    attend,
    backend_of,
    core_for,
)
from flowkernels.integrations._chain import (
    FEED_FORWARD_SOURCES,
    feed_forward,
    gated,
    gated_then_modulated,
    modulated,
)
from flowkernels.integrations._checks import hooked, plain, refusal, sharded
from flowkernels.integrations._state import OPS, Chain, State

Tensor = torch.Tensor

_PROCESSORS = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)


def joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Stands in for ``JointTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, encoder_hidden_states, temb, temb=temb)
    why = why or _joint_structure(self)
    if why is None and joint_attention_kwargs:
        why = "joint_attention_kwargs: " + ", ".join(joint_attention_kwargs)
    if why is not None:
        state.note(why)
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
        )
    image, text = hidden_states, encoder_hidden_states
    modulation = _modulation(self.norm1, temb, 9 if self.use_dual_attention else 6)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[:6]
    image_norm = modulated(state, self.norm1.norm, image, shift, scale)
    if self.context_pre_only:
        text_norm, text_modulation = _last_text_norm(self, state, text, temb), None
    else:
        text_modulation = _modulation(self.norm1_context, temb, 6)
        text_norm = modulated(state, self.norm1_context.norm, text, *text_modulation[:2])

    image_out, text_out = _joint(self, state, image_norm, text_norm)
    if self.use_dual_attention:
        shift2, scale2, gate2 = modulation[6:]
        image_norm2 = modulated(state, self.norm1.norm, image, shift2, scale2)
        image = gated(state, image, image_out, gate)
        image_out, gate = _alone(self.attn2, state, image_norm2), gate2
    image, image_norm = gated_then_modulated(
        state, image, image_out, gate, self.norm2, shift_mlp, scale_mlp
    )
    image = gated(state, image, feed_forward(state, self.ff, image_norm), gate_mlp)
    if text_modulation is None:
        return None, image
    _, _, gate, shift_mlp, scale_mlp, gate_mlp = text_modulation
    text, text_norm = gated_then_modulated(
        state, text, text_out, gate, self.norm2_context, shift_mlp, scale_mlp
    )
    text = gated(state, text, feed_forward(state, self.ff_context, text_norm), gate_mlp)
    return text, image


def single_block(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Stands in for ``SD3SingleTransformerBlock.forward``."""
    state: State = self._flowkernels_patch
    why = refusal(state, hidden_states, temb, temb=temb) or _single_structure(self)
    if why is not None:
        state.note(why)
        return type(self).forward(self, hidden_states, temb)
    x = hidden_states
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self.norm1, temb, 6)
    out = _alone(self.attn, state, modulated(state, self.norm1.norm, x, shift, scale))
    x, x_norm = gated_then_modulated(state, x, out, gate, self.norm2, shift_mlp, scale_mlp)
    return gated(state, x, feed_forward(state, self.ff, x_norm), gate_mlp)


def _modulation(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, strided views of one product."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


def _last_text_norm(block: Any, state: State, text: Tensor, temb: Tensor) -> Tensor:
    norm = block.norm1_context
    scale, shift = norm.linear(norm.silu(temb).to(text.dtype)).chunk(2, dim=1)
    return modulated(state, norm.norm, text, shift, scale)


def _heads(x: Tensor, attn: Any) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


def _image_stream(attn: Any, x: Tensor) -> Stream:
    if type(attn.processor) is FusedJointAttnProcessor2_0:
        # diffusers leaves the norms out of its fused processor.
        q, k, v = (_heads(part, attn) for part in attn.to_qkv(x).chunk(3, dim=-1))
        return Stream(q, k, v, None, None)
    q, k, v = (_heads(layer(x), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
    return Stream(q, k, v, attn.norm_q, attn.norm_k)


def _text_stream(attn: Any, x: Tensor, read: bool) -> Stream:
    """``read``: whether anyone reads the text's own rows of the attention."""
    if type(attn.processor) is FusedJointAttnProcessor2_0:
        q, k, v = (_heads(part, attn) for part in attn.to_added_qkv(x).chunk(3, dim=-1))
        return Stream(q, k, v, None, None)
    k, v = _heads(attn.add_k_proj(x), attn), _heads(attn.add_v_proj(x), attn)
    if read:
        q = _heads(attn.add_q_proj(x), attn)
    elif torch.is_grad_enabled() or hooked(attn.add_q_proj):
        # The layer is still called, so that it gets its zero gradient, as in diffusers.
        q = _heads(attn.add_q_proj(x), attn)[:, :0]
    else:
        q = k[:, :0]
    return Stream(q, k, v, attn.norm_added_q, attn.norm_added_k)


def _joint(block: Any, state: State, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of image and text together, and its output layers."""
    attn = block.attn
    backend = backend_of(attn.processor, image.device, sdpa=True)
    image_stream = _image_stream(attn, image)
    # Nobody reads the text's rows of the last block, and joint_attention need not make them.
    fused = core_for(state, backend, image_stream.q) is not None
    read = not (attn.context_pre_only and fused)
    streams = (image_stream, _text_stream(attn, text, read))
    image_out, text_out = attend(state, streams, None, backend)
    if not state.exact:
        # A layer adds its bias to a strided input in a pass, and a rounding, of its own. diffusers
        # lets it.
        image_out, text_out = image_out.contiguous(), text_out.contiguous()
    if not attn.context_pre_only:
        text_out = attn.to_add_out(text_out)
    return attn.to_out[1](attn.to_out[0](image_out)), text_out


def _alone(attn: Any, state: State, x: Tensor) -> Tensor:
    """Attention of one stream, and its output layers."""
    backend = backend_of(attn.processor, x.device, sdpa=True)
    (out,) = attend(state, (_image_stream(attn, x),), None, backend)
    return attn.to_out[1](attn.to_out[0](out))


def _joint_structure(block: Any) -> str | None:
    """Why the block as it now stands must take diffusers' forward, or None."""
    dual = block.use_dual_attention
    first = SD35AdaLayerNormZeroX if dual else AdaLayerNormZero
    context = AdaLayerNormContinuous if block.context_pre_only else AdaLayerNormZero
    why = (
        _single_structure(block, first, _PROCESSORS)
        or (_attention_refusal(block.attn2, "attn2", _PROCESSORS[:1]) if dual else None)
        or _norm_refusal(block.norm1_context, "norm1_context", context)
    )
    if why is None and not (block.context_pre_only or plain(block.norm2_context, nn.LayerNorm)):
        return _changed("norm2_context")
    return why


def _single_structure(
    block: Any, norm: type = AdaLayerNormZero, processors: tuple[type, ...] = _PROCESSORS[:1]
) -> str | None:
    if getattr(block, "_chunk_size", None) is not None:
        return "feed-forward chunking"
    if not plain(block.norm2, nn.LayerNorm):
        return _changed("norm2")
    return _attention_refusal(block.attn, "attn", processors) or _norm_refusal(
        block.norm1, "norm1", norm
    )


def _attention_refusal(attn: Any, name: str, processors: tuple[type, ...]) -> str | None:
    if type(attn.processor) not in processors:
        return f"{name}: attention processor {type(attn.processor).__name__}"
    if not plain(attn, Attention):
        return _changed(name)
    if sharded(attn.to_q):
        return "tensor parallel"
    return None


def _norm_refusal(norm: Any, name: str, kind: type) -> str | None:
    if not plain(norm, kind) or not plain(norm.norm, nn.LayerNorm):
        return _changed(name)
    if getattr(norm, "emb", None) is not None:
        return f"{name} has an embedding of its own"
    return None


def _changed(name: str) -> str:
    return f"{name} is not diffusers' own module, or has a hook"


def _ops(block: Any) -> tuple[str, ...]:
    normed = block.attn.norm_q is not None
    return tuple(op for op in OPS if normed or op != "qk_norm_rope")


_SHARED_SOURCES = (
    JointAttnProcessor2_0.__call__,
    Attention.forward,
    AdaLayerNormZero.forward,
    *NORM_AND_ROPE_SOURCES,
    *FEED_FORWARD_SOURCES,
)

CHAINS = {
    JointTransformerBlock: Chain(
        joint_block,
        _joint_structure,
        _ops,
        (
            JointTransformerBlock.forward,
            FusedJointAttnProcessor2_0.__call__,
            SD35AdaLayerNormZeroX.forward,
            AdaLayerNormContinuous.forward,
            *_SHARED_SOURCES,
        ),
    ),
    SD3SingleTransformerBlock: Chain(
        single_block,
        _single_structure,
        _ops,
        (SD3SingleTransformerBlock.forward, *_SHARED_SOURCES),
    ),
}
