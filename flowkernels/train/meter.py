"""Losses, kept on the device until somebody looks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LossMeter:
    """Means of named losses between two log points, and how often each was not finite.

    `add` only keeps the tensors; `read` waits for the device, once for all of them.

    Example:
        >>> meter = LossMeter()
        >>> meter.add({"flow": torch.tensor(1.0)})
        >>> meter.add({"flow": torch.tensor(float("nan"))})
        >>> meter.add({"flow": torch.tensor(2.0)})
        >>> meter.means(), meter.nonfinite
        ({'flow': 1.5}, {'flow': 1})
    """

    def __init__(self) -> None:
        self.nonfinite: dict[str, int] = {}
        self._pending: list[tuple[str, Tensor]] = []
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Note the scalars of one backward pass; nothing is read."""
        self._pending += [(name, loss.detach()) for name, loss in losses.items()]

    def read(self) -> None:
        """Bring the noted scalars to the host: one wait."""
        if not self._pending:
            return
        values = torch.stack([loss.to(torch.float32) for _, loss in self._pending]).tolist()
        for (name, _), value in zip(self._pending, values, strict=True):
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value, count + 1
            else:
                self.nonfinite[name] = self.nonfinite.get(name, 0) + 1
        self._pending.clear()

    def means(self) -> dict[str, float]:
        """Means of the finite values since the last call."""
        self.read()
        result = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The counts of non-finite values; means need not survive."""
        self.read()
        return {"nonfinite": dict(self.nonfinite)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts."""
        self.nonfinite = dict(state["nonfinite"])
        self._pending.clear()
        self._sums.clear()
