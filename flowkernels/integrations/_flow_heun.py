"""The fused Heun scheduler; `flowkernels.integrations.schedulers` says what its modes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_heun_discrete import (
    FlowMatchHeunDiscreteScheduler,
    FlowMatchHeunDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowkernels.integrations._flow_scheduler import FlowScheduler, check_output, wide
from flowkernels.integrations._flow_sigmas import Levels
from flowkernels.ops.step import euler_step

# Settings that diffusers' Heun does not have.
BEYOND = (
    "use_dynamic_shifting",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)


class FusedFlowMatchHeun(FlowScheduler, FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """Heun's two-stage steps, as diffusers' FlowMatchHeunDiscreteScheduler.

    The first stage is Euler's step to the next level, the second goes from where the first started
    with the mean of both velocities; the last step, to 0, has one stage. n steps are 2n - 1 calls.

    Beyond diffusers' it takes FLUX's configuration and arguments (dynamic shifting, `sigmas`, `mu`)
    and all other spacings of the Euler scheduler, so it serves the same pipelines.

    Args:
        exact: diffusers' levels and steps to the bit, its double shift included (see the module),
            where diffusers' own has them: not with `sigmas`, `timesteps`, dynamic shifting,
            `shift_terminal` or another spacing.
        times: a schedule to hold, from 1 to 0 (see `set_schedule`).
        num_train_timesteps: N; the model is shown t·N. All others are those of
            `FusedFlowMatchEuler`.

    Raises:
        ValueError: settings that exclude each other, `times` that do not fall from 1 to 0.

    Example:
        >>> scheduler = FusedFlowMatchHeun()
        >>> scheduler.set_timesteps(2)
        >>> scheduler.timesteps
        tensor([1000.,    1.,    1.])
        >>> x = torch.ones(1, 2)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(torch.full_like(x, 0.5), t, x).prev_sample
        >>> x
        tensor([[0.5000, 0.5000]])
    """

    # None in the first of two stages; diffusers declares them otherwise.
    sample: Any
    prev_derivative: Any
    dt: Any

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        exact: bool = False,
        times: Sequence[float] | None = None,
    ) -> None:
        spacings = [use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas]
        if sum(spacings) > 1:
            raise ValueError(
                "use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: got "
                f"{', '.join(map(str, spacings))}, need at most one"
            )
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(
                f"time_shift_type: got {time_shift_type!r}, need 'exponential' or 'linear'"
            )
        FlowMatchHeunDiscreteScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            shift=1.0 if use_dynamic_shifting else shift,
        )
        self.register_to_config(shift=shift)
        self._shift = shift
        self._prepare(times)
        self._restart()

    @property
    def shift(self) -> float:  # type: ignore[override]
        """The static shift."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Change the static shift, from the next `set_timesteps` on."""
        self._shift = shift

    def _restart(self) -> None:
        super()._restart()
        self.prev_derivative, self.dt, self.sample = None, None, None

    def _stages(self, values: Levels, *, closed: bool) -> Levels:
        inner = values[1:-1] if closed else values[1:]
        return np.concatenate([values[:1], np.repeat(inner, 2), values[-1:] if closed else []])

    def _visited(self, sigmas: list[float]) -> list[float]:
        return [*sigmas[:1], *sigmas[1::2]]

    def _as_diffusers_sets(self, **arguments: Any) -> bool:
        config, steps = self.config, arguments.pop("num_inference_steps")
        foreign = self._shift != config.shift or any(config[name] for name in BEYOND)
        arguments.pop("mu")
        if not config.exact or foreign or any(value is not None for value in arguments.values()):
            return False
        FlowMatchHeunDiscreteScheduler.set_timesteps(self, steps)
        return True

    def _as_diffusers_noises(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        return FlowMatchHeunDiscreteScheduler.scale_noise(self, sample, timestep, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple[Tensor]:
        """One stage of a step.

        Args:
            model_output: the velocity, of the sample's shape.
            timestep: the one of `timesteps` at which it was computed; read at the first step only.
            sample: the state, [B, ...]; at a second stage, what the first stage returned.
            s_churn: above 0 noise is added before a step: the level is raised by the factor
                1 + γ, γ = min(s_churn / (number of levels - 1), √2 - 1).
            s_tmin: no noise at levels below.
            s_tmax: no noise at levels above.
            s_noise: factor of the noise.
            generator: of the noise. A second stage draws, too, as diffusers' does, so that a
                generator gives the same numbers; it has no use for them.
            return_dict: an output object, or else a tuple of one.

        Returns:
            The next state, in the model output's dtype.

        Raises:
            ValueError: an index for a timestep, a timestep that is none of the scheduler's, shapes
                that differ.
            IndexError: a step after the last one.
        """
        index = self._begin(timestep)
        check_output(model_output, sample)
        start = index if self.state_in_first_order else index - 1
        level = np.float32(self._levels[start])
        churned = np.float32(s_tmin) <= level <= np.float32(s_tmax)
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if churned else 0.0
        noise = None
        if gamma > 0:
            noise = s_noise * randn_tensor(
                model_output.shape,
                dtype=model_output.dtype,
                device=model_output.device,
                generator=generator,
            )
        if self.config.exact:
            moved = self._exact_stage(sample, model_output, start, gamma, noise)
        elif self.state_in_first_order:
            moved = self._first_stage(sample, model_output, start, gamma, noise)
        else:
            moved = self._second_stage(model_output)
        self._step_index = index + 1
        moved = moved.to(model_output.dtype)
        return FlowMatchHeunDiscreteSchedulerOutput(cast(Any, moved)) if return_dict else (moved,)

    def _first_stage(
        self, sample: Tensor, velocity: Tensor, start: int, gamma: float, noise: Tensor | None
    ) -> Tensor:
        """`x + dt·slope·v`: diffusers divides `v·σ` by the raised level."""
        sigma, following = self._levels[start : start + 2]
        raised, slope = sigma * (1.0 + gamma), 1.0 / (1.0 + gamma)
        if noise is not None:
            sample = sample.to(wide(sample)).add(noise, alpha=(raised**2 - sigma**2) ** 0.5)
        # Copies: a captured or compiled model writes the next output, and its caller perhaps the
        # next state, over these.
        self.sample, self.prev_derivative = sample.clone(), velocity.clone()
        self.dt, self._slope = following - raised, slope
        return euler_step(sample, velocity, self.dt * slope)

    def _second_stage(self, velocity: Tensor) -> Tensor:
        """`x + dt/2·(slope·v1 + v2)`, the mean written as a guidance between the two."""
        moved = euler_step(
            self.sample,
            velocity,
            0.5 * self.dt * (1.0 + self._slope),
            v_uncond=self.prev_derivative,
            guidance=1.0 / (1.0 + self._slope),
        )
        self.prev_derivative, self.dt, self.sample = None, None, None
        return moved

    def _exact_stage(
        self, sample: Tensor, velocity: Tensor, start: int, gamma: float, noise: Tensor | None
    ) -> Tensor:
        """diffusers' operations in its order, on its tensors of levels."""
        sigma, following = self.sigmas[start], self.sigmas[start + 1]
        raised = sigma * (gamma + 1)
        sample = sample.to(torch.float32)
        if noise is not None:
            sample = sample + noise * (raised**2 - sigma**2) ** 0.5
        if self.state_in_first_order:
            denoised = sample - velocity * sigma
            self.prev_derivative = (sample - denoised) / raised
            self.dt, self.sample = following - raised, sample
            return sample + self.prev_derivative * self.dt
        denoised = sample - velocity * following
        derivative = 0.5 * (self.prev_derivative + (sample - denoised) / following)
        moved = self.sample + derivative * self.dt
        self.prev_derivative, self.dt, self.sample = None, None, None
        return moved
