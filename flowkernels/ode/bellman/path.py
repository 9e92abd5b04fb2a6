"""The best schedules of exactly K steps, for every K from one table."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkernels.ode.schedule import Schedule
from flowkernels.ops._validate import as_number

Costs = NDArray[np.float64]

# A rise below this share of the largest cost is rounding.
NOISE = 1e-9


class Path(NamedTuple):
    """The least total cost (with the discount), and the grid's indices of the stops."""

    cost: float
    stops: list[int]


class BellmanPaths(dict[int, Schedule]):
    """K → Schedule, and what the search found beside.

    Attributes:
        optima: K → the least total cost of exactly K steps, discount included.
        stops: K → the grid's indices of the schedule's times.
        rises: those K for which fewer steps have a lower optimum.
    """

    optima: dict[int, float]
    stops: dict[int, list[int]]
    rises: tuple[int, ...]


def bellman_path(
    cost: Tensor | Costs,
    times: Schedule | Tensor | Sequence[float],
    budgets: Iterable[int],
    *,
    discount: float = 1.0,
) -> BellmanPaths:
    """The schedules of least total cost among those that stop at times of a grid.

    ``V_1(j) = c_jN``, ``V_b(j) = min over j < m < N of c_jm + discount·V_{b-1}(m)``: dynamic
    programming, all budgets from one table; of equal paths the one with the lowest stops. K = N is
    the grid, K = 1 one step.

    The optimum of *exactly* K steps need not fall as K grows. Where fewer steps cost less, a
    warning names the K, and `rises` of the result has it.

    Args:
        cost: [N+1, N+1], c_jk of the jump from time j to time k; entries k ≤ j are not read.
        times: [N+1], the grid, strictly falling from 1 to 0.
        budgets: numbers K of steps, each from 1 to N.
        discount: γ, on the cost of later steps; 1 as in BOSS, 1.15 as in GITS.

    Returns:
        dict K → Schedule, with `optima`, `stops` and `rises`.

    Raises:
        TypeError: a budget is no int, or budgets are not several.
        ValueError: shapes that do not agree, a cost that is not finite, a K below 1 or above N.

    Example:
        >>> from flowkernels.ode import bellman_path, uniform
        >>> cost = torch.zeros(4, 4)
        >>> cost[0, 1], cost[0, 3], cost[1, 3] = 1.0, 5.0, 5.0  # 0 → 2 → 3 is free
        >>> bellman_path(cost, uniform(3), [2])
        {2: Schedule(2 steps: 1, 0.3333, 0; bellman(2 of 3))}

    Source: arXiv 2312.16414; discount: arXiv 2405.11326.
    """
    grid = times if isinstance(times, Schedule) else Schedule(times)
    values = _checked_cost(cost, grid.steps)
    wanted = checked_budgets(budgets, grid.steps)
    found = schedules_of(values, grid, wanted, checked_discount(discount))
    warn_of_rises("bellman_path", found)
    return found


def warn_of_rises(name: str, found: BellmanPaths) -> None:
    """One warning for all of them, at the caller of the public function."""
    if found.rises:
        listed = ", ".join(map(str, found.rises))
        warnings.warn(
            f"{name}: the best schedule of exactly K steps costs more than one of fewer steps at "
            f"K = {listed}",
            stacklevel=3,
        )


def schedules_of(
    values: Costs, grid: Schedule, budgets: Sequence[int], discount: float
) -> BellmanPaths:
    """`bellman_path` on checked arguments, without the warning."""
    every = solve(values, list(range(1, max(budgets) + 1)), discount)
    optima = np.array([path.cost for path in every])
    least = np.minimum.accumulate(optima)
    rounding = NOISE * np.abs(np.triu(values, 1)).max()
    found = BellmanPaths()
    found.optima = {K: float(optima[K - 1]) for K in budgets}
    found.stops = {K: every[K - 1].stops for K in budgets}
    found.rises = tuple(K for K in found.optima if optima[K - 1] > least[K - 1] + rounding)
    for K in budgets:
        found[K] = Schedule(grid.times[found.stops[K]], origin=f"bellman({K} of {grid.steps})")
    return found


def solve(cost: Costs, budgets: list[int], discount: float) -> list[Path]:
    """The best path of each budget, in C++ where the host routines are built."""
    native = _native()
    if native is None:
        return solve_in_python(cost, budgets, discount)
    return [Path(*found) for found in native.bellman_paths(cost, budgets, discount)]


def solve_in_python(cost: Costs, budgets: list[int], discount: float) -> list[Path]:
    """The same table and the same bits in NumPy, where there are no host routines."""
    N = len(cost) - 1
    most = max(budgets)
    value = np.full((most + 1, N + 1), np.inf)
    stop = np.full((most + 1, N + 1), N)
    value[1, :N] = cost[:N, N]
    later = np.triu(np.ones((N + 1, N + 1), dtype=bool), 1)
    for b in range(2, most + 1):
        rest = np.full(N + 1, np.inf)  # the discount may be 0, and 0·∞ is no number
        np.multiply(discount, value[b - 1], out=rest, where=np.isfinite(value[b - 1]))
        through = np.where(later, cost + rest, np.inf)
        stop[b] = through.argmin(1)  # the first of equal ones
        value[b] = through[np.arange(N + 1), stop[b]]
    paths = []
    for K in budgets:
        stops = [0]
        for b in range(K, 0, -1):
            stops.append(int(stop[b, stops[-1]]))
        paths.append(Path(float(value[K, 0]), stops))
    return paths


def _native() -> Any:
    try:
        module = importlib.import_module("flowkernels._C")
    except ImportError:
        return None
    return module if hasattr(module, "bellman_paths") else None


def checked_budgets(budgets: Iterable[int], steps: int) -> list[int]:
    """Distinct, in their order.

    Raises:
        TypeError: not ints.
        ValueError: none, or one that the grid does not have.
    """
    if isinstance(budgets, (str, bytes)) or not isinstance(budgets, Iterable):
        raise TypeError(f"budgets: got {budgets!r}, need ints such as (2, 4)")
    wanted = list(dict.fromkeys(budgets))
    for K in wanted:
        if isinstance(K, bool) or not isinstance(K, (int, np.integer)):
            raise TypeError(f"budgets: got {K!r} among them, need ints")
        if not 1 <= K <= steps:
            raise ValueError(
                f"budgets: got {K}, need numbers of steps from 1 to the grid's {steps}"
            )
    if not wanted:
        raise ValueError("budgets: got none, need at least one number of steps")
    return [int(K) for K in wanted]


def checked_discount(discount: Any) -> float:
    """A number that is not negative."""
    number = as_number(discount, "discount")
    if not 0 <= number < float("inf"):
        raise ValueError(f"discount: got {number!r}, need a number of at least 0")
    return number


def _checked_cost(cost: Any, steps: int) -> Costs:
    try:
        values = torch.as_tensor(cost, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"cost: got {type(cost).__name__}, need numbers [N+1, N+1]") from None
    if values.shape != (steps + 1, steps + 1):
        raise ValueError(
            f"cost: got shape {tuple(values.shape)}, need {(steps + 1, steps + 1)} for the "
            f"{steps} steps of times"
        )
    # What is not read may be anything.
    above: Costs = values.triu(1).numpy() if values.isfinite().all() else np.triu(values.numpy(), 1)
    if not np.isfinite(above).all():
        raise ValueError("cost: has values above the diagonal that are not finite")
    return np.ascontiguousarray(above)
