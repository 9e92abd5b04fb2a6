"""The report: rows in, table, Markdown, plots and saved results out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.targets import Target, target

MACHINE = {
    "device": "cpu", "cpu": "A Processor", "cores": 2, "threads": 2, "python": "3.11.7",
    "torch": "2.13.0", "triton": "3.7.1",
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return {
        "op": "modulated_norm",
        "shape": "4x1024x1536",
        "dtype": "float32",
        "direction": "forward",
        "kind": "speed",
        "device": "cpu",
        "ours_us": 8000.0,
        "ours_spread_us": [7900.0, 8100.0],
        "ratio": {"eager": 4.0, "compile": 2.5},
        "ratio_spread": {"eager": [3.9, 4.1], "compile": [2.4, 2.6]},
        "bandwidth_fraction": 0.7,
        "copy_gb_per_s": 9.0,
        "peak_bytes": {"ours": 25_000_000, "eager": 50_000_000, "compile": 25_000_000},
        "target": "≥ 3.5× eager",
        "met": True,
    } | changes


@pytest.fixture
def result() -> report.Result:
    host = row(kind="host", shape="1x4x64", ours_us=6.0, met=False, peak_bytes=None)
    return report.Result("a-processor", MACHINE, [row(), host], {"commit": "abc"}, ["swiglu-1x2"])


def test_markdown_names_every_figure(result: report.Result):
    text = report.markdown(result)
    assert "4.00 ±0.10" in text
    assert "2.50 ±0.10" in text
    assert "70%" in text
    assert "8 ms" in text
    assert "1 of 2 targets met" in text
    assert "swiglu-1x2" in text
    assert "| 25 | 50 | 25 |" in text


def test_a_saved_cpu_result_has_no_absolute_times(result: report.Result, tmp_path: Path):
    json_path, text_path = report.save(result, tmp_path)
    speed, host = json.loads(json_path.read_text())["rows"]
    assert "ours_us" not in speed
    assert speed["ratio"] == {"eager": 4.0, "compile": 2.5}
    assert host["ours_us"] == 6.0  # the target is stated in microseconds
    assert "8 ms" not in text_path.read_text()


def test_a_saved_gpu_result_has_them(tmp_path: Path):
    machine = MACHINE | {"gpu": "A GPU", "driver_version": "580", "clocks.sm": "1980 MHz"}
    saved, _ = report.save(report.Result("a-gpu", machine, [row(device="cuda")]), tmp_path)
    assert json.loads(saved.read_text())["rows"][0]["ours_us"] == 8000.0


def test_saved_results_are_read_back(result: report.Result, tmp_path: Path):
    saved, _ = report.save(result, tmp_path)
    again = report.load(saved)
    assert again.rows == report.savable(result).rows
    assert again.machine == MACHINE
    assert again.skipped == ["swiglu-1x2"]


def test_pytest_benchmarks_own_file_is_read(tmp_path: Path):
    path = tmp_path / "run.json"
    entry = {"extra_info": {"variant": "ours", "row": row()}}
    path.write_text(
        json.dumps(
            {
                "machine_info": {"name": "a-processor", "flowkernels": MACHINE},
                "commit_info": {"id": "abc", "dirty": False},
                "datetime": "2026-01-01T00:00:00",
                "benchmarks": [entry, {"extra_info": {"variant": "eager"}}],
                "flowkernels": {"level": "default", "compiler": "inductor", "skipped": []},
            }
        )
    )
    found = report.load(path)
    assert [r["op"] for r in found.rows] == ["modulated_norm"]
    assert found.about["commit"] == "abc"


def test_a_run_that_was_cut_off_is_read_from_its_rows(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    header = {"name": "a-processor", "machine": MACHINE, "about": {}}
    path.write_text("\n".join(map(json.dumps, [header, row(), row(op="swiglu")])) + "\n")
    assert [r["op"] for r in report.load(path).rows] == ["modulated_norm", "swiglu"]


@pytest.mark.parametrize("content", ["", "[1", "{}"])
def test_another_file_is_refused_by_name(content: str, tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"other\.json"):
        report.load(path)


def test_plots_are_written(result: report.Result, tmp_path: Path):
    made = report.plot(result, tmp_path)
    assert [path.name for path in made] == ["a-processor-speed.png", "a-processor-memory.png"]
    assert all(path.stat().st_size > 1000 for path in made)


def test_compact_lines_are_short(result: report.Result):
    lines = report.compact(result).splitlines()
    assert len(lines) == 4
    assert all(len(line) <= 125 for line in lines[1:])


def test_a_target_needs_every_figure():
    aim = Target(eager=3.5, compile=2.0, bandwidth=0.6)
    assert aim.met(row()) is True
    assert aim.met(row(bandwidth_fraction=0.5)) is False
    assert aim.met(row(ratio={"eager": 3.4, "compile": 9.0})) is False
    assert Target().met(row()) is None
    assert Target(host=10).met(row(ours_us=11.0)) is False


@pytest.mark.parametrize(
    ("family", "device", "direction", "size", "expected"),
    [
        ("norm", "cpu", "forward", 10**7, Target(eager=3.5, compile=2.0, bandwidth=1 / 1.5)),
        ("norm", "cpu", "forward+backward", 10**7, Target(compile=1.5)),
        ("norm", "cuda", "forward", 10**9, Target(compile=1.3, bandwidth=0.9)),
        ("loss", "cpu", "forward+backward", 10**5, Target(eager=3.0, compile=2.0)),
        ("loss", "cpu", "forward+backward", 10**7, Target(eager=3.0, compile=1.5)),
        ("loss", "cuda", "forward+backward", 10**7, Target(bandwidth=0.85)),
        ("activation", "cpu", "forward", 10**7, Target()),
    ],
)
def test_targets(family: str, device: str, direction: str, size: int, expected: Target):
    found = target(family, device, direction, elements=size, bytes_moved=size, kind="speed")
    assert found == expected
