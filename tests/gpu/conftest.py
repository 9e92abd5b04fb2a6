"""What the tests on a GPU share.

They run on ``device``: the GPU, or, in a dry run (``make gpu DRY=1``), the CPU, so that the tests
themselves are known to work before a GPU is at hand. What has a meaning on a GPU alone (streams,
graphs, device memory) asks for ``cuda_only``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
DRY = os.environ.get("FLOWKERNELS_GPU_DRY") == "1"


def _cuda() -> bool:
    return bool(torch.version.cuda) and torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m, and tests/conftest.py, look for the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder ``gpu``; without one it is skipped (tests/conftest.py)."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests run."""
    return torch.device("cpu" if DRY or not _cuda() else "cuda")


@pytest.fixture
def cuda_only(device: torch.device) -> torch.device:
    """For what has no counterpart on a CPU: skipped in a dry run."""
    if device.type != "cuda":
        pytest.skip("dry run: this needs the GPU itself")
    return device
