"""Fused operators of flow-matching models; each folder holds one family."""

from flowkernels.ops.activation import gelu_tanh, swiglu
from flowkernels.ops.attention import joint_attention, qk_norm_rope
from flowkernels.ops.modulate import gated_residual, gated_residual_norm, modulated_norm

__all__ = [
    "gated_residual",
    "gated_residual_norm",
    "gelu_tanh",
    "joint_attention",
    "modulated_norm",
    "qk_norm_rope",
    "swiglu",
]
