"""ODE solvers, schedules, samplers and the steps they are made of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowkernels.ode.bellman import (
    BellmanAccumulator,
    bellman_cost,
    bellman_path,
    bellman_schedule,
)
from flowkernels.ode.sample import METHODS, sample
from flowkernels.ode.schedule import Schedule, from_sigmas, shifted, uniform
from flowkernels.ops.step import euler_step, rk_combine, rk_error

if TYPE_CHECKING:
    from flowkernels.ode.adjoint import odeint_adjoint
    from flowkernels.ode.dense import DenseOutput, odeint_dense
    from flowkernels.ode.integrate import ODE_METHODS, odeint, odeint_event

__all__ = [
    "METHODS",
    "ODE_METHODS",
    "BellmanAccumulator",
    "DenseOutput",
    "Schedule",
    "bellman_cost",
    "bellman_path",
    "bellman_schedule",
    "euler_step",
    "from_sigmas",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "rk_combine",
    "rk_error",
    "sample",
    "shifted",
    "uniform",
]

# Loaded at their first use: their loops are kept out of compiled graphs, and what torch needs for
# that takes a second to import.
_HOMES = {
    "odeint_adjoint": "adjoint",
    "DenseOutput": "dense",
    "odeint_dense": "dense",
    "ODE_METHODS": "integrate",
    "odeint": "integrate",
    "odeint_event": "integrate",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"flowkernels.ode.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'flowkernels.ode' has no attribute {name!r}")
