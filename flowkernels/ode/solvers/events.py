"""Where an event function changes sign inside a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Tensor = torch.Tensor
MOST_BISECTIONS = 128


def find_event(
    inside: Callable[[Tensor], Tensor],
    sign0: Tensor,
    t0: Tensor,
    t1: Tensor,
    event: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Bisects until the bracket is within ``tolerance``: (time, state).

    The state is differentiable in the step that it lies in; the time is not (see
    ``odeint_event``).

    Args:
        inside: the state at a time of the step.
        sign0: of the event function at t0.
        t0, t1: 0-d, the step.
        event: of (time, state).
        tolerance: on the time.
    """
    with torch.no_grad():
        width = float(t1 - t0)
        halvings = math.log2(width / tolerance) if tolerance > 0 and width > 0 else math.inf
        for _ in range(min(max(0, math.ceil(min(halvings, MOST_BISECTIONS))), MOST_BISECTIONS)):
            middle = (t1 + t0) / 2.0
            if torch.sign(event(middle, inside(middle))) == sign0:
                t0 = middle
            else:
                t1 = middle
        found = (t0 + t1) / 2.0
    return found, inside(found)
