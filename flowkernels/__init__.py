"""Fused kernels, drop-ins and distillation trainers for flow-matching models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowkernels import losses, ode, ops, optim
from flowkernels.ops._library import backend, describe

if TYPE_CHECKING:
    from flowkernels import distill, integrations, nn, train
    from flowkernels.integrations import patch

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "backend",
    "describe",
    "distill",
    "integrations",
    "losses",
    "nn",
    "ode",
    "ops",
    "optim",
    "patch",
    "train",
]

# Rooms that pull in more than the kernels do are imported when they are first entered.
_LAZY = ("distill", "integrations", "nn", "train")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"flowkernels.{name}")
    if name == "patch":
        return importlib.import_module("flowkernels.integrations").patch
    raise AttributeError(f"module 'flowkernels' has no attribute {name!r}")
