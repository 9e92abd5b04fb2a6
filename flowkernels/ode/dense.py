"""``odeint_dense``: the solution as a function of time."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch

from flowkernels.ode.solvers.adaptive import HostAdaptive, dense_coefficients
from flowkernels.ode.solvers.problem import Problem, State, check_inputs, require
from flowkernels.ode.solvers.registry import SOLVERS

Tensor = torch.Tensor


class DenseOutput:
    """y(t) between the ends of a solve: the quartic of the step that t lies in.

    Attributes:
        times: the ends of the steps, [n + 1], in the order of the solve.
    """

    def __init__(self, problem: Problem, times: list[float], coefficients: list[Tensor]) -> None:
        self._problem, self._ends = problem, times
        self._coefficients = coefficients
        self.times = torch.tensor([problem.sign * t for t in times], dtype=torch.float64)

    def __call__(self, t: Tensor | float) -> Any:
        """The state at t, 0-d; or at each of t [N], stacked.

        Raises:
            AssertionError: t lies outside the solve.
        """
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
        if t.dim() > 0:
            states = torch.stack([self._state(each) for each in t.reshape(-1)])
            return self._problem.finish(states)
        state = self._state(t)
        packing = self._problem.packing
        return state if packing is None else packing.unpack(state)

    def _state(self, t: Tensor) -> Tensor:
        tau = self._problem.user_time(t)
        value, ends = float(tau), self._ends
        index = min(bisect.bisect_right(ends, value), len(ends) - 1) - 1
        inside = index >= 0 and ends[index] <= value <= ends[index + 1]
        require(
            inside,
            f"invalid interpolation, fails `t0 <= t <= t1`: {ends[0]}, {value}, {ends[-1]}",
        )
        t0, t1 = ends[index], ends[index + 1]
        x = (tau.to(torch.float64) - t0) / (t1 - t0)
        first, *rest = self._coefficients[index].unbind(0)
        x = x.to(device=first.device, dtype=first.dtype.to_real())
        total, power = first, x
        for coefficient in rest:
            total = total + power * coefficient
            power = power * x
        return total


@torch.compiler.disable
def odeint_dense(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Tensor | float,
    t1: Tensor | float,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> DenseOutput:
    """Solves from t0 to t1 and returns y as a function of t.

    Every adaptive method has it (torchdiffeq's has dopri5 alone), in either direction of time and
    for tuples. The quartic of a step interpolates the state at both ends and in the middle and the
    slopes at both ends; for tsit5 it is its free interpolant.

    Args:
        func: as in ``odeint``.
        y0: as in ``odeint``.
        t0: the time of y0.
        t1: the last time.
        rtol: as in ``odeint``.
        atol: as in ``odeint``.
        method: an adaptive one; "dopri5" by default.
        options: of the method; ``per_sample`` has no dense output.

    Returns:
        A callable: of t 0-d, a state of y0's form; of t [N], N of them stacked.

    Raises:
        ValueError: the method is not adaptive.

    Example:
        >>> import torch
        >>> from flowkernels.ode import odeint_dense
        >>> y = odeint_dense(lambda t, y: -y, torch.ones(1), torch.tensor(0.0), torch.tensor(1.0))
        >>> round(y(torch.tensor(0.5)).item(), 5)
        0.60653
    """
    like = t0 if isinstance(t0, Tensor) else torch.empty(0, dtype=torch.float64)
    t = torch.tensor([float(t0), float(t1)], dtype=like.dtype, device=like.device)
    problem = check_inputs(func, y0, t, rtol, atol, method, options, None, SOLVERS)
    tableau = SOLVERS[problem.method].tableau
    if tableau is None:
        adaptive = ", ".join(name for name, each in SOLVERS.items() if each.tableau is not None)
        raise ValueError(
            f"method: got {problem.method!r}, which has no dense output, need one of {adaptive}"
        )
    if problem.options.get("per_sample"):
        raise ValueError("options: per_sample has no dense output, need one solve for each sample")
    problem.options.pop("sync_every", None)
    return DenseOutput(problem, *dense_coefficients(HostAdaptive(problem, tableau)))
