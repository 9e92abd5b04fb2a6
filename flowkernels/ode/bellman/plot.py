"""The picture of a search: every jump's cost, and the schedules beside even steps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from flowkernels.ode.bellman.result import even_stops

if TYPE_CHECKING:
    from flowkernels.ode.bellman.result import BellmanSchedules


def draw(found: BellmanSchedules, path: str | os.PathLike[str]) -> None:
    """Write the picture to `path`, in the format of its suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would choose a window system and keep the figure.
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    costs, times = figure.subplots(1, 2)
    _draw_costs(found, figure, costs)
    _draw_times(found, times)
    figure.savefig(os.fspath(path), dpi=120)


def _draw_costs(found: BellmanSchedules, figure: Any, axes: Any) -> None:
    N = found.grid.steps
    above = torch.ones(N + 1, N + 1, dtype=torch.bool).triu(1) & (found.cost > 0)
    shown = torch.where(above, found.cost.log10(), torch.nan)
    grid = found.grid.times.numpy()
    mesh = axes.pcolormesh(grid, grid, shown.numpy(), shading="nearest", cmap="viridis")
    axes.invert_xaxis()  # noise at the upper left, data at the lower right
    for K, stops in found.stops.items():
        # The corner of a jump j → k is its cell; the steps of a path touch the diagonal.
        j, k = grid[stops[:-1]], grid[stops[1:]]
        axes.plot(k, j, "o-", markersize=3, linewidth=0.8, label=f"K = {K}")
    axes.set_xlabel("to t")
    axes.set_ylabel("from t")
    axes.set_title("cost of one Euler jump")
    axes.legend(fontsize="small", loc="lower left")
    figure.colorbar(mesh, ax=axes, label="log₁₀ cost")


def _draw_times(found: BellmanSchedules, axes: Any) -> None:
    report = found.report()
    grid = found.grid.times
    for row, (K, schedule) in enumerate(found.schedules.items()):
        even = grid[even_stops(K, found.grid.steps)]
        axes.plot(even, [row + 0.15] * (K + 1), "|", color="0.6", markersize=10)
        axes.plot(schedule.times, [row] * (K + 1), "o", markersize=4)
        axes.annotate(
            f"{report[K].gain:.3g}×", (0.0, row), xytext=(8, -3), textcoords="offset points"
        )
    axes.set_yticks(range(len(found.schedules)), [f"K = {K}" for K in found.schedules])
    axes.set_xlabel("t, from noise to data (grey: even steps)")
    axes.set_title("schedules, and what they gain in cost")
    axes.set_xlim(1.05, -0.18)  # room for the gain beside the last stop
    axes.margins(y=0.15)
