"""Checkpoints that survive a power cut: complete, verified, and never pickled.

A checkpoint is a folder `checkpoint-XXXXXXXX` (the step) of three files:

    tensors.safetensors   every tensor of the state
    state.json            everything else, and where each tensor belongs
    manifest.json         the step, and size and CRC-32 of the other two

It is written to a temporary sibling, forced to the disk, and only then given its name. So a folder
of that name is complete, unless the disk damaged it later: sizes and checksums tell.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowkernels.train.files import TEMPORARY, atomic, sync
from flowkernels.train.state_tree import decode, encode

_NAME = re.compile(r"checkpoint-(\d{8,})")
_TEMPORARY = ".tmp-checkpoint-"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_FORMAT = 1
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message says why, in one line."""


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(folder) / f"checkpoint-{step:08d}"


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match[1]), entry))
    return sorted(found)


def save_checkpoint(folder: str | Path, step: int, state: Any, keep_last: int = 2) -> Path:
    """Write the checkpoint of a step, then remove all but it and the newest others.

    Args:
        folder: the run's folder, created if need be.
        step: completed steps.
        state: nested dicts, lists, tuples, numbers, strings and tensors.
        keep_last: complete checkpoints to keep, the new one included.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: the state holds something else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = checkpoint_path(folder, step)
    temporary = folder / f"{_TEMPORARY}{step:08d}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        _write(temporary, step, state)
        if final.exists():  # a damaged one that resume passed over, or the same step again
            _remove(final)
        os.rename(temporary, final)
        sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    others = [path for _, path in list_checkpoints(folder) if path != final]
    for old in others[: max(0, len(others) - keep_last + 1)]:
        _remove(old)
    return final


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing counts, finds or prunes it."""
    for number in itertools.count():
        aside = path.with_name(f"damaged-{path.name}" + (f"-{number}" if number else ""))
        if not aside.exists():
            path.rename(aside)
            return aside
    raise AssertionError("unreachable")


def load_checkpoint(path: str | Path) -> tuple[int, Any]:
    """Read and verify one checkpoint.

    Returns:
        Its step, and the state with its tensors on the CPU.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or altered.
        OSError: a file cannot be read (no permission, a disk that is away): it may be whole.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise DamagedCheckpoint(f"format {manifest['format']} is not {_FORMAT}")
        for name in (_TENSORS, _STATE):
            if fingerprint(path / name) != manifest["files"][name]:
                raise DamagedCheckpoint(f"{name} does not match its checksum")
        tensors = load_file(path / _TENSORS)
        tree = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return int(manifest["step"]), decode(tree, tensors)
    except (*_NOT_THERE, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {error}") from error


def remove_leftovers(folder: str | Path) -> None:
    """Remove what a killed run left half written (or half pruned)."""
    folder = Path(folder)
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith(_TEMPORARY):
                shutil.rmtree(entry, ignore_errors=True)
            elif TEMPORARY.match(entry.name) and entry.is_file():
                entry.unlink(missing_ok=True)


def save_weights(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a flat dict of weights as safetensors, atomically."""
    flat: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        encode(tensor, flat, name)
    with atomic(path) as temporary:
        _save_file(flat, temporary)


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors, with the permissions of any new file (its own are for nobody else to read)."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(_unshared(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    path.chmod(mode)


def _write(folder: Path, step: int, state: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = encode(state, tensors)
    _save_file(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps(tree), encoding="utf-8")
    files = {name: fingerprint(folder / name) for name in (_TENSORS, _STATE)}
    manifest = {"format": _FORMAT, "step": step, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in (_TENSORS, _STATE, _MANIFEST):
        sync(folder / name)
    sync(folder)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors under a second name (tied weights), which safetensors would refuse."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        result[name] = tensor
    return result


def fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
    return {"bytes": size, "crc32": checksum}


def _remove(path: Path) -> None:
    """Take the name away first, so that a kill during the removal leaves no partial checkpoint."""
    hidden = path.with_name(f"{_TEMPORARY}old-{uuid.uuid4().hex[:8]}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
