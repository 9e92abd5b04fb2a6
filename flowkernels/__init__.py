"""Fused kernels, drop-ins and distillation trainers for flow-matching models."""

from flowkernels import ops
from flowkernels.ops._library import backend, describe

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "describe", "ops"]
