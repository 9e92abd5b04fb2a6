"""Tile sizes of the attention core, by chip, pass, head width and dtype.

Chosen ahead of time, by ptxas' registers and spills and by shared memory, so that two programs
share a multiprocessor where the tiles allow it. Not yet measured on a device.

Warps specialised by ``tl.range(..., warp_specialize=True)`` are not used: for Hopper, Triton 3.6.0
and 3.7.1 give the forward loop PTX of the same length, with no register hand-over, with it as
without, and for Blackwell they do not compile the loop of dq with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """M queries by N keys at a time.

    ``registers`` of a thread: left to itself (None) ptxas may aim at fewer than a tile needs, to
    let more programs in, and spill.
    """

    M: int
    N: int
    warps: int
    stages: int
    registers: int | None = None


FORWARD, KEYS, QUERIES = "forward", "backward_keys", "backward_queries"

# Queries and keys come in multiples of every M and N here: the padding of the statistics.
LARGEST_TILE = 128

# The chip whose tiles serve wherever tensors are read through pointers.
POINTERS = 80

# By (chip, bytes of an element): pass → head width → tiles. A width takes the next entry above.
# Chip 80 stands for every chip without an entry, and for any chip that reads through pointers: it
# stays within the 99 KiB of shared memory that the smallest of them have.
_TABLE: dict[tuple[int, int], dict[str, dict[int, Tiles]]] = {
    (80, 2): {
        FORWARD: {
            64: Tiles(128, 64, 4, 3, 255),
            128: Tiles(128, 32, 4, 2, 255),
            256: Tiles(64, 32, 4, 2, 255),
        },
        KEYS: {
            64: Tiles(64, 128, 8, 2, 255),
            128: Tiles(64, 64, 8, 2, 255),
            256: Tiles(32, 32, 8, 1, 255),
        },
        QUERIES: {
            32: Tiles(128, 64, 8, 2),
            128: Tiles(64, 64, 4, 2, 255),
            256: Tiles(32, 32, 8, 2, 255),
        },
    },
    (80, 4): {
        FORWARD: {
            64: Tiles(64, 32, 8, 1, 255),
            128: Tiles(32, 32, 8, 1, 255),
            256: Tiles(32, 16, 8, 1, 255),
        },
        KEYS: {
            64: Tiles(32, 64, 8, 1, 255),
            128: Tiles(32, 32, 8, 1, 255),
            256: Tiles(16, 16, 4, 1, 255),
        },
        QUERIES: {
            64: Tiles(32, 32, 4, 1, 255),
            128: Tiles(32, 16, 4, 1, 255),
            256: Tiles(32, 16, 8, 1, 255),
        },
    },
    (90, 2): {
        FORWARD: {
            64: Tiles(128, 64, 8, 4, 128),
            128: Tiles(128, 128, 8, 2, 255),
            256: Tiles(128, 32, 8, 3, 255),
        },
        KEYS: {
            128: Tiles(64, 128, 8, 2, 255),
            256: Tiles(32, 64, 8, 2, 255),
        },
        QUERIES: {
            64: Tiles(128, 64, 8, 2, 128),
            128: Tiles(128, 64, 8, 2, 255),
            256: Tiles(64, 32, 8, 2, 255),
        },
    },
    (100, 2): {
        FORWARD: {
            64: Tiles(128, 64, 8, 4, 128),
            128: Tiles(128, 128, 8, 2, 255),
            256: Tiles(128, 32, 8, 2, 255),
        },
        KEYS: {
            128: Tiles(64, 128, 8, 2, 255),
            256: Tiles(64, 64, 8, 1, 255),
        },
        QUERIES: {
            128: Tiles(128, 64, 8, 2, 255),
            256: Tiles(64, 64, 8, 1, 255),
        },
    },
}
_CHIPS = {80: 80, 90: 90, 100: 100, 103: 100}


def chip_of(capability: int) -> int:
    """The table's chip for a compute capability 10·major + minor."""
    return _CHIPS.get(capability, 80)


def reads_by_tma(capability: int) -> bool:
    return chip_of(capability) >= 90


def tiles_for(which: str, columns: int, dtype: torch.dtype, capability: int) -> Tiles:
    """The tiles of one pass for heads of ``columns`` (a power of two, at most 256)."""
    size = dtype.itemsize
    chip = chip_of(capability)
    table = _TABLE[chip if (chip, size) in _TABLE else 80, size][which]
    return table[next(width for width in sorted(table) if columns <= width)]
