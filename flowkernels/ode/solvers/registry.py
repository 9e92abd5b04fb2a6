"""The solvers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from flowkernels.ode import tableaus
from flowkernels.ode.solvers.adams import Adams
from flowkernels.ode.solvers.adaptive import HostAdaptive
from flowkernels.ode.solvers.fixed import FixedGrid, RungeKutta
from flowkernels.ode.solvers.problem import CALLBACKS, Problem
from flowkernels.ode.solvers.scipy_solver import SciPy
from flowkernels.ode.solvers.tensors import TensorAdaptive, wants_tensors
from flowkernels.ode.tableaus import Tableau

Tensor = torch.Tensor


class Solver(Protocol):
    """One solve."""

    def integrate(self) -> Tensor:
        """[T, ...], the states at the output times."""
        ...

    def integrate_until_event(self) -> tuple[Tensor, Tensor]:
        """(time, [2, ...])."""
        ...


@dataclass(frozen=True)
class Method:
    """How a solver is made, and which of the caller's callbacks it calls."""

    make: Callable[[Problem], Solver]
    callbacks: frozenset[str]
    tableau: Tableau | None = None


def _fixed(tableau: Tableau) -> Method:
    def make(problem: Problem) -> Solver:
        return FixedGrid(problem, lambda p, sums, options: RungeKutta(p, sums, tableau))

    return Method(make, frozenset(CALLBACKS[:1]))


def _adams(implicit: bool) -> Method:
    def make(problem: Problem) -> Solver:
        return FixedGrid(problem, partial(_make_adams, implicit=implicit))

    return Method(make, frozenset(CALLBACKS[:1]))


def _make_adams(problem: Problem, sums: Any, options: dict[str, Any], implicit: bool) -> Adams:
    return Adams(problem, sums, options, implicit=implicit)


def _adaptive(tableau: Tableau) -> Method:
    def make(problem: Problem) -> Solver:
        if wants_tensors(problem):
            return TensorAdaptive(problem, tableau)
        return HostAdaptive(problem, tableau)

    return Method(make, frozenset(CALLBACKS), tableau)


SOLVERS: dict[str, Method] = {
    "dopri8": _adaptive(tableaus.DOPRI8),
    "dopri5": _adaptive(tableaus.DOPRI5),
    "tsit5": _adaptive(tableaus.TSIT5),
    "bosh3": _adaptive(tableaus.BOSH3),
    "fehlberg2": _adaptive(tableaus.FEHLBERG2),
    "adaptive_heun": _adaptive(tableaus.ADAPTIVE_HEUN),
    **{name: _fixed(tableau) for name, tableau in tableaus.FIXED.items()},
    "explicit_adams": _adams(implicit=False),
    "implicit_adams": _adams(implicit=True),
    "fixed_adams": _adams(implicit=True),
    "scipy_solver": Method(SciPy, frozenset()),
}


def solve(problem: Problem) -> Tensor:
    """[T, ...], the states at the output times."""
    return SOLVERS[problem.method].make(problem).integrate()


def solve_event(problem: Problem) -> tuple[Tensor, Tensor]:
    """(τ of the event, [2, ...])."""
    return SOLVERS[problem.method].make(problem).integrate_until_event()
