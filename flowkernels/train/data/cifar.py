"""CIFAR-10's python archive, read through an unpickler that can build data and nothing else."""

from __future__ import annotations

import io
import operator
import pickle
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flowkernels.train.data.dataset import TensorDataset
from flowkernels.train.data.folder import expanded
from flowkernels.train.errors import DataError

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = ("test_batch",)
_PARTS = {"train": _TRAIN, "test": _TEST, "all": _TRAIN + _TEST}
# A genuine part has 31 MB; a member that claims far more is a bomb, not data.
_MAXIMUM_BYTES = 1 << 28


class _DType:
    """Stands in for numpy.dtype: keeps the name, runs nothing."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _: Any) -> None:
        """Byte order and the like: a byte has none."""


class _Array:
    """Stands in for numpy.ndarray: keeps the raw bytes and checks them before numpy sees them."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, raw = state
        plain = isinstance(raw, bytes) and isinstance(dtype, _DType) and not fortran_order
        if not plain or dtype.name not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError("an array that is not of plain bytes")
        self.value = np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for _codecs.encode, by which Python 3 pickles bytes in protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


class RestrictedUnpickler(pickle.Unpickler):
    """Loads dicts, lists, numbers, strings, bytes and uint8 arrays; refuses every other name.

    No function named by the file is ever called: the few that a genuine archive names are replaced
    by the stand-ins above.
    """

    _STAND_INS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an allowed name; any other raises UnpicklingError."""
        try:
            return self._STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not data") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refused: an archive has no outside references."""
        raise pickle.UnpicklingError("it refers to an object outside itself")


def load_cifar10(path: str | Path, split: str = "train") -> TensorDataset:
    """CIFAR-10 from `cifar-10-python.tar.gz` or from the folder it extracts to.

    Args:
        path: the archive, the folder `cifar-10-batches-py`, or the folder that contains it.
        split: "train" (50,000), "test" (10,000) or "all".

    Raises:
        DataError: a file is missing, damaged, or holds anything but arrays; one line that names it.
    """
    path = expanded(path)
    if path.is_dir():
        parts = _read_folder(path, _PARTS[split])
    elif path.is_file():
        parts = _read_archive(path, _PARTS[split])
    else:
        raise DataError(f"{path}: no such CIFAR-10 archive or folder")
    images, labels = zip(*(_parse(raw, origin) for origin, raw in parts), strict=True)
    levels = torch.from_numpy(np.concatenate(images))
    return TensorDataset(levels, torch.from_numpy(np.concatenate(labels)), CLASSES)


def _read_folder(folder: Path, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    parts = []
    for name in names:
        file = folder / name
        try:
            parts.append((str(file), file.read_bytes()))
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    return parts


def _read_archive(archive: Path, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """The members in memory: nothing is extracted, so no member can write anywhere."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = Path(member.name).name
                if name not in names or not member.isfile():
                    continue
                if member.size > _MAXIMUM_BYTES:
                    raise DataError(f"{archive}: {name} claims {member.size} bytes")
                file = tar.extractfile(member)
                assert file is not None
                found[name] = file.read()
    # zlib.error and EOFError come out of a damaged gzip stream.
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{archive}: not a readable tar archive: {reason}") from error
    for name in names:
        if name not in found:
            raise DataError(f"{archive}: {name} is missing from the archive")
    return [(f"{archive}: {name}", found[name]) for name in names]


def _parse(raw: bytes, origin: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
        content = {_text(key): value for key, value in content.items()}
        pixels = content["data"].value
        labels = np.asarray([operator.index(label) for label in content["labels"]], dtype=np.int64)
        images = pixels.reshape(-1, 3, 32, 32)
    # The machine of a pickle raises nearly any error on damaged bytes.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{origin}: not a CIFAR-10 part: {reason}") from error
    problem = ""
    if len(images) != len(labels):
        problem = f"{len(images)} images, {len(labels)} labels"
    elif not len(images):
        problem = "no images"
    elif not 0 <= labels.min() <= labels.max() < len(CLASSES):
        problem = f"labels from {labels.min()} to {labels.max()}, needs 0 to {len(CLASSES) - 1}"
    if problem:
        raise DataError(f"{origin}: not a CIFAR-10 part: {problem}")
    return images, labels


def _text(key: bytes | str) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else key
