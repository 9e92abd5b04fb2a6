"""What `compile: true` compiles."""

from __future__ import annotations

from torch import nn


def compile_blocks(network: nn.Module) -> None:
    """torch.compile each block (member of a `ModuleList` child), or the network if it has none.

    Blocks are alike, so one compilation serves them all; names in the state stay as they are.
    """
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    # A list of plain layers (one linear per block, say) is not worth a compilation each.
    blocks = [block for blocks in lists for block in blocks if any(True for _ in block.children())]
    for block in blocks or [network]:
        block.compile(dynamic=False)
