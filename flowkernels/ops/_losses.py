"""What every loss has in common: how sums over samples become a loss, and gradients that are born
in the forward pass.

The forward operator writes the gradients for grad_output = 1 while it reads the operands: one
pass over memory. What grad_output is, only the backward pass knows, and only on the device.

First backward. On CPU a grad_output of 1, which ``loss.backward()`` gives, is seen by a look into
its memory, and the stored gradients are handed out. Else they go through ``rescale_``, which
returns at once where grad_output is 1 and computes them again into the same memory where it is
not: a product with the stored, already rounded gradient would round a second time. Autograd owns
them from here on.
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

import ctypes
import math
from collections.abc import Sequence
from typing import Any

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


def taken(ctx: Any) -> list[Tensor]:
    """The stored gradients, once: none where there are none, or where they have been handed out.

    They are kept beside ``saved_tensors``, which lives as long as the loss: what has been handed
    out is not held on to.
    """
    gradients: list[Tensor] = ctx.gradients
    ctx.gradients = []
    return gradients


def ready(ctx: Any, grad_output: Tensor) -> list[Tensor]:
    """The stored gradients where they are right as they stand, by a look that costs no operator."""
    if ctx.gradients and not torch.is_grad_enabled() and _is_one(grad_output):
        return taken(ctx)
    return []


def _is_one(x: Tensor) -> bool:
    """Whether ``x`` is a 0-d float32 1 on the CPU; its memory is read where it lies.

    ``item()`` would be as fast; a step is held never to call it, for the sake of devices.
    """
    if type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32 or x.dim():
        return False
    address = x.data_ptr()  # 0 where there is no memory: a number known to be zero
    return address != 0 and ctypes.c_float.from_address(address).value == 1.0
