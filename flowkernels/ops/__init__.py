"""Fused operators of flow-matching models; each folder holds one family."""

from flowkernels.ops.activation import gelu_tanh, swiglu
from flowkernels.ops.modulate import gated_residual, gated_residual_norm, modulated_norm

__all__ = ["gated_residual", "gated_residual_norm", "gelu_tanh", "modulated_norm", "swiglu"]
