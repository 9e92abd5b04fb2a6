"""Lists of tensors that one sweep can take, gathered anew in each step.

Nothing is cached across steps: gradients change identity in each, and state tensors may be
exchanged by whoever holds ``optimizer.state`` (to offload them, say). Lists are built by
comprehensions; only where something is not plain are parameters looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from flowkernels.ops._library import KERNEL_DTYPES
from flowkernels.ops.multi_tensor._layout import same_layout, walkable

Tensor = torch.Tensor
State = dict[str, Any]


@dataclass
class Batch:
    """Parameters that share a device, a backend and whether they have a low-precision copy."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    copies: list[Tensor]
    served: bool

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def states_of(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]

    def averages_of(self, keys: list[str]) -> list[Tensor]:
        return [state[key] for key in keys for state in self.states]


@dataclass
class Gathered:
    """The parameters of one group: with a gradient in this step, and without."""

    batches: list[Batch] = field(default_factory=list)
    idle: list[Tensor] = field(default_factory=list)


def gather(
    group: dict[str, Any],
    copies: dict[Tensor, Tensor],
    states_of: Callable[[list[Tensor], dict[str, Any]], list[State]],
) -> Gathered:
    """Sort a group's parameters by whether they have a gradient, and those that do into batches.

    ``states_of(params, group)`` gives their state, made where it is missing.
    """
    result = Gathered()
    params: list[Tensor] = group["params"]
    grads = [param.grad for param in params]
    if copies:
        grads = [_gradient(p, g, copies.get(p)) for p, g in zip(params, grads, strict=True)]
    present = [grad for grad in grads if grad is not None]
    if not present:
        result.idle = params
        return result
    if len(present) != len(params):
        result.idle = [p for p, g in zip(params, grads, strict=True) if g is None]
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
    kinds = {(p.device, p.dtype, g.dtype, g.layout) for p, g in zip(params, present, strict=True)}
    for _, _, dtype, layout in kinds:
        if layout is not torch.strided:
            raise RuntimeError(f"grad: got layout {layout}, need strided (sparse is not supported)")
        if dtype.is_complex:
            raise TypeError(f"grad: got dtype {dtype}, need real floating point")
    states = states_of(params, group)
    found = [copies[param] for param in params if param in copies] if copies else []
    if _plain(kinds, params, present, states, found):
        result.batches = [Batch(params, present, states, found, True)]
    else:
        result.batches = _partition(params, present, states, copies)
    return result


def _gradient(param: Tensor, grad: Tensor | None, copy: Tensor | None) -> Tensor | None:
    """A master's gradient is its copy's where it has none: the copy is what the model runs with."""
    return copy.grad if grad is None and copy is not None else grad


def _plain(
    kinds: set[Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    copies: list[Tensor],
) -> bool:
    """The usual case: one device, dtypes that the kernels read, everything contiguous."""
    served = all(p in KERNEL_DTYPES and g in KERNEL_DTYPES for _, p, g, _ in kinds)
    return (
        served
        and len({kind[0] for kind in kinds}) == 1
        and all(param.is_contiguous() for param in params)
        and all(grad.is_contiguous() for grad in grads)
        and all(state["exp_avg_sq"].is_contiguous() for state in states)
        and (not copies or len(copies) == len(params))
        and all(copy.is_contiguous() and copy.dtype in KERNEL_DTYPES for copy in copies)
    )


def _partition(
    params: list[Tensor], grads: list[Tensor], states: list[State], copies: dict[Tensor, Tensor]
) -> list[Batch]:
    batches: dict[Any, Batch] = {}
    for param, grad, state in zip(params, grads, states, strict=True):
        copy = copies.get(param)
        kept = [value for key, value in state.items() if key != "step"]
        if copy is not None:
            kept.append(copy)
        served = walkable(param, *kept) and grad.dtype in KERNEL_DTYPES
        if served and not same_layout(grad, param):
            # One small copy, so that one odd gradient does not send its parameter off the kernels.
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        key = (param.device, served, copy is None)
        batch = batches.setdefault(key, Batch([], [], [], [], served))
        batch.params.append(param)
        batch.grads.append(grad)
        batch.states.append(state)
        if copy is not None:
            batch.copies.append(copy)
    return list(batches.values())
