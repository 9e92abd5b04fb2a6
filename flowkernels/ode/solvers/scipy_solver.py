"""SciPy's ``solve_ivp`` as a solver: on the CPU, without gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from flowkernels.ode.solvers.problem import Problem

Tensor = torch.Tensor


class SciPy:
    """Any method of ``scipy.integrate.solve_ivp``, by ``options={"solver": ...}``."""

    def __init__(self, problem: Problem) -> None:
        options = dict(problem.options)
        self.bounds = {
            "min_step": options.pop("min_step", 0),
            "max_step": options.pop("max_step", float("inf")),
        }
        self.solver = options.pop("solver", "LSODA")
        for name in ("grid_points", "eps"):
            options.pop(name, None)
        if options:
            warnings.warn(f"ScipyWrapperODESolver: Unexpected arguments {options}", stacklevel=4)
        self.problem = problem

    def integrate(self) -> Tensor:
        from scipy.integrate import solve_ivp

        problem = self.problem
        y0, t = problem.y0.detach(), problem.t.detach()
        if t.numel() == 1:
            return y0.unsqueeze(0).clone()
        dtype = problem.time_dtype

        def slope(tau: float, values: Any) -> Any:
            time = torch.tensor(problem.sign * tau, dtype=dtype, device=y0.device)
            y = torch.from_numpy(values).to(y0).reshape(y0.shape)
            with torch.no_grad():
                k = problem.sign * problem.slope(time, y)
            return k.cpu().numpy().reshape(-1)

        times = t.cpu().double().numpy()
        tolerances = [
            value.cpu().numpy() if isinstance(value, Tensor) else value
            for value in (problem.rtol, problem.atol)
        ]
        found = solve_ivp(
            slope,
            t_span=[times.min(), times.max()],
            y0=y0.cpu().numpy().reshape(-1),
            t_eval=times,
            method=self.solver,
            rtol=tolerances[0],
            atol=tolerances[1],
            **self.bounds,
        )
        if not found.success:
            raise RuntimeError(f"scipy_solver: {found.message}")
        return torch.from_numpy(found.y).T.to(y0).reshape(-1, *y0.shape)

    def integrate_until_event(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("scipy_solver: has no events, need another method for event_fn")
