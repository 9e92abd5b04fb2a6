"""What AdamWEMA and EMA share: averages as a model's state_dict, and as the model's own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Tensor = torch.Tensor


def averaged_state_dict(model: torch.nn.Module, averages: Mapping[int, Tensor]) -> dict[str, Any]:
    """``model.state_dict()`` with averages in place of parameters, in the parameters' dtype.

    Args:
        model: Any module.
        averages: From ``id(parameter)`` to its average.

    Returns:
        A new state_dict. Averages are copies, so training on does not change them; one that
        several names share is one tensor, as in the model. Everything else (buffers, parameters
        that have no average) is what ``model.state_dict()`` holds.
    """
    state = model.state_dict(keep_vars=True)  # the very parameters: found by identity
    made: dict[int, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        average = averages.get(id(value))
        if average is None:
            state[name] = value.detach()
            continue
        if id(value) not in made:
            made[id(value)] = torch.empty_like(value, requires_grad=False).copy_(average.detach())
        state[name] = made[id(value)]
    return state


class Swap:
    """Averages stand in for the weights until this is left as a context manager."""

    def __init__(self, swap_back: Callable[[], object]) -> None:
        self._swap_back = swap_back

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *_: object) -> None:
        self._swap_back()


class Swapper:
    """Exchanges weights and averages, bit for bit there and back.

    The weights are kept aside while an average stands in for them: an average in float32 would not
    survive a visit to a bfloat16 parameter.
    """

    def __init__(self) -> None:
        self.active: int | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def exchange(self, index: int, pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Swap in average ``index``, or out where it is in; ``pairs`` gives (weight, average)."""
        if self.active is None:
            for weight, average in pairs():
                self._kept.append((weight, weight.detach().clone()))
                weight.copy_(average)
            self.active = index
        elif self.active == index:
            for weight, original in self._kept:
                weight.copy_(original)
            self._kept.clear()
            self.active = None
        else:
            raise RuntimeError(
                f"swap: average {self.active} stands in for the weights, "
                f"swap it back before average {index}"
            )

    def forbid(self, action: str) -> None:
        """RuntimeError where an average stands in for the weights."""
        if self.active is not None:
            raise RuntimeError(
                f"{action}: average {self.active} stands in for the weights, swap it back first"
            )


def check_index(index: Any, count: int) -> int:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise IndexError(f"i: got {index!r}, need the index of one of {count} averages")
    return index
