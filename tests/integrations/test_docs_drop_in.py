"""docs/drop-in.md runs: its blocks, in order, in one namespace; its report is the real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "drop-in.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
REPORT = re.search(r"```\n(flowkernels\.patch of .*?)```", PAGE, re.DOTALL)


def test_every_block_runs_and_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]):
    assert len(BLOCKS) == 14
    assert REPORT is not None
    namespace: dict[str, object] = {}
    printed = []
    for block in BLOCKS:
        exec(block, namespace)
        printed.append(capsys.readouterr().out)
    assert REPORT.group(1) in printed[BLOCKS.index("print(handle.report())\n")]
    levels = next(text for block, text in zip(BLOCKS, printed, strict=True) if "0.0089" in block)
    shown = re.findall(r"# (\[.*?\])", "\n".join(BLOCKS))
    assert len(shown) == 2
    assert all(row in levels for row in shown)
