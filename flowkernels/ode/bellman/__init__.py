"""Schedules from a teacher's own trajectories: the cost of every jump, and the best K of them."""

from flowkernels.ode.bellman.cost import BellmanAccumulator, bellman_cost
from flowkernels.ode.bellman.path import BellmanPaths, bellman_path
from flowkernels.ode.bellman.result import BellmanReport, BellmanSchedules, Endpoint, Stability
from flowkernels.ode.bellman.schedule import bellman_schedule

__all__ = [
    "BellmanAccumulator",
    "BellmanPaths",
    "BellmanReport",
    "BellmanSchedules",
    "Endpoint",
    "Stability",
    "bellman_cost",
    "bellman_path",
    "bellman_schedule",
]
