"""The run as a process: signals, the lock on its folder, the device, determinism."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flowkernels.train.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The device a configuration names; "auto" is CUDA where there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: got {name!r}, needs auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        index = device.index or 0
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise UsageError(f"device: got {name!r}, but this machine offers no such GPU")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UsageError(f"device: got {name!r}, needs auto, cpu, cuda or cuda:N")
    return device


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether the networks are autocast; "auto" asks if the device multiplies bfloat16 itself."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported()


def refuse_several_processes() -> None:
    """Raise UsageError under a launcher of several processes.

    Each would train alone on the same data and write to the same folder: silently wrong.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size.strip() not in ("", "1"):
        raise UsageError(f"WORLD_SIZE: got {world_size}, needs 1: a run is one process")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it however the process ends.

    Raises:
        UsageError: another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"output: {folder} is a file, needs a folder") from None
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"output: another run is writing to {folder}") from None
        yield


class StopRequest:
    """Turns the first SIGTERM, SIGINT or SIGHUP into `requested`; a second one acts at once.

    Within another one, that is asked too. Signals can be taken over in the main thread only;
    elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                kept = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not kept:  # as nohup wants it
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        previous = self._previous[number]
        outer = getattr(previous, "__self__", None)
        if isinstance(outer, StopRequest):
            outer._request(number, frame)
        else:
            signal.signal(number, previous)


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Inside the block Python's collector leaves alone what was there before.

    Going through torch's hundreds of thousands of objects again and again took a tenth of a small
    model's step. Where somebody has frozen objects already, theirs stay as they are: the collector
    cannot let go of some alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Deterministic kernels inside the block, where torch has them."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    module: Any = torch.utils.deterministic
    fill = module.fill_uninitialized_memory
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Writing NaN into every new tensor would cost a pass over memory, and changes no result.
    module.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        module.fill_uninitialized_memory = fill
