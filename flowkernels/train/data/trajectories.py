"""A teacher's trajectories on disk: written once in shards, read as a dataset.

Files in the folder:

    trajectories.json         what they are of: teacher, grid, guidance, times, count, seed
    states-00000.safetensors  "states" [n, S, C, H, W] at the S times, and "labels" [n]

A shard is a function of the settings and its number alone, and is written under a temporary name
first: generation that was killed goes on with the first shard that is missing, to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowkernels.train.checkpoint import save_weights
from flowkernels.train.errors import DataError, UsageError
from flowkernels.train.files import write_json

MANIFEST = "trajectories.json"
_FORMAT = 1

Roll = Callable[[Tensor, dict[str, Tensor]], Tensor]
"""Noises [n, C, H, W] and conditions to states [n, S, C, H, W]."""


class TrajectoryDataset:
    """Stored trajectories; the loader deals them out as batch["trajectory"].

    States are read from the disk as they are asked for: the folder may exceed the memory.

    Args:
        folder: what `store_trajectories` wrote.

    Raises:
        DataError: a file is missing or damaged; one line that names it.
    """

    key = "trajectory"
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    times: Tensor
    """float64 [S], times of the states, from 1 (the noise) to 0 (the endpoint)."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / MANIFEST
        self.settings = _manifest(path)
        try:
            self.times = torch.tensor(self.settings["times"], dtype=torch.float64)
            channels, height, width = self.settings["shape"]
            self.classes = tuple(self.settings["classes"])
            sizes = shard_sizes(self.settings["count"], self.settings["shard_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged: {' '.join(str(error).split())}") from error
        self.shape = (channels, height, width)
        self._size = self.settings["shard_size"]
        self._shards = [
            _read(shard_path(folder, i), (n, len(self.times), *self.shape))
            for i, n in enumerate(sizes)
        ]
        self._labels = torch.cat([shard["labels"] for shard in self._shards])

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        """Class of every trajectory, [N] int64."""
        return self._labels

    def images(self, indices: Tensor) -> Tensor:
        """States [n, S, C, H, W] of those trajectories."""
        rows = (divmod(index, self._size) for index in indices.tolist())
        return torch.stack([self._shards[shard]["states"][row] for shard, row in rows])


def store_trajectories(
    folder: str | Path,
    roll: Roll,
    settings: Mapping[str, Any],
    labels: Tensor | None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> TrajectoryDataset:
    """Generate what is missing of a folder of trajectories.

    Args:
        folder: created if need be.
        roll: noises and conditions to states; on `device`.
        settings: what the trajectories are of, JSON values. It must have "times" (S of them),
            "shape", "classes", "count", "shard_size" and "seed"; what else there is (the teacher's
            fingerprint, guidance) only has to agree with what the folder holds.
        labels: classes to draw from, each as often as it is there; None for a teacher without.
        device: of `roll`.
        progress: called with the trajectories done and to do.

    Raises:
        UsageError: the folder holds trajectories of other settings.

    Returns:
        The dataset, complete.
    """
    folder = Path(folder)
    settings = {"format": _FORMAT, **settings}
    _agree(folder / MANIFEST, settings)
    shape = tuple(settings["shape"])
    sizes = shard_sizes(settings["count"], settings["shard_size"])
    done = 0
    for i, n in enumerate(sizes):
        path = shard_path(folder, i)
        if not _is_whole(path, (n, len(settings["times"]), *shape)):
            save_weights(path, _shard(roll, n, shape, labels, (settings["seed"], i), device))
        done += n
        if progress is not None:
            progress(done, settings["count"])
    return TrajectoryDataset(folder)


def stored_times(folder: str | Path) -> Tensor | None:
    """float64 [S], the times of the states in a folder; None where it holds none."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        return torch.tensor(_manifest(path)["times"], dtype=torch.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged: {' '.join(str(error).split())}") from error


def shard_sizes(count: int, shard_size: int) -> list[int]:
    """Trajectories in each shard; the last one may be smaller."""
    full, rest = divmod(count, shard_size)
    return [shard_size] * full + ([rest] if rest else [])


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is."""
    return folder / f"states-{index:05d}.safetensors"


def _shard(
    roll: Roll,
    count: int,
    shape: tuple[int, ...],
    labels: Tensor | None,
    seed: tuple[int, int],
    device: torch.device,
) -> dict[str, Tensor]:
    # Torch's CPU generator takes 32 bits of its seed; hash both words into them.
    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(word)
    noise = torch.randn((count, *shape), generator=generator)
    drawn = torch.zeros(count, dtype=torch.int64)
    conditions = {}
    if labels is not None:
        drawn = labels[torch.randint(len(labels), (count,), generator=generator)]
        conditions["labels"] = drawn.to(device)
    return {"states": roll(noise.to(device), conditions).float(), "labels": drawn}


def _agree(path: Path, settings: dict[str, Any]) -> None:
    """Write the manifest, or see that the one there is the same."""
    if not path.exists():
        write_json(path, settings)
        return
    found = _manifest(path)
    differing = [key for key in settings if found.get(key) != settings[key]]
    if differing:
        raise UsageError(
            f"trajectories: {path.parent} holds those of another {', '.join(differing)}; "
            "remove the folder or name another"
        )


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT or "times" not in found:
        raise DataError(f"{path}: not the trajectories that this version writes")
    return found


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        with safe_open(path, "pt") as file:
            labels = file.get_slice("labels").get_shape()
            return tuple(file.get_slice("states").get_shape()) == shape and labels == [shape[0]]
    except (OSError, SafetensorError):
        return False


def _read(path: Path, shape: tuple[int, ...]) -> dict[str, Tensor]:
    if not path.exists():
        raise DataError(f"{path}: missing; the trajectories are not complete")
    if not _is_whole(path, shape):
        raise DataError(f"{path}: damaged, or not of states {shape}")
    return load_file(path)
