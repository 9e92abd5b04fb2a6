"""Loads the native libraries, once, and remembers why one is off."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

_DIRECTORY = Path(__file__).resolve().parent.parent / "_lib"


def _build_report() -> dict[str, str]:
    try:
        report = json.loads((_DIRECTORY / "build.json").read_text())
        return {str(key): str(value) for key, value in report.items()}
    except (OSError, ValueError):
        return {}


def _load(name: str) -> str | None:
    """Load ``libflowkernels_<name>.so``; None where it is loaded, else the reason it is not."""
    path = _DIRECTORY / f"libflowkernels_{name}.so"
    if not path.is_file():
        reason = _build_report().get(name, "")
        return reason if reason not in ("", "built") else "native library not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return None


def _load_nodes() -> tuple[Any, str | None]:
    """``flowkernels._nodes``, which serves the very version of torch that it was built with; else
    None and the reason.
    """
    state, wanted = _build_report().get("nodes", ""), f"built for torch {torch.__version__}"
    if state != wanted:
        return None, f"in Python ({state or 'not built'})"
    try:
        return importlib.import_module("flowkernels._nodes"), None
    except ImportError as error:
        return None, f"in Python ({error})"


NODES, NODES_OFF = _load_nodes()

# The CUDA library takes its stream from a symbol that only a CUDA build of torch has.
OFF: dict[str, str | None] = {
    "cpu": _load("cpu"),
    "cuda": _load("cuda") if torch.version.cuda else "torch was built without CUDA",
}
