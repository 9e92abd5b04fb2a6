"""What the stages of :mod:`bench.gpu` share: where a run writes, and how it starts processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAST_WORDS_SECONDS = 30.0


class StageFailed(Exception):
    """A stage did not do what it is for; the message is one line."""


@dataclass
class Run:
    """One run of the script: its mode, where it writes, and when it has to be done."""

    dry: bool
    work: Path
    results: Path
    deadline: float
    options: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def bench_json(self) -> Path:
        return self.work / f"latest-{self.device}.json"

    def command(self, stage: str, arguments: list[str], seconds: float, **environment: str) -> int:
        """Run a process with its output in the stage's log. At the limit it is interrupted, as by
        Ctrl-C, to write down what it has; soon after, its whole group is ended.

        Raises:
            StageFailed: It ran past ``seconds`` or past the end of the whole run.
        """
        limit = max(1.0, min(seconds, self.deadline - time.monotonic()))
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        # A virtual environment that is not activated has its tools beside its Python.
        tools = [os.environ.get("PATH", ""), str(Path(sys.executable).parent)]
        merged = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PATH": os.pathsep.join(filter(None, tools)),
            "PYTHONUNBUFFERED": "1",
        } | environment  # fmt: skip
        with open(self.log(stage), "a") as log:
            log.write(f"$ {' '.join(arguments)}\n")
            log.flush()
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=merged, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_hear_interrupts,
            )  # fmt: skip
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                _interrupt(process)
                raise StageFailed(f"ran past its {limit:.0f} s") from None
            finally:
                _end_group(process)

    def log(self, stage: str) -> Path:
        return self.work / f"{stage}.log"


def _hear_interrupts() -> None:
    """A shell without job control has what it starts in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS_SECONDS)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the process left running, itself included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
