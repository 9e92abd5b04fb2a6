"""What every ``autograd.Function`` of the package shares: apply, second order, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from flowkernels.ops._validate import kernels_read

Tensor = torch.Tensor


class FusedFunction(torch.autograd.Function):
    """A forward and a backward operator, run through :func:`apply`.

    It defines no ``jvp``: torch.compile would not trace it. Forward mode is refused in ``apply``.
    """


_TRANSFORM_ERROR = (
    "fused kernels serve reverse-mode autograd; for torch.func and forward-mode differentiation "
    'call inside flowkernels.backend("reference")'
)


def in_forward_mode() -> bool:
    """Inside ``torch.autograd.forward_ad.dual_level()``: a tensor may have a tangent."""
    return forward_ad._current_level >= 0


def transforms_tensors() -> bool:
    """Inside ``torch.func`` or forward mode, whose tensors carry what no kernel sees."""
    if torch.compiler.is_compiling():
        return False
    return in_forward_mode() or torch._C._are_functorch_transforms_active()


def refuse_transforms(args: tuple[Any, ...]) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_TRANSFORM_ERROR)
    if in_forward_mode() and any(
        isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
    ):
        raise RuntimeError(_TRANSFORM_ERROR)


class _NoGraph:
    """Stands in for ``ctx`` where nothing records a graph: nothing is saved."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[FusedFunction], *args: Any) -> Any:
    """``function.apply``, with a clear error where a torch.func transform is active.

    Where no gradient can be asked for, the forward pass is called outright: ``apply`` costs more
    host time than the operator itself.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return record(function, *args)
    refuse_transforms(args)
    return function.forward(_NoGraph(), *args)


def record(function: type[FusedFunction], *args: Any) -> Any:
    """:func:`apply` where a gradient is known to be asked for."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    refuse_transforms(args)
    # Past `autograd.Function.apply`, which looks for the very transforms that are refused here.
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _distinct(args: Sequence[Any]) -> list[Any]:
    """``args`` with a view in place of a tensor's second mention, which torch.compile refuses."""
    found: list[Any] = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is other for other in found)
        found.append(arg.view_as(arg) if again else arg)
    return found


def outside_autocast(tensors: Iterable[Any]) -> AbstractContextManager[Any]:
    """Autocast off for the tensors' device, where it has one (meta tensors have none)."""
    kind = next((x.device.type for x in tensors if isinstance(x, Tensor)), "meta")
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


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
    # Autocast would take the products of the formula's own backward pass in a narrower dtype.
    with torch.enable_grad(), outside_autocast(inputs):
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


def written(tensors: Iterable[Tensor]) -> None:
    """Tell autograd that an operator wrote in place, as torch's own do: a backward pass that has
    saved one of ``tensors`` then fails instead of reading what it did not save.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(
            [tensor for tensor in tensors if not tensor.is_inference()]
        )


def mask_of(needed: Sequence[bool]) -> int:
    """The bits of ``needed``, first one lowest: how backward operators are told what to write."""
    mask, bit = 0, 1
    for need in needed:
        if need:
            mask |= bit
        bit <<= 1
    return mask


def scatter(found: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the order asked for, back in the order of the inputs."""
    if len(found) == len(needed):
        return list(found)
    remaining = iter(found)
    return [next(remaining) if need else None for need in needed]


def readable(grad: Tensor) -> Tensor:
    """A gradient that the kernels can read in place (``sum()`` hands out one of stride 0).

    Cloned, not made ``contiguous()``: that leaves an empty gradient's strides as they are.
    """
    return grad if kernels_read(grad) else grad.clone(memory_format=torch.contiguous_format)
