"""Weights of networks that are trained in small steps, and averages of them that run."""

from __future__ import annotations

import torch
from torch import nn

from flowkernels.distill.method import trainable
from flowkernels.ops.multi_tensor import ema_


def with_master_weights(network: nn.Module | None, teacher: nn.Module, name: str) -> nn.Module:
    """The network given, or a copy of the teacher, with weights of 32 bits or more.

    Raises:
        ValueError: the network given is the teacher, has nothing to train, or trains weights of
            16 bits; names the argument.
    """
    chosen = trainable(network, teacher, name)
    if network is None:
        return chosen.float() if _short(chosen) else chosen
    check_master_weights(chosen, name)
    return chosen


def check_master_weights(network: nn.Module, name: str) -> None:
    """Raise ValueError where trained weights have 16 bits.

    A bfloat16 weight has 8 of them for its digits: an update of less than 1/512 of it, as a
    learning rate of 1e-5 makes them, rounds to nothing, every time.
    """
    if short := _short(network):
        raise ValueError(
            f"{name} has weights in {', '.join(short)}, in which small updates round to nothing; "
            "it needs float32 weights (train it under autocast)"
        )


@torch.no_grad()
def move_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """`average = lerp(average, network, 1 - decay)`, all trained weights in one sweep.

    Args:
        average: a copy of the network, with weights of 32 bits or more; buffers become the
            network's own.
        network: what is averaged.
        decay: in [0, 1).
    """
    pairs = zip(network.parameters(), average.parameters(), strict=True)
    moving = [(now.detach(), kept) for now, kept in pairs if now.requires_grad]
    ema_([now for now, _ in moving], [kept for _, kept in moving], (decay,))
    for now, kept in zip(network.buffers(), average.buffers(), strict=True):
        kept.copy_(now)


def _short(network: nn.Module) -> list[str]:
    """Names of the dtypes of less than 32 bits among the trained weights."""
    trained = (parameter for parameter in network.parameters() if parameter.requires_grad)
    return sorted({str(each.dtype) for each in trained if each.dtype.itemsize < 4})
