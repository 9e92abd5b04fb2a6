"""The noise levels of diffusers' flow-matching schedulers, in float64 and shifted once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Levels = NDArray[np.float64]

KARRAS_RHO = 7.0
BETA = 0.6
"""Both parameters of the beta distribution (arXiv 2407.12173)."""


def flow_sigmas(
    config: Mapping[str, Any],
    shift: float,
    *,
    steps: int,
    sigmas: ArrayLike | None = None,
    mu: float | None = None,
) -> Levels:
    """The levels at which the model is called, before the last one (0) is added.

    Without `sigmas` they start as `steps` equal ones from 1 to 1/N, N the training timesteps:
    the ends of the training levels *before* any shift. Then, in this order and each where the
    configuration asks for it: the shift `s·u / (s·u + 1 - u)`, with s the static shift or, under
    dynamic shifting, e^mu ("exponential") or mu ("linear"); the stretch of the last level to
    `shift_terminal`; Karras', exponential or beta spacing between the ends.

    Args:
        config: a scheduler's configuration.
        shift: the static shift.
        steps: how many.
        sigmas: levels before the shift, in place of equal ones.
        mu: the dynamic shift.

    Returns:
        float64 [steps].

    Raises:
        ValueError: dynamic shifting without `mu`, or exponential spacing down to 0.
    """
    if sigmas is None:
        levels = np.linspace(1.0, 1.0 / config["num_train_timesteps"], steps)
    else:
        levels = np.array(sigmas, dtype=np.float64)
    levels = shifted_levels(levels, _shift_of(config, shift, mu))
    if config.get("shift_terminal"):
        levels = _stretched(levels, config["shift_terminal"])
    return _respaced(levels, config)


def shifted_levels(levels: Levels, shift: float) -> Levels:
    """`s·u / (s·u + 1 - u)`: 0 stays 0 and 1 stays 1, exactly (arXiv 2403.03206)."""
    moved: Levels = shift * levels / (shift * levels + (1.0 - levels))
    return moved


def _shift_of(config: Mapping[str, Any], shift: float, mu: float | None) -> float:
    if not config.get("use_dynamic_shifting"):
        return shift
    if mu is None:
        raise ValueError("mu: got None, need a number: the configuration has use_dynamic_shifting")
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _stretched(levels: Levels, terminal: float) -> Levels:
    """The distances from 1 scaled so that the last level is `terminal`."""
    distance = 1.0 - levels
    if distance[-1] == 0:  # a single step, at 1: there is nothing to stretch
        return levels
    moved: Levels = 1.0 - distance * ((1.0 - terminal) / distance[-1])
    return moved


def _respaced(levels: Levels, config: Mapping[str, Any]) -> Levels:
    last, first = (
        float(levels[index]) if config.get(name) is None else float(config[name])
        for name, index in (("sigma_min", -1), ("sigma_max", 0))
    )
    ramp = np.linspace(0.0, 1.0, len(levels))
    if config.get("use_karras_sigmas"):
        root = 1.0 / KARRAS_RHO
        levels = (first**root + ramp * (last**root - first**root)) ** KARRAS_RHO
    elif config.get("use_exponential_sigmas"):
        if last <= 0:
            raise ValueError(
                f"sigmas: got {last} last, need a positive one for exponential spacing"
            )
        levels = np.exp(np.linspace(math.log(first), math.log(last), len(levels)))
    elif config.get("use_beta_sigmas"):
        from scipy.stats import beta

        levels = last + beta.ppf(1.0 - ramp, BETA, BETA) * (first - last)
    return levels


class HostValues:
    """A tensor's numbers on the host, read from it again only where it was replaced or written.

    So that a step needs no device-to-host copy, and so that a schedule computed in float64 keeps
    its digits beside the float32 tensor that the pipelines see.
    """

    def __init__(self) -> None:
        self._tensor: Any = None
        self._version = -1
        self._values: list[float] = []

    def keep(self, tensor: Any, values: Sequence[float]) -> None:
        """`values` are what `tensor` holds, perhaps with more digits."""
        self._tensor, self._version, self._values = tensor, tensor._version, list(values)

    def of(self, tensor: Any) -> list[float]:
        if not self._current(tensor):
            self.keep(tensor, tensor.tolist())
        return self._values

    def _current(self, tensor: Any) -> bool:
        return tensor is self._tensor and tensor._version == self._version

    # A copied tensor counts its versions from 0 again.
    def __getstate__(self) -> tuple[Any, list[float]] | None:
        known = self._tensor is not None and self._current(self._tensor)
        return (self._tensor, self._values) if known else None

    def __setstate__(self, state: tuple[Any, list[float]]) -> None:
        self.keep(*state)

    def __reduce__(self) -> Any:
        return (HostValues, (), self.__getstate__())
