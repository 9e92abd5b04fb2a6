"""Runge–Kutta on the grid of the output times, for torch.compile: nothing depends on a number.

The loop unrolls into the caller's graph, where the stage sums fuse with what is around them. A grid
of its own (``step_size``), a controlled step, an event or a callback needs numbers on the host:
those solves stay one call outside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowkernels.ode.solvers.problem import CALLBACKS, Problem
from flowkernels.ode.solvers.stages import Sums
from flowkernels.ode.tableaus import FIXED, Tableau

Tensor = torch.Tensor

MOST_CALLS = 256
"""Of the right-hand side in one graph: what compiling takes grows with them."""


def is_traceable(
    func: Callable[..., Any], t: Any, method: str | None, options: dict[str, Any] | None, event: Any
) -> bool:
    """Whether the solve unrolls into a graph."""
    tableau = FIXED.get(method or "")
    if tableau is None or options or event is not None or not isinstance(t, Tensor):
        return False
    if t.dim() != 1 or len(t) == 0 or any(hasattr(func, name) for name in CALLBACKS):
        return False
    return (len(t) - 1) * len(tableau.solution) <= MOST_CALLS


def trace(problem: Problem) -> Tensor:
    """The states at the output times, stacked; the problem's time is the caller's, either way."""
    tableau, t, y = FIXED[problem.method], problem.t, problem.y0
    sums = Sums(problem)
    sums.kernels = False  # the compiler's own sums fuse with the right-hand side's operators
    steps = t[1:] - t[:-1]
    columns = [t[1:] if c == 1.0 else t[:-1] + steps * c for c in (0.0, *tableau.nodes)]
    times = torch.stack(columns, 1).to(problem.time_dtype)
    states = [y]
    for index in range(len(t) - 1):
        y = _step(problem, sums, tableau, times[index].unbind(0), y, steps[index])
        states.append(y)
    return torch.stack(states)


def _step(
    problem: Problem, sums: Sums, tableau: Tableau, times: Sequence[Tensor], y: Tensor, dt: Tensor
) -> Tensor:
    ks = [problem.slope(times[0], y)]
    for row, time in zip(tableau.rows, times[1:], strict=True):
        ks.append(problem.slope(time, sums.combine(y, ks, row, dt)))
    return sums.combine(y, ks, tableau.solution, dt)
