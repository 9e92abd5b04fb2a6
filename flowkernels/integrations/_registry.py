"""All chains, by the exact class they serve, and the models they are known to serve."""

from __future__ import annotations

import importlib
from typing import Any

try:
    import diffusers
except ImportError as error:
    raise ImportError(
        "flowkernels.patch: needs diffusers; pip install 'flowkernels[diffusers]'"
    ) from error

from flowkernels.integrations._state import Chain

CHAINS: dict[Any, Chain] = {}
# Families whose classes this version of diffusers has not, or has elsewhere.
ABSENT: list[str] = []

for _family in ("sd3", "flux", "adaln"):
    try:
        CHAINS |= importlib.import_module(f"flowkernels.integrations.{_family}").CHAINS
    except ImportError as error:
        ABSENT.append(f"{_family}: {error}")

_NAMES = (
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "SanaTransformer2DModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
)
MODELS: tuple[Any, ...] = tuple(
    getattr(diffusers, name) for name in _NAMES if hasattr(diffusers, name)
)
