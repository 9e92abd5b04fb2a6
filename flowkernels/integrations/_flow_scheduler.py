"""What the fused flow-matching schedulers share: their levels, where they stand, their noising."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flowkernels.integrations._flow_sigmas import HostValues, Levels, flow_sigmas
from flowkernels.ode import Schedule
from flowkernels.ops.interpolate import interpolate

# A timestep that is none of the schedule's is the one it lies this near to, as a fraction of the
# training steps: another order of the same float32 operations moves it by a tenth of that.
NEAR = 1e-6


class FlowScheduler:
    """The part above diffusers' own class, which comes after it in the order of the bases."""

    config: Any
    register_to_config: Any
    shift: float
    sigmas: Tensor
    timesteps: Tensor
    num_inference_steps: int
    _step_index: int | None
    _begin_index: int | None
    _host_sigmas: HostValues
    _host_timesteps: HostValues

    def _prepare(self, times: Sequence[float] | None) -> None:
        """The end of a constructor."""
        self._host_sigmas, self._host_timesteps = HostValues(), HostValues()
        if times is not None:
            Schedule(times)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation that a run starts from: that of the noise at t = 1."""
        return 1.0

    # ---- what a subclass says -------------------------------------------------------------------

    def _as_diffusers_sets(self, **arguments: Any) -> bool:
        """Take diffusers' own timesteps, on the CPU, where this mode has them; else False."""
        raise NotImplementedError

    def _as_diffusers_noises(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def _stages(self, values: Levels, *, closed: bool) -> Levels:
        """One value a model call; `closed`: with the value that the last call leads to."""
        return values

    def _visited(self, sigmas: list[float]) -> list[float]:
        """The inverse of `_stages` on closed values."""
        return sigmas

    def _restart(self) -> None:
        self._step_index = None
        self._begin_index = None

    # ---- the levels -----------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the timesteps of a run.

        A schedule that the scheduler holds (`set_schedule`) is walked as it is, whatever `sigmas`
        and `mu` say: FluxPipeline always sends some.

        Args:
            num_inference_steps: how many steps; may be left out where `sigmas` or `timesteps` say.
            device: where `timesteps` and `sigmas` are put; None leaves them on the CPU.
            sigmas: levels in place of equal ones, before the shift.
            mu: the shift under `use_dynamic_shifting`.
            timesteps: what the model is shown. Alone, they also say the levels, `timesteps / N`
                (unshifted: the two would not belong together; `exact` does shift them); with
                `sigmas`, the two are taken as they come.

        Raises:
            ValueError: lengths that do not agree, no length at all, dynamic shifting without `mu`.
        """
        steps = _count(num_inference_steps, sigmas, timesteps)
        if self.config.times is not None:
            held = Schedule(self.config.times).times.numpy()
            if steps != len(held) - 1:
                raise ValueError(
                    f"num_inference_steps: got {steps}, but the scheduler holds a schedule of "
                    f"{len(held) - 1} steps; set_schedule(None) lets go of it"
                )
            self._walk(held[:-1], None, device)
        elif self._as_diffusers_sets(
            num_inference_steps=num_inference_steps, sigmas=sigmas, mu=mu, timesteps=timesteps
        ):
            self._place(self.sigmas.tolist(), device)
        else:
            shown = None if timesteps is None else np.array(timesteps, dtype=np.float64)
            if shown is not None and sigmas is None:
                levels = shown / self.config.num_train_timesteps
            else:
                levels = flow_sigmas(self.config, self.shift, steps=steps, sigmas=sigmas, mu=mu)
            self._walk(levels, shown, device)
        self.num_inference_steps = steps
        self._restart()

    def _walk(self, levels: Levels, shown: Levels | None, device: Any) -> None:
        """Visit `levels` and then 0, showing the model `shown` (by default, levels·N)."""
        inverted = bool(self.config.get("invert_sigmas"))
        if inverted:
            levels = 1.0 - levels
        if shown is None or inverted:
            shown = levels * self.config.num_train_timesteps
        closed = self._stages(np.append(levels, 1.0 if inverted else 0.0), closed=True)
        self.sigmas = torch.from_numpy(closed).float()
        self.timesteps = torch.from_numpy(self._stages(shown, closed=False)).float()
        self._place(closed.tolist(), device)

    def _place(self, sigmas: list[float], device: Any) -> None:
        """Move both tensors, made on the CPU, and keep their numbers here."""
        timesteps = self.timesteps.tolist()
        self.sigmas, self.timesteps = self.sigmas.to(device), self.timesteps.to(device)
        self._host_sigmas.keep(self.sigmas, sigmas)
        self._host_timesteps.keep(self.timesteps, timesteps)

    @classmethod
    def from_schedule(cls, schedule: Schedule, **config: Any) -> Self:
        """A scheduler that holds `schedule`, ready to step; `config` are the other settings."""
        scheduler = cls(**config)
        scheduler.set_schedule(schedule)
        return scheduler

    def set_schedule(
        self, schedule: Schedule | None, device: str | torch.device | None = None
    ) -> None:
        """Hold a schedule: every `set_timesteps` walks its times, exactly and unshifted.

        It is part of the configuration, so a saved scheduler still holds it.

        Args:
            schedule: the times, from 1 to 0; None to go back to what the configuration says, from
                the next `set_timesteps` on.
            device: as for `set_timesteps`, which is called.

        Raises:
            TypeError: not a Schedule.
        """
        if not (schedule is None or isinstance(schedule, Schedule)):
            raise TypeError(f"schedule: got {type(schedule).__name__}, need a Schedule or None")
        times = None if schedule is None else schedule.times.tolist()
        defaults = [name for name in self.config.get("_use_default_values", ()) if name != "times"]
        self.register_to_config(times=times, _use_default_values=defaults)
        if schedule is not None:
            self.set_timesteps(schedule.steps, device)

    def to_schedule(self) -> Schedule:
        """The times of the present timesteps, with every digit that they were computed with.

        Raises:
            ValueError: `set_timesteps` was not called, or the levels do not fall from 1 to 0.
        """
        if getattr(self, "num_inference_steps", None) is None:
            raise ValueError("there are no timesteps yet, need set_timesteps first")
        times = self._visited(self._levels)
        if self.config.get("invert_sigmas"):
            times = [1.0 - time for time in times]
        return Schedule(times, origin=type(self).__name__)

    # ---- where the scheduler stands -------------------------------------------------------------

    @property
    def _levels(self) -> list[float]:
        """The sigmas on the host: float64 where they were computed here."""
        return self._host_sigmas.of(self.sigmas)

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """Which of the timesteps this is: of several equal ones the second, as in diffusers.

        An element of `self.timesteps` itself (what a loop over them gives) is found without
        reading the device.

        Raises:
            ValueError: none of them is near it, or it holds several different ones.
        """
        known = schedule_timesteps is None or schedule_timesteps is self.timesteps
        values = self._host_timesteps.of(self.timesteps) if known else schedule_timesteps.tolist()  # type: ignore[union-attr]
        found = set(self._numbers(timestep))
        if len(found) != 1:
            raise ValueError(f"timestep: got {len(found)} different values, need one")
        return self._position(found.pop(), values)

    def _position(self, timestep: float, values: list[float]) -> int:
        timestep = float(np.float32(timestep))
        if timestep not in values:
            nearest = min(values, key=lambda value: abs(value - timestep))
            if not abs(nearest - timestep) <= NEAR * self.config.num_train_timesteps:
                raise ValueError(
                    f"timestep: got {timestep:g}, need one of the scheduler's timesteps (the "
                    f"nearest is {nearest:g})"
                )
            timestep = nearest
        first = values.index(timestep)
        # Of equal ones the second: a run from the middle (image to image) skips no level.
        return values.index(timestep, first + 1) if values.count(timestep) > 1 else first

    def _numbers(self, timestep: float | Tensor) -> list[float]:
        if not isinstance(timestep, Tensor):
            return [float(timestep)]
        place = _place_in(self.timesteps, timestep)
        if place is not None:
            return [self._host_timesteps.of(self.timesteps)[place]]
        return [float(value) for value in timestep.reshape(-1).tolist()]

    def _init_step_index(self, timestep: float | Tensor) -> None:
        begin = self._begin_index
        self._step_index = self.index_for_timestep(timestep) if begin is None else begin

    def _begin(self, timestep: float | Tensor) -> int:
        """The index of this step; the first step finds it, later ones count.

        Raises:
            ValueError: `timestep` is an index, not a timestep.
            IndexError: the schedule has no further step.
        """
        index = self._step_index
        if index is None:
            _check_timestep(timestep)
            self._init_step_index(timestep)
            index = self._step_index
            assert index is not None
        last = len(self._levels) - 1
        if index >= last:
            raise IndexError(
                f"the scheduler has taken its {last} steps, need set_timesteps before another"
            )
        return index

    # ---- noising --------------------------------------------------------------------------------

    def scale_noise(
        self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """`(1 - σ)·sample + σ·noise`, σ the level of each sample's timestep, in one pass.

        Args:
            sample: [B, ...].
            timestep: one for all samples, or [B].
            noise: [B, ...], or what broadcasts to it.

        Returns:
            [B, ...] in the dtype that sample and noise promote to, rounded once.

        Raises:
            ValueError: no noise, a timestep that is none of the scheduler's, another number of
                timesteps than samples.
        """
        if noise is None:
            raise ValueError("noise: got None, need a tensor of the sample's shape")
        if self.config.exact:
            return self._as_diffusers_noises(sample, timestep, noise)
        levels = [self._levels[index] for index in self._noise_indices(timestep)]
        if len(levels) == 1:
            levels *= len(sample)
        if len(levels) != len(sample):
            raise ValueError(f"timestep: got {len(levels)} of them, need 1 or {len(sample)}")
        sigma = torch.tensor(levels, dtype=wide(sample), device=sample.device)
        if noise.shape != sample.shape:
            with contextlib.suppress(RuntimeError):  # below it is named
                noise = noise.expand_as(sample)
        return interpolate(sample, sigma, noise)[0]

    def _noise_indices(self, timestep: float | Tensor) -> list[int]:
        count = timestep.numel() if isinstance(timestep, Tensor) else 1
        if self._begin_index is None:
            values = self._host_timesteps.of(self.timesteps)
            return [self._position(number, values) for number in self._numbers(timestep)]
        index = self._begin_index if self._step_index is None else self._step_index
        return [index] * count


def _check_timestep(timestep: Any) -> None:
    indexed = isinstance(timestep, numbers.Integral)
    if indexed or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep).__name__
        raise ValueError(f"timestep: got {kind}, need one of scheduler.timesteps (not its index)")


def _count(
    steps: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
) -> int:
    """The number of steps that the arguments agree on."""
    given = {
        name: len(values)
        for name, values in (("sigmas", sigmas), ("timesteps", timesteps))
        if values is not None
    }
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
            raise ValueError(f"num_inference_steps: got {steps!r}, need a positive int")
        given["num_inference_steps"] = int(steps)
    if not given:
        raise ValueError("num_inference_steps: got None, need it or sigmas or timesteps")
    if len(set(given.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in given.items())
        raise ValueError(f"sigmas, timesteps and num_inference_steps differ in length: {told}")
    return given.popitem()[1]


def _place_in(timesteps: Tensor, element: Tensor) -> int | None:
    """Which element of `timesteps` this view of them is (expanded or not); None if it is none."""
    same = element.device == timesteps.device and element.dtype == timesteps.dtype
    sizes = zip(element.shape, element.stride(), strict=True)
    one = all(size == 1 or step == 0 for size, step in sizes)
    if not (same and one and timesteps.is_contiguous() and element.numel()):
        return None
    try:
        if element.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
            return None
    except (NotImplementedError, RuntimeError):  # some devices' tensors have no storage to see
        return None
    place = int(element.storage_offset() - timesteps.storage_offset())
    return place if 0 <= place < len(timesteps) else None


def check_output(model_output: Tensor, sample: Tensor) -> None:
    """The two have one shape."""
    if sample.shape != model_output.shape:
        raise ValueError(
            f"model_output: got shape {tuple(model_output.shape)}, need the sample's, "
            f"{tuple(sample.shape)}"
        )


def wide(x: Tensor) -> torch.dtype:
    """float64 for float64, else what the kernels compute in."""
    return torch.promote_types(x.dtype, torch.float32)
