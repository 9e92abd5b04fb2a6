"""Steps of ODE solvers: Euler with guidance, Runge–Kutta combinations, their error and its norm."""

from flowkernels.ops.step._euler import euler_step
from flowkernels.ops.step._runge_kutta import rk_combine, rk_error

__all__ = ["euler_step", "rk_combine", "rk_error"]
