"""The attention core, interpreted: run by test_attention_core.py in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flowkernels.ops import _triton
from tests.checks.attention_core import CoreChecks

pytestmark = pytest.mark.interpreter


class TestThroughPointers(CoreChecks):
    device = "cpu"


class TestByTma(CoreChecks):
    """Hopper's tiles and descriptors; float32 is read through pointers there too."""

    device = "cpu"
    dtypes = (torch.float16, torch.bfloat16)

    @pytest.fixture(autouse=True)
    def hopper(self) -> Iterator[None]:
        with _triton.compiling_for(90):
            yield
