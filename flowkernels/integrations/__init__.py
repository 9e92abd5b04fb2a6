"""Drop-ins for what people already call. Everything here is imported where it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowkernels.integrations.patching import Handle, NotPatchedError, patch
    from flowkernels.integrations.report import Report
    from flowkernels.integrations.schedulers import FusedFlowMatchEuler, FusedFlowMatchHeun

__all__ = [
    "FusedFlowMatchEuler",
    "FusedFlowMatchHeun",
    "Handle",
    "NotPatchedError",
    "Report",
    "patch",
]

_HOMES = {
    "patch": "patching",
    "Handle": "patching",
    "NotPatchedError": "patching",
    "Report": "report",
    "FusedFlowMatchEuler": "schedulers",
    "FusedFlowMatchHeun": "schedulers",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"flowkernels.integrations.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'flowkernels.integrations' has no attribute {name!r}")
