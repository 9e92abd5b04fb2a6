"""Markers, and which tests run where: the interpreter's process runs the interpretable ones."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "interpreter: also runs on the Triton kernels, interpreted, in a process of its own",
        "unforced: runs with the backend that the library chooses",
    ):
        config.addinivalue_line("markers", line)
    if INTERPRETED:
        from tests.checks.interpreter import prepare

        prepare()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        kept = [item for item in items if _is_interpretable(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
        return
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    # A dry run of the tests on a GPU has them on the CPU (tests/gpu/conftest.py).
    if not torch.cuda.is_available() and os.environ.get("FLOWKERNELS_GPU_DRY") != "1":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _is_interpretable(item: pytest.Item) -> bool:
    """Marked for the interpreter, and of an op that has a Triton kernel."""
    from flowkernels.ops import _library

    case = getattr(getattr(item, "cls", None), "case", None)
    if case is not None and not _library.FUNCTIONS[case.name].triton:
        return False
    return item.get_closest_marker("interpreter") is not None
