"""What the tests on a GPU share, and which of them a dry run (``make gpu DRY=1``) has.

A test that asks for ``device`` runs on the GPU and, in a dry run, on the CPU, so that it is known
to work before a GPU is at hand. One that does not is written for the GPU alone (streams, graphs,
device memory, CUDA C++): a dry run imports and skips it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
DRY = os.environ.get("FLOWKERNELS_GPU_DRY") == "1"


@pytest.hookimpl(tryfirst=True)  # before -m, and tests/conftest.py, look for the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder ``gpu``; without one it is skipped (tests/conftest.py)."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if DRY and "device" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="dry run: written for the GPU alone"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests run."""
    return torch.device("cpu" if DRY else "cuda")
