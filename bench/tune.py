"""``python -m bench.tune``: choices that were made without a GPU, against their alternatives.

Tiles, warps, registers and rows a program were chosen by what ptxas says of them, and the order of
attention cores by what they promise. Here each alternative (:mod:`bench.candidates`) is put in the
place of the choice, checked against float64, and timed in turns with it. What is better is for a
person to write into the source: nothing is tuned while people's programs run.

Prints a table for each choice, the fastest first, and keeps all of them in ``runs/tune``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import machine, peers
from bench.cases import Call, Context, Operation, prepare
from bench.shapes import label
from bench.timing import CudaSampler, HostSampler, Sampler, compare, quartiles

ROOT = Path(__file__).resolve().parent.parent
NOW, COPY = "now", "copy"
SHOWN = 6  # of a choice, on the screen; all of them are in the file

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Candidate:
    """An alternative: its name, and what to put in the place of what is there."""

    name: str
    patches: tuple[Patch, ...]

    def applied(self) -> ExitStack:
        """Inside, the alternative holds."""
        stack = ExitStack()
        for patch in self.patches:
            stack.enter_context(patch())
        return stack

    def around(self, call: Call) -> Call:
        def patched(index: int) -> Any:
            with self.applied():
                return call(index)

        return patched


@dataclass(frozen=True)
class Choice:
    """One choice in the source, and the work by which its alternatives are judged."""

    name: str
    operation: Operation
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    candidates: tuple[Candidate, ...]

    @property
    def title(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {self.operation.name} {label(self.shape)} {dtype} {self.direction}"


@dataclass(frozen=True)
class Row:
    """A candidate's figures; ``note`` says why there are none."""

    choice: str
    candidate: str
    microseconds: float | None = None
    times_now: float | None = None
    spread: tuple[float, float] | None = None
    of_copy: float | None = None
    note: str = ""


def why(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:120]


def measure(choice: Choice, context: Context) -> list[Row]:
    """What is there now and every candidate that runs and is right, the fastest first."""
    prepared = prepare(
        choice.operation, choice.shape, choice.dtype, choice.direction, "loop", context
    )
    ours = prepared.variants["ours"]
    copy = peers.copy_call(prepared.bytes_moved, prepared.sets, context.torch_device)
    samplers: dict[str, Sampler] = {}
    failed: list[Row] = []

    def sampler(call: Call) -> Sampler:
        if context.device == "cpu":
            return HostSampler(call)
        return CudaSampler(call, sets=prepared.sets)

    prepared.verify()
    samplers[NOW], samplers[COPY] = sampler(ours), sampler(copy)
    for candidate in choice.candidates:
        try:
            with candidate.applied():
                prepared.verify()
            samplers[candidate.name] = sampler(candidate.around(ours))
        except Exception as error:  # shared memory that is not there, a tile that is not served
            failed.append(Row(choice.name, candidate.name, note=why(error)))
    compared = compare(samplers, seconds=context.seconds, min_rounds=len(samplers))
    rows = []
    for name in samplers:
        ratios = sorted(compared.ratios(NOW, name))
        rows.append(
            Row(
                choice.name, name, compared.median(name) * 1e6, ratios[len(ratios) // 2],
                quartiles(ratios), compared.median(COPY) / compared.median(name),
            )
        )  # fmt: skip
    rows.sort(key=lambda row: row.microseconds or 0.0)
    return [*rows, *failed]


def compile_ahead(title: str, candidate: str, device: str) -> None:
    """Run one candidate once, so that Triton's cache on disk has its kernels (in a process)."""
    choice = next(each for each in _choices() if each.title == title)
    alternative = next(each for each in choice.candidates if each.name == candidate)
    context = Context(device, "tiny")  # two sets of inputs
    prepared = prepare(
        choice.operation, choice.shape, choice.dtype, choice.direction, "loop", context
    )
    with alternative.applied():
        prepared.variants["ours"](0)


def compile_all(choices: Sequence[Choice], device: str, workers: int, seconds: float) -> None:
    """Compile in ``workers`` processes for at most so long; a failure shows when it is measured."""
    jobs = [(c.title, each.name, device) for c in choices for each in c.candidates]
    with get_context("spawn").Pool(workers) as pool:  # nothing of it is left on the device after
        waiting = pool.starmap_async(compile_ahead, jobs, chunksize=1)
        waiting.wait(seconds)
        done = "all" if waiting.ready() else f"{seconds:.0f} s were not enough for all"
        print(f"compiling {len(jobs)} candidates ahead: {done}", flush=True)


def fastest(rows: Sequence[Row]) -> list[Row]:
    """The first few, and what they are measured by."""
    return [row for i, row in enumerate(rows) if i < SHOWN or row.candidate in (NOW, COPY)]


def table(title: str, rows: Sequence[Row]) -> str:
    lines = [f"### {title}", "", "| | µs | times as fast | of copy | |", "|---|---|---|---|---|"]
    for row in rows:
        if row.microseconds is None or row.times_now is None or row.spread is None:
            lines.append(f"| {row.candidate} | – | – | – | {row.note} |")
            continue
        low, high = row.spread
        lines.append(
            f"| {row.candidate} | {row.microseconds:.1f} | {row.times_now:.3f} "
            f"({low:.3f}–{high:.3f}) | {row.of_copy or 0:.0%} | |"
        )
    return "\n".join(lines) + "\n"


def _choices() -> list[Choice]:
    from bench.candidates import choices

    return choices()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    made.add_argument("-k", default="", help="only choices whose title has one of these, by comma")
    made.add_argument("--list", action="store_true", help="name the choices and candidates")
    made.add_argument("--seconds", type=float, default=3.0, help="time for one choice's rounds")
    made.add_argument("--budget", type=float, default=480, help="seconds after which none is begun")
    made.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1),
                      help="processes that compile ahead; 0: none")  # fmt: skip
    made.add_argument("--out", type=Path, default=ROOT / "runs" / "tune", help="folder to write")
    return made


def main(arguments: Iterable[str] | None = None) -> int:
    options = parser().parse_args(list(arguments) if arguments is not None else None)
    parts = [part.strip() for part in options.k.split(",") if part.strip()]
    chosen = [c for c in _choices() if not parts or any(part in c.title for part in parts)]
    if options.list:
        for choice in chosen:
            print(f"{choice.title}\n  {', '.join(each.name for each in choice.candidates)}")
        return 0
    if not torch.cuda.is_available():
        print("bench.tune: torch sees no NVIDIA GPU here (--list works without)", file=sys.stderr)
        return 2
    ends = time.monotonic() + options.budget
    if options.workers:
        compile_all(chosen, "cuda", options.workers, options.budget / 2)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine.describe("cuda"), "rows": []}
    text = ""
    for choice in chosen:
        if time.monotonic() > ends:
            print(f"no time for {choice.title}", flush=True)
            continue
        try:
            rows = measure(choice, Context("cuda", seconds=options.seconds))
        except Exception as error:  # the next choices stand on their own
            print(f"{choice.title}: {why(error)}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        print(table(choice.title, fastest(rows)), flush=True)
        text += table(choice.title, rows) + "\n"
        found["rows"] += [{"title": choice.title} | asdict(row) for row in rows]
        (options.out / "latest.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "latest.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
