"""Marks this folder's tests ``gpu``: without one they are skipped (tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import DRY

HERE = Path(__file__).resolve().parent
# Of the operators' checks, which the CPU suite holds in full, a dry run takes what shows that they
# are wired to their device.
DRY_CHECKS = ("test_strided_inputs", "test_any_grad_output", "test_repeats_bitwise")


@pytest.hookimpl(tryfirst=True)  # before -m, and tests/conftest.py, look for the marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if DRY and item.path.stem == "test_ops" and item.originalname not in DRY_CHECKS:
                item.add_marker(pytest.mark.skip(reason="dry run: the CPU suite holds this check"))
