"""What every ``autograd.Function`` of the package shares: apply, second order, checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor


class FusedFunction(torch.autograd.Function):
    """A forward and a backward operator; forward-mode and functorch get a clear error."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_TRANSFORM_ERROR)


_TRANSFORM_ERROR = (
    "fused kernels serve reverse-mode autograd; for torch.func and forward-mode differentiation "
    'call inside flowkernels.backend("reference")'
)


def apply(function: type[FusedFunction], *args: Any) -> Any:
    """``function.apply`` with a clear error where a torch.func transform is active."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(_TRANSFORM_ERROR)
    return function.apply(*args)


def reference_gradients(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiable gradients of ``formula(*inputs)``, for a backward under ``create_graph``.

    Inputs are taken through views, so each has a gradient of its own even where one tensor was
    passed twice.
    """
    with torch.enable_grad():
        taken = [None if x is None else x.view_as(x) for x in inputs]
        outputs = formula(*taken)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grad_outputs, strict=True)
            if grad is not None and out is not None and out.requires_grad
        ]
        wanted = [x for x, need in zip(taken, needed, strict=True) if x is not None and need]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
            if pairs and wanted
            else [None] * len(wanted)
        )
    return [
        next(found) if x is not None and need else None
        for x, need in zip(taken, needed, strict=True)
    ]


def mask_of(needed: Sequence[bool]) -> int:
    """The bits of ``needed``, first one lowest: how backward operators are told what to write."""
    return sum(1 << i for i, need in enumerate(needed) if need)


def scatter(found: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the order asked for, back in the order of the inputs."""
    remaining = iter(found)
    return [next(remaining) if need else None for need in needed]
