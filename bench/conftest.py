"""Runs the cases under pytest-benchmark: one benchmark a variant, grouped by case.

A module lists its cases in ``cases(context)`` and has one test with the parameters ``case`` and
``variant``. The first variant of a case measures all of them together; each one's samples are then
replayed to pytest-benchmark (see :class:`bench.timing.ReplayTimer`). Our own entry carries the row
of the table in its ``extra_info``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import machine
from bench.cases import Case, Context
from bench.measure import Measurement, measure
from bench.shapes import LEVELS
from bench.timing import REPLAY


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flowkernels benchmarks")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--bench-level", choices=LEVELS, default="default", help="which shapes")
    group.addoption("--bench-seconds", type=float, default=2.0, help="time for one case")
    group.addoption("--bench-budget", type=float, default=0.0, help="seconds for the run; 0: all")
    group.addoption("--bench-threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    group.addoption("--bench-compiler", default="inductor", help="torch.compile's backend")
    group.addoption("--bench-rows", default="", help="file that gets each row as it is measured")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "benchmark: pytest-benchmark's settings of one test")
    if config.option.bench_threads:
        torch.set_num_threads(config.option.bench_threads)
    option = config.option
    config.stash[CONTEXT] = Context(
        option.bench_device, option.bench_level, option.bench_compiler, option.bench_seconds
    )
    config.stash[LEDGER] = Ledger(option.bench_budget, option.bench_rows)
    if option.bench_rows:
        header = {"name": machine.name(option.bench_device), "about": _about(config)}
        header["machine"] = machine.describe(option.bench_device)
        Path(option.bench_rows).write_text(json.dumps(header) + "\n")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "variant"} <= set(metafunc.fixturenames):
        pairs = [
            (case, variant)
            for case in metafunc.module.cases(metafunc.config.stash[CONTEXT])
            for variant in case.variants
        ]
        metafunc.parametrize(
            ("case", "variant"), pairs, ids=[f"{case.id}-{variant}" for case, variant in pairs]
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the targets are stated at comes first: a short run drops the end of the list."""
    items.sort(key=lambda item: _parameter(item, "case").priority if _has_case(item) else 0)


def _has_case(item: pytest.Item) -> bool:
    return "case" in getattr(getattr(item, "callspec", None), "params", {})


def _parameter(item: pytest.Item, name: str) -> Any:
    return item.callspec.params[name]  # type: ignore[attr-defined]


class Ledger:
    """The measurements of a run: each case once, as long as there is time.

    Rows are written out one by one: pytest-benchmark writes at the end, which a run that is killed
    does not see.
    """

    def __init__(self, budget: float, rows_path: str) -> None:
        self._rows_path = rows_path
        self._deadline = time.monotonic() + budget if budget else float("inf")
        self._last: tuple[Case, Measurement | Exception] | None = None
        self.skipped: list[str] = []

    def measurement(self, case: Case, context: Context) -> Measurement:
        """Measure ``case`` unless that was just done (its variants follow each other)."""
        if self._last is None or self._last[0] is not case:
            if time.monotonic() > self._deadline:
                if case.id not in self.skipped:
                    self.skipped.append(case.id)
                pytest.skip("the time for this run is spent")
            try:
                self._last = (case, measure(case, context))
                self._write(self._last[1].row)
            except Exception as error:  # told once for each variant of the case
                self._last = (case, error)
        found = self._last[1]
        if isinstance(found, Exception):
            raise found
        return found

    def _write(self, row: dict[str, Any]) -> None:
        if self._rows_path:
            with open(self._rows_path, "a") as file:
                file.write(json.dumps(row) + "\n")


def _about(config: pytest.Config) -> dict[str, Any]:
    context = config.stash[CONTEXT]
    return {"level": context.level, "compiler": context.compile_backend}


CONTEXT = pytest.StashKey[Context]()
LEDGER = pytest.StashKey[Ledger]()


@pytest.fixture
def replay(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Measure a case (once) and give one variant's samples to pytest-benchmark."""
    context = request.config.stash[CONTEXT]
    ledger = request.config.stash[LEDGER]

    def run(case: Case, variant: str) -> None:
        benchmark.skipped = True  # until there are samples: a case that is not run is no benchmark
        found = ledger.measurement(case, context)
        benchmark.skipped = False
        samples = found.samples[variant]
        benchmark.group = case.id
        benchmark.extra_info["variant"] = variant
        if variant == "ours":
            benchmark.extra_info["row"] = found.row
        REPLAY.load(samples)
        benchmark.pedantic(lambda: None, rounds=len(samples))

    return run


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.pop("node", None)  # a host's name says nothing about its speed
    device = config.stash[CONTEXT].device
    machine_info["flowkernels"] = machine.describe(device)
    machine_info["name"] = machine.name(device)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    output_json["flowkernels"] = _about(config) | {"skipped": config.stash[LEDGER].skipped}
    for entry in output_json["benchmarks"]:
        entry["params"] = None  # cases are objects; their ids are in the names
