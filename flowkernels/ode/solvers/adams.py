"""Adams methods of a uniform grid: explicit (Bashforth), and corrected (Bashforth–Moulton).

With the slopes f₀ (now), f₁, … of the last steps, the integral of their interpolating polynomial
over the next step gives the weights: exact fractions, computed here. The first steps are taken by
the 3/8 rule.
"""

from __future__ import annotations

import warnings
from collections import deque
from fractions import Fraction
from functools import cache
from typing import Any

import torch

from flowkernels.ode.solvers.problem import Problem, require
from flowkernels.ode.solvers.stages import Sums, runge_kutta
from flowkernels.ode.tableaus import RK4

Tensor = torch.Tensor

LEAST_ORDER, MOST_ORDER, MOST_ITERATIONS = 4, 12, 4


@cache
def adams_weights(points: tuple[int, ...]) -> tuple[float, ...]:
    """∫₀¹ of each Lagrange polynomial through ``points`` (in steps, 0 is now, 1 the step's end)."""
    weights = []
    for i in points:
        polynomial = [Fraction(1)]  # coefficients, lowest power first
        for j in points:
            if j != i:
                scale = Fraction(1, i - j)
                polynomial = [
                    scale * (low - j * high)
                    for low, high in zip([Fraction(0), *polynomial], [*polynomial, Fraction(0)],
                                         strict=True)
                ]  # fmt: skip
        weights.append(float(sum(c / (power + 1) for power, c in enumerate(polynomial))))
    return tuple(weights)


class Adams:
    """The predictor, and with ``implicit`` its corrector, iterated to the tolerances."""

    nodes = RK4.nodes

    def __init__(
        self, problem: Problem, sums: Sums, options: dict[str, Any], *, implicit: bool
    ) -> None:
        self.name = "AdamsBashforthMoulton" if implicit else "AdamsBashforth"
        self.problem, self.sums, self.implicit = problem, sums, implicit
        self.max_iters = options.pop("max_iters", MOST_ITERATIONS)
        self.max_order = int(options.pop("max_order", MOST_ORDER))
        require(self.max_order <= MOST_ORDER, f"max_order must be at most {MOST_ORDER}")
        if self.max_order < LEAST_ORDER:
            warnings.warn(
                f"max_order is below {LEAST_ORDER}, so the solver reduces to `rk4`.", stacklevel=5
            )
        self.slopes: deque[Tensor] = deque(maxlen=max(1, self.max_order - 1))

    def step(
        self, times: Any, y: Tensor, dt: float | Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        # The history outlives the step, and func may return one buffer again and again.
        now = self.problem.slope(times[0], y).clone()
        self.slopes.appendleft(now)
        order = min(len(self.slopes), self.max_order - 1)
        if order < LEAST_ORDER - 1:
            y1, _ = runge_kutta(
                self.sums, RK4, self.problem.slope, times[1:], y, now, dt, copy=True, out=out
            )
            return y1, now
        past = tuple(range(0, -order, -1))
        weights, slopes = adams_weights(past), list(self.slopes)
        if not self.implicit:
            return self.sums.combine(y, slopes, weights, dt, out), now
        y1 = self.sums.combine(y, slopes, weights, dt)
        return self._corrected(times[-1], y, y1, dt, past), now

    def _corrected(
        self, end: Tensor, y: Tensor, y1: Tensor, dt: float | Tensor, past: tuple[int, ...]
    ) -> Tensor:
        weights = adams_weights((1, *past))
        slopes = list(self.slopes)
        for _ in range(self.max_iters):
            f = self.problem.slope(end, y1)
            before, y1 = y1, self.sums.combine(y, [f, *slopes], weights, dt)
            if self._converged(before - y, y1 - y):
                return y1
        warnings.warn(
            "Functional iteration did not converge. Solution may be incorrect.", stacklevel=6
        )
        self.slopes.pop()
        return y1

    @torch.no_grad()
    def _converged(self, before: Tensor, after: Tensor) -> bool:
        ratio = self.sums.relative(before - after, before, after).abs()
        return bool(ratio.max() < 1) if ratio.numel() else True
