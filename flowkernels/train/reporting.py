"""What a run tells while it runs: a progress bar for people, TensorBoard for later."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds between two lines where the output is a file, and a bar cannot be redrawn.
_QUIET_INTERVAL = 10.0


class Reporter:
    """Progress bar, plain lines where there is no terminal, and TensorBoard.

    Args:
        title: shown beside the bar.
        steps: steps of the whole run.
        step: steps already done (a resumed run).
        log_folder: TensorBoard's folder, or None for no logs. Entries of steps beyond `step`, left
            by a run that was killed after its last checkpoint, are hidden.
        console: where people look; standard error by default.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        step: int = 0,
        log_folder: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self._steps = steps
        self._writer: Any = None
        if log_folder is not None:
            # Imported here: it takes a second, and runs without logs need not pay it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(log_folder), purge_step=step + 1 if step else None)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            title, total=steps, completed=step, rate="", losses="", start=True
        )
        self._title = title
        self._last = (time.perf_counter(), step)
        self._last_line = 0.0

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)

    def log(self, step: int, losses: dict[str, float], others: dict[str, float]) -> None:
        """Report at a log point.

        Args:
            step: completed steps.
            losses: their means since the last log point; shown and logged.
            others: further scalars, logged only.
        """
        now = time.perf_counter()
        then, before = self._last
        rate = (step - before) / max(now - then, 1e-9)
        self._last = (now, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self._progress.update(self._task, completed=step, rate=f"{rate:.1f} steps/s", losses=text)
        if not self.console.is_terminal:
            self._line(step, rate, text, now)
        if self._writer is not None:
            for name, value in losses.items():
                self._writer.add_scalar(f"loss/{name}", value, step)
            for name, value in others.items():
                self._writer.add_scalar(name, value, step)
            self._writer.add_scalar("speed/steps_per_second", rate, step)

    def grid(self, step: int, canvas: np.ndarray) -> None:
        """Log a grid of samples, uint8 [height, width, 3]."""
        if self._writer is not None:
            self._writer.add_image("samples", canvas, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """One line for people. Where nobody reads them any more, the run goes on without."""
        with contextlib.suppress(BrokenPipeError, SystemExit):  # rich makes the one the other
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self, step: int, rate: float, text: str, now: float) -> None:
        if now - self._last_line >= _QUIET_INTERVAL or step == self._steps:
            self._last_line = now
            remaining = (self._steps - step) / max(rate, 1e-9)
            self.say(
                f"{self._title} {step}/{self._steps}  {rate:.1f} steps/s  {text}"
                f"  {remaining:.0f} s left"
            )
