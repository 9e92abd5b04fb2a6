"""Low-rank adapters (LoRA) as parametrisations of the weights they adapt.

An adapter that wraps the layer (as peft's do) is passed by wherever a block reads `linear.weight`
itself to fuse what comes after the product. Here the weight itself is `W + scale·up·down`, whoever
reads it.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """`W + (alpha/rank)·up·down`: up [out, rank], zero at first, and down [rank, in].

    Args:
        weight: the weight W to adapt, [out, in].
        rank: of the update.
        alpha: its scale, times the rank.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, in_features))
        self.up = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def adapt(network: nn.Module, rank: int, alpha: float | None = None) -> nn.Module:
    """Freezes a network and gives every linear layer of it a trainable low-rank update, in place.

    Args:
        network: what to adapt.
        rank: of each update.
        alpha: scale of the update times the rank; the rank itself where left out.

    Raises:
        ValueError: no linear layer, or a rank below 1.

    Example:
        >>> network = adapt(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> sorted(name for name, p in network.named_parameters() if p.requires_grad)
        ['0.parametrizations.weight.0.down', '0.parametrizations.weight.0.up']

    Source: arXiv 2106.09685.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"lora_rank is {rank!r}; it must be None or an int of at least 1")
    linears = [module for module in network.modules() if type(module) is nn.Linear]
    if not linears:
        raise ValueError("lora_rank needs linear layers, and the student has none")
    network.requires_grad_(False)
    for linear in linears:
        update = LowRank(linear.weight, rank, rank if alpha is None else alpha)
        parametrize.register_parametrization(linear, "weight", update)
    return network


def merged(network: nn.Module) -> nn.Module:
    """A copy with every update added to its weight: plain layers under plain names."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if parametrize.is_parametrized(child, "weight"):
                setattr(parent, name, _plain(child))
    return network


def _plain(linear: nn.Module) -> nn.Linear:
    """A linear layer of the same product.

    Not `remove_parametrizations`: a copy shares its class with the original, and that takes the
    weight off the class.
    """
    assert isinstance(linear, nn.Linear)
    has_bias = linear.bias is not None
    plain = nn.Linear(linear.in_features, linear.out_features, bias=has_bias, device="meta")
    plain.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    plain.bias = linear.bias
    return plain.train(linear.training)
