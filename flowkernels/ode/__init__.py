"""Schedules, samplers and the steps they are made of."""

from flowkernels.ode.sample import METHODS, sample
from flowkernels.ode.schedule import Schedule, from_sigmas, shifted, uniform
from flowkernels.ops.step import euler_step

__all__ = ["METHODS", "Schedule", "euler_step", "from_sigmas", "sample", "shifted", "uniform"]
