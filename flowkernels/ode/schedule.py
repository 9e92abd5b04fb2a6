"""Schedules: the times at which a sampler stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Schedule:
    """The times of n sampling steps, from 1 (noise) down to 0 (data).

    Args:
        times: n + 1 times, strictly falling from exactly 1 to exactly 0.
        origin: how the schedule was made, for people and for files.

    Attributes:
        times: float64 [n+1], on the CPU.
        origin: as given.

    Raises:
        ValueError: the times do not fall strictly from 1 to 0.

    Example:
        >>> Schedule([1.0, 0.25, 0.0], origin="by hand")
        Schedule(2 steps: 1, 0.25, 0; by hand)
        >>> Schedule.from_json(uniform(4).to_json()) == uniform(4)
        True
    """

    times: Tensor
    origin: str

    def __init__(self, times: Sequence[float] | Tensor, origin: str = "given") -> None:
        values = _float64(times, "times").clone()
        if values.dim() != 1 or values.shape[0] < 2:
            raise ValueError(
                f"times has shape {tuple(values.shape)}; it needs [n+1] with n at least 1"
            )
        listed = values.tolist()
        # Written so that a NaN fails too.
        if not (listed[0] == 1 and listed[-1] == 0 and all(b < a for a, b in pairwise(listed))):
            raise ValueError(
                f"times is {listed}; it must fall strictly from exactly 1 to exactly 0"
            )
        self.times = values
        self.origin = origin

    @property
    def steps(self) -> int:
        """The number n of steps."""
        return len(self.times) - 1

    def __len__(self) -> int:
        return self.steps

    def __eq__(self, other: object) -> bool:
        """The same times; the origin is a remark, not part of the value."""
        return isinstance(other, Schedule) and torch.equal(self.times, other.times)

    def __hash__(self) -> int:
        return hash(tuple(self.times.tolist()))

    def __repr__(self) -> str:
        times = ", ".join(f"{value:.4g}" for value in self.times.tolist())
        return f"Schedule({self.steps} steps: {times}; {self.origin})"

    def to_json(self) -> str:
        """A JSON object with `times` and `origin`; `from_json` restores every bit."""
        return json.dumps({"times": self.times.tolist(), "origin": self.origin})

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, or not an object with `times` and `origin`.
        """
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text is not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("times"), list):
            raise ValueError("text holds no schedule; it needs an object with a list `times`")
        times = value["times"]
        if not all(type(time) in (int, float) for time in times):
            raise ValueError("times must be numbers")
        return Schedule(
            torch.tensor(times, dtype=torch.float64, device="cpu"),
            origin=str(value.get("origin", "json")),
        )

    def to_diffusers(self, scheduler: Any, device: str | torch.device | None = None) -> Any:
        """Have a flow-matching scheduler of diffusers walk exactly these times.

        They become its levels as they are: `set_timesteps(sigmas=...)` would shift them (again).
        One of `flowkernels.integrations` holds the schedule from then on. One of diffusers' own
        forgets it at its next `set_timesteps`, which every pipeline calls: it serves loops that
        call `step` themselves.

        Args:
            scheduler: FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler or ours.
            device: where its `timesteps` and `sigmas` are put; None leaves them on the CPU.

        Returns:
            The same scheduler.

        Raises:
            TypeError: it is another scheduler.
        """
        hold = getattr(scheduler, "set_schedule", None)
        if hold is not None:
            hold(self, device)
            return scheduler
        classes = {kind.__name__ for kind in type(scheduler).__mro__}
        heun = "FlowMatchHeunDiscreteScheduler" in classes
        if not heun and "FlowMatchEulerDiscreteScheduler" not in classes:
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__}; it must be a flow-matching Euler or "
                "Heun scheduler of diffusers or flowkernels.integrations"
            )
        levels = 1 - self.times if scheduler.config.get("invert_sigmas") else self.times
        shown = levels[:-1] * scheduler.config.num_train_timesteps
        if heun:  # each level but the first and the last is visited twice
            levels = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
            shown = torch.cat([shown[:1], shown[1:].repeat_interleave(2)])
            scheduler.prev_derivative = scheduler.dt = None
        scheduler.sigmas, scheduler.timesteps = levels.float().to(device), shown.float().to(device)
        scheduler.num_inference_steps = self.steps
        scheduler._step_index = scheduler._begin_index = None
        return scheduler

    @staticmethod
    def uniform(n: int) -> Schedule:
        """See `flowkernels.ode.uniform`."""
        return uniform(n)

    @staticmethod
    def shifted(n: int, shift: float) -> Schedule:
        """See `flowkernels.ode.shifted`."""
        return shifted(n, shift)

    @staticmethod
    def from_sigmas(sigmas: Sequence[float] | Tensor) -> Schedule:
        """See `flowkernels.ode.from_sigmas`."""
        return from_sigmas(sigmas)


def uniform(n: int) -> Schedule:
    """n equal steps: `t_i = 1 - i/n`.

    Raises:
        ValueError: `n` is not a positive int.

    Example:
        >>> uniform(4).times.tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return Schedule(_grid(n), origin=f"uniform({n})")


def shifted(n: int, shift: float) -> Schedule:
    """n steps, uniform before the time shift of SD3: `t = s·u / (1 + (s-1)·u)`.

    Args:
        n: steps.
        shift: s; 1 is uniform, SD3 uses 3 (more steps near the noise).

    Raises:
        ValueError: `n` is not a positive int, or `shift` not a positive number.

    Example:
        >>> shifted(2, 3.0).times.tolist()
        [1.0, 0.75, 0.0]

    Source: arXiv 2403.03206.
    """
    if not (isinstance(shift, (int, float)) and 0 < shift < float("inf")):
        raise ValueError(f"shift is {shift!r}; it must be a positive number")
    u = _grid(n)
    # 1 + (s-1)·u, arranged so that u = 1 gives exactly 1 for every s
    return Schedule(shift * u / (shift * u + (1 - u)), origin=f"shifted({n}, {shift:g})")


def from_sigmas(sigmas: Sequence[float] | Tensor) -> Schedule:
    """The schedule of a list of noise levels, as diffusers' flow-matching schedulers hold it.

    Taken as they are: a shift already applied is not applied again. A last 0 is added where it
    is missing.

    Args:
        sigmas: falling from 1, [n] or [n+1].

    Raises:
        ValueError: they do not fall strictly from 1.

    Example:
        >>> from_sigmas([1.0, 0.5]).times.tolist()
        [1.0, 0.5, 0.0]
    """
    values = _float64(sigmas, "sigmas")
    if values.dim() == 1 and len(values) and values[-1] != 0:
        values = torch.cat([values, values.new_zeros(1)])
    return Schedule(values, origin="sigmas")


def _float64(values: Sequence[float] | Tensor, name: str) -> Tensor:
    """On the CPU; numbers of a list keep every digit."""
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {values!r}; it must be numbers") from None


def _grid(n: int) -> Tensor:
    if type(n) is not int or n < 1:
        raise ValueError(f"n is {n!r}; it must be an int of at least 1")
    return torch.arange(n, -1, -1, dtype=torch.float64, device="cpu") / n
