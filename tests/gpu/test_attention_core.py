"""The attention core on the GPU: what it holds interpreted, and tiles of real sizes."""

from __future__ import annotations

import pytest
import torch

from tests.checks.attention_core import (
    CoreChecks,
    Setting,
    assert_core_agrees,
    assert_equal,
    core,
)
from tests.gpu import DEVICE, DRY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DRY, reason="dry run: the interpreter holds these checks on the CPU"),
]


class TestAttentionCore(CoreChecks):
    device = DEVICE

    @pytest.mark.parametrize("width", [64, 128])
    def test_real_sizes(self, width: int):
        """1024 image tokens with 333 of padded text: many blocks, ragged."""
        setting = Setting(1357, 1357, width, (1357, 1101, 1030), torch.bfloat16)
        given = self.operands(setting, heads=4)
        assert_equal(assert_core_agrees(given), core(given))
