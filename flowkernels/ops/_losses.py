"""What every loss has in common: how sums over samples become a loss, and gradients that are born
in the forward pass.

The forward operator writes the gradients for grad_output = 1 while it reads the operands: one
pass over memory. What grad_output is, only the backward pass knows, and only on the device.

First backward. The stored gradients go through ``rescale_``, which returns at once where
grad_output is 1, as ``loss.backward()`` has it, and computes them again into the same memory where
it is not: a product with the stored, already rounded gradient would round a second time. (The node
in C++ sees a 1 in the host's memory for itself.) Autograd owns them from here on.
Second backward (``retain_graph``). The buffers may be somebody's ``.grad`` by now, and rescaling
them by the ratio of two grad_outputs would alter what the first backward gave. So the gradients
are computed anew.
float16. 2·(v - w)/(n·B) underflows before a GradScaler's factor arrives, so float16 gradients are
never stored for grad_output = 1: every backward computes them.
torch.compile. Nothing is stored: a graph cannot skip the rescaling, which would cost what
computing them in the backward pass does.
``create_graph``. The reference formula is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flowkernels.ops._samples import REDUCTIONS

Tensor = torch.Tensor

NONE, SUM = REDUCTIONS.index("none"), REDUCTIONS.index("sum")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that the operands and float32 promote to: that of arithmetic and result."""
    result = torch.float32
    for tensor in tensors:
        if tensor is not None:
            result = torch.promote_types(result, tensor.dtype)
    return result


def flat(x: Tensor) -> Tensor:
    """A tensor [B, ...] as [B, elements]; `flatten` knows the elements of an empty batch."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def reduce(sums: Tensor, weight: Tensor | None, like: Tensor, reduction: str) -> Tensor:
    """Sums over the elements of each sample, [B], to the loss of samples shaped as ``like``."""
    if weight is not None:
        sums = sums * weight.to(sums.dtype)
    if reduction == "sum":
        return sums.sum()
    losses = sums / math.prod(like.shape[1:])
    return losses if reduction == "none" else losses.sum() / like.shape[0]


def loss_like(x: Tensor, reduction: int) -> Tensor:
    """An empty loss of samples like ``x``: [B], or 0-d."""
    return x.new_empty(x.shape[:1] if reduction == NONE else (), dtype=torch.float32)


def gradients_like(wanted: int, *operands: Tensor | None) -> list[Tensor]:
    """Empty contiguous gradients for the operands whose bit is set."""
    return [
        operand.new_empty(operand.shape)
        for bit, operand in enumerate(operands)
        if operand is not None and wanted >> bit & 1
    ]


def needs_grad(constant: Tensor | None) -> bool:
    """An operand that kernels have no gradient for asks for one: the reference path has it."""
    return constant is not None and constant.requires_grad and torch.is_grad_enabled()


def stores(operands: Sequence[Tensor | None], needed: Sequence[bool]) -> bool:
    """Whether the forward pass computes the gradients that are asked for."""
    if torch.compiler.is_compiling():
        return False
    for operand, need in zip(operands, needed, strict=True):
        if need and operand is not None and operand.dtype == torch.float16:
            return False
    return True
