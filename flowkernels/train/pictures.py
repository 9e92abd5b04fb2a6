"""Grids of images as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from flowkernels.train.files import atomic


def tile(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """Lay images out row by row.

    Args:
        images: [n, C, H, W] in [-1, 1], C = 1 or 3; values beyond are clipped, NaN is black.
        columns: images per row.
        gap: pixels between images.

    Returns:
        uint8 [height, width, 3]; the ground is mid-grey.
    """
    count, _, height, width = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full(shape, 128, dtype=np.uint8)
    levels = (
        ((images.detach().float().nan_to_num(-1).clamp(-1, 1) + 1) * 127.5).round().cpu().numpy()
    )
    pixels = np.broadcast_to(levels.transpose(0, 2, 3, 1), (count, height, width, 3))
    for i in range(count):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = pixels[i]
    return canvas


def save_grid(path: str | Path, images: Tensor, columns: int) -> np.ndarray:
    """Write a PNG of `tile(images, columns)`, small images enlarged; return the unenlarged grid."""
    canvas = tile(images, columns)
    picture = Image.fromarray(canvas)
    scale = max(1, 48 // images.shape[-1])
    if scale > 1:
        size = (picture.width * scale, picture.height * scale)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")
    return canvas
