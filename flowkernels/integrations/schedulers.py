"""diffusers' flow-matching schedulers with a fused step and a schedule that is shifted once.

They take the place of diffusers' own in a pipeline::

    pipe.scheduler = FusedFlowMatchEuler.from_config(pipe.scheduler.config)

**Two modes.** With ``exact=True`` timesteps, levels and every step equal diffusers' (0.42.1) to the
bit: the same roundings in the same order. By default levels and ``dt`` are computed in float64 and
rounded once, the step is one pass over memory in float32 arithmetic, rounded once, and the
schedule is the one below.

**The double shift.** diffusers' constructor shifts the training levels, and keeps their ends as
``sigma_max = s(1)`` and ``sigma_min = s(1/N)``, with ``s(u) = shift·u / (1 + (shift - 1)·u)``.
``set_timesteps`` then spaces its levels equally between these two ends, already shifted, and
shifts all of them again. At the noise end that does nothing, since ``s(1) = 1``. At the data end
the last level is ``s(s(1/N))``: for SD3, with shift 3 and N = 1000, 0.00893 where 0.00299 is meant;
the levels between lie on a grid that ends too early, and are moved as well, the less the nearer
they are to 1. (Karras', exponential and beta spacing start from the same ends; after
``set_shift`` the ends are of the old shift and the levels of both.) A static shift other than 1
alone does so: under dynamic shifting the constructor shifts nothing, and ``sigmas`` that a caller
gives are shifted once. ``timesteps`` given alone have another flaw: the model is shown them
as they are while the steps go between the shifted levels made of them. ``exact=True`` keeps all
this; by default equal levels go from 1 to 1/N and are shifted once, and given timesteps say the
levels too.

No step waits for the device: the place in the schedule is counted on the host, and an element of
``scheduler.timesteps`` is recognised without reading it.

Importing this module needs diffusers. A pipeline saved with one of these schedulers is loaded
where this module has been imported before.
"""

from __future__ import annotations

try:
    # diffusers looks for SchedulerMixin here when it loads a pipeline saved with one of ours.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from flowkernels.integrations._flow_euler import FusedFlowMatchEuler
    from flowkernels.integrations._flow_heun import FusedFlowMatchHeun
except ImportError as error:
    raise ImportError(
        f"the schedulers need diffusers: pip install flowkernels[diffusers] ({error})"
    ) from error

__all__ = ["FusedFlowMatchEuler", "FusedFlowMatchHeun", "SchedulerMixin"]

# What diffusers writes into a saved pipeline is the module that a class says it is of.
FusedFlowMatchEuler.__module__ = FusedFlowMatchHeun.__module__ = __name__
