"""The attention core's Triton kernels: interpreted, and compiled ahead of time; no GPU needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checks import aot

ROOT = Path(__file__).resolve().parents[2]
HALVES = (torch.bfloat16, torch.float16)
PASSES = (
    "attention_forward_kernel",
    "attention_backward_keys_kernel",
    "attention_backward_queries_kernel",
)
# The heads of SD3 and FLUX, with padded text; operands that TMA cannot read; float32.
# `python -m tests.checks.aot attention_core` compiles the whole table.
SMALL = ((64, torch.bfloat16, True, True), (128, torch.bfloat16, True, True))
SMALL_HOPPER = ((64, torch.bfloat16, True, False), (64, torch.float32, True, True))


@pytest.fixture(scope="module")
def reports() -> dict[aot.Job, aot.Report]:
    wanted = aot.core_jobs(settings=SMALL) + aot.core_jobs((90,), SMALL_HOPPER)
    return dict(aot.compile_all(wanted))


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_spills_shared_memory_and_no_tf32(reports, arch: int):
    mine = {job: report for job, report in reports.items() if job.arch == arch}
    assert {job.kernel for job in mine} >= set(PASSES)
    problems = [problem for job, report in mine.items() for problem in report.problems(job)]
    assert not problems, "\n".join(problems)


def test_hopper_multiplies_by_wgmma(reports):
    for name in PASSES:
        found = [
            r for job, r in reports.items() if half(job) and (job.arch, job.kernel) == (90, name)
        ]
        assert len(found) == 3, "two head widths, and one of them through pointers"
        assert all(report.wgmma for report in found), name


def test_hopper_reads_by_tma(reports):
    for name in PASSES:
        jobs = [job for job in reports if half(job) and (job.arch, job.kernel) == (90, name)]
        by_tma = [job for job in jobs if any("tensordesc" in kind for _, kind in job.signature)]
        assert len(by_tma) == 2, name
        assert all(bool(reports[job].tma_loads) == (job in by_tma) for job in jobs), name


def test_float32_is_multiplied_in_float32(reports):
    single = [r for job, r in reports.items() if not half(job) and job.kernel in PASSES]
    assert len(single) == 3
    assert not any(report.wgmma or report.tf32_products for report in single)


def half(job: aot.Job) -> bool:
    return dict(job.signature).get("q") in ("*bf16", "*fp16")


def test_every_chip_has_tiles_for_every_head():
    """Chips of no entry take the oldest's; tiles divide the statistics' padding."""
    from flowkernels.ops.attention import _core_config as config

    for capability in (75, 80, 86, 89, 90, 100, 103, 120):
        for dtype in (*HALVES, torch.float32):
            for which in (config.FORWARD, config.KEYS, config.QUERIES):
                for columns in (16, 32, 64, 128, 256):
                    tiles = config.tiles_for(which, columns, dtype, capability)
                    assert config.LARGEST_TILE % tiles.M == 0
                    assert min(tiles.M, tiles.N) >= 16


def test_core_interpreted():
    """Triton decides at import whether it interprets, so that takes a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    module = "tests/ops/attention_core_interpreted.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", module],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, f"interpreted:\n{run.stdout[-6000:]}{run.stderr[-2000:]}"
    summary = run.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary)
    assert not re.search(r"skipped|failed", summary)
