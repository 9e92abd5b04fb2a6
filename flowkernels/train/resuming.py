"""Whether a run may go on from a checkpoint, and what people should know if it does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flowkernels.optim import AdamWEMA
from flowkernels.train.checkpoint import fingerprint
from flowkernels.train.config import TrainConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.export import WEIGHTS

# Settings that may change between a checkpoint and its resume without changing the result (the
# teacher's weights, and those of a model that was begun with, are in the checkpoint).
_HARMLESS = {
    "output",
    "recipe",
    "teacher",
    "start",
    "fresh",
    "log_every",
    "save_every",
    "keep_last",
    "max_nonfinite",
    "grid_every",
    "grid_rows",
    "grid_steps",
    "tensorboard",
}
# Settings of how a step is computed: a resume that changes them is not bitwise, but what a finished
# run has written is not made untrue by them.
_EXECUTION = {"device", "precision", "compile", "gradient_checkpointing", "deterministic"}
# Settings that name the folder of a finished run to begin with.
_SOURCES = ("teacher", "start")


def changed_settings(config: TrainConfig, saved: dict[str, Any]) -> list[str]:
    """Names of settings that a resume should not change, and that have changed."""
    now = dataclasses.asdict(config)
    return [k for k in now if k not in _HARMLESS and k in saved and now[k] != saved[k]]


def check_finished(changed: list[str], output: Path) -> None:
    """Raise UsageError where a finished run would be written anew with settings not its own."""
    names = [name for name in changed if name not in _EXECUTION]
    if names:
        raise UsageError(
            f"output: {output} holds a finished run of other settings ({', '.join(names)}): give "
            "another folder, more steps, or --fresh"
        )


def sources(config: TrainConfig) -> dict[str, Any]:
    """Size and checksum of the weights that a run begins with, by the setting that names them."""
    found = {}
    for name in _SOURCES:
        folder = getattr(config, name, None)
        if folder is not None and (path := Path(folder) / WEIGHTS).is_file():
            found[name] = fingerprint(path)
    return found


def changed_sources(config: TrainConfig, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Warnings for a teacher that is not the one in the checkpoint."""
    return [
        f"warning: {name}: {getattr(config, name)} holds other weights than this run began with; "
        "it goes on with those in its checkpoint (--fresh begins anew)"
        for name in now
        if name in saved and saved[name] != now[name]
    ]


def check_output(config: TrainConfig) -> None:
    """Raise UsageError for an output folder that a run cannot write to, or must not."""
    output = Path(config.output)
    try:
        str(output).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"output: got {str(output)!r}, needs a name in UTF-8") from None
    for name in _SOURCES:
        folder = getattr(config, name, None)
        if folder is not None and Path(folder).resolve() == output.resolve():
            raise UsageError(f"output: {output} is the folder of the {name}, needs one of its own")


def load_optimizer(optimizer: AdamWEMA, state: dict[str, Any]) -> None:
    """Load the state; the hyper-parameters stay those of this run's configuration."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
