"""A folder of pictures, one sub-folder per class, decoded when asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowkernels.train.errors import DataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def expanded(path: str | Path) -> Path:
    """`~` as a home folder.

    Raises:
        DataError: of somebody who has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {error}") from None


def _is_picture(name: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and path.suffix.lower() in _SUFFIXES and path.is_file()


def _of_bytes(image: Image.Image, path: Path) -> Image.Image:
    """With eight bits a channel; `convert` would clip wider ones to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"{path}: mode {image.mode} of 32 bits, needs 8 or 16 bits a channel")
    return image


class FolderDataset:
    """Pictures under `root/<class>/…`, upright, centre-cropped to a square and resized.

    Sixteen bits a channel are rounded down to eight; transparency is left out, as `convert` does.
    Names that begin with a dot are passed over.

    Args:
        root: folder whose sub-folders, in alphabetical order, are the classes.
        image_size: side of the result in pixels.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: no such folder, no classes, or a class without pictures; later, in `images`, a
            picture that cannot be decoded.
    """

    def __init__(self, root: str | Path, image_size: int, channels: int = 3) -> None:
        root = expanded(root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        folders = sorted(
            entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        if not folders:
            raise DataError(f"{root}: no sub-folders; needs one per class")
        self.shape = (channels, image_size, image_size)
        self.classes = tuple(folder.name for folder in folders)
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            pictures = sorted(p for p in folder.rglob("*") if _is_picture(p.relative_to(folder), p))
            if not pictures:
                raise DataError(f"{folder}: no pictures of a known kind in this class")
            self.paths += pictures
            labels += [label] * len(pictures)
        self._labels = torch.tensor(labels, dtype=torch.int64)
        self._pool = ThreadPoolExecutor(thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> Tensor:
        """Class of every picture, [N] int64."""
        return self._labels

    def images(self, indices: Tensor) -> Tensor:
        """Images [n, C, H, W], float32 in [-1, 1]; decoded by several threads."""
        decoded = self._pool.map(self._decode, (self.paths[i] for i in indices.tolist()))
        levels = torch.from_numpy(np.stack(list(decoded)))
        return levels.to(torch.float32) * (2.0 / 255.0) - 1.0

    def _decode(self, path: Path) -> np.ndarray:
        channels, side, _ = self.shape
        try:
            with Image.open(path) as picture:
                image = _of_bytes(ImageOps.exif_transpose(picture), path)
                image = image.convert("RGB" if channels == 3 else "L")
        except DataError:
            raise
        # A decompression bomb and a broken header raise errors of several families.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be decoded as a picture: {reason}") from error
        width, height = image.size
        crop = min(width, height)
        left, top = (width - crop) // 2, (height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
        image = image.resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(image, dtype=np.uint8).reshape(side, side, channels).transpose(2, 0, 1)
