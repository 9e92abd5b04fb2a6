"""The fused Euler scheduler; `flowkernels.integrations.schedulers` says what its modes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowkernels.integrations._flow_scheduler import FlowScheduler, check_output, wide
from flowkernels.ops.step import euler_step


class FusedFlowMatchEuler(FlowScheduler, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler steps ``x + (σ_next - σ)·v``, as diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        exact: diffusers' levels and steps to the bit, its double shift included (see the module).
        times: a schedule to hold, from 1 to 0 (see `set_schedule`).
        num_train_timesteps: N; the model is shown t·N. This and all others are diffusers'.

    Raises:
        ValueError: settings that exclude each other, `times` that do not fall from 1 to 0.

    Example:
        >>> scheduler = FusedFlowMatchEuler(shift=3.0)
        >>> scheduler.set_timesteps(3)
        >>> x = torch.ones(1, 2)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(x.clone(), t, x, return_dict=False)[0]
        >>> scheduler.to_schedule()
        Schedule(3 steps: 1, 0.7504, 0.002994, 0; FusedFlowMatchEuler)

    Source: arXiv 2403.03206.
    """

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
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        exact: bool = False,
        times: Sequence[float] | None = None,
    ) -> None:
        FlowMatchEulerDiscreteScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self._prepare(times)

    def _as_diffusers_sets(self, **arguments: Any) -> bool:
        if self.config.exact:
            FlowMatchEulerDiscreteScheduler.set_timesteps(self, **arguments)
        return bool(self.config.exact)

    def _as_diffusers_noises(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        return FlowMatchEulerDiscreteScheduler.scale_noise(self, sample, timestep, noise)

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step along the schedule.

        Args:
            model_output: the velocity, of the sample's shape.
            timestep: the one of `timesteps` at which it was computed; read at the first step only.
            sample: the state, [B, ...].
            s_churn: as `s_tmin`, `s_tmax` and `s_noise`, taken and not used, as in diffusers.
            s_tmin: see `s_churn`.
            s_tmax: see `s_churn`.
            s_noise: see `s_churn`.
            generator: of the noise of `stochastic_sampling`.
            per_token_timesteps: [B, S] for a sample [B, S, C], or [B, 1]: each token goes from its
                own level to the next lower one of the schedule, by `sample + (σ - σ_next)·v`. That
                is diffusers' sign: its callers hand over -v here.
            return_dict: an output object, or else a tuple of one.

        Returns:
            The next state, in the model output's dtype; with per-token timesteps in float32.

        Raises:
            ValueError: an index for a timestep, a timestep that is none of the scheduler's, shapes
                that differ.
            IndexError: a step after the last one.
        """
        index = self._begin(timestep)
        config = self.config
        exact, stochastic = config.exact, config.stochastic_sampling
        plain = per_token_timesteps is None and not stochastic
        if exact and not (plain and _alike(sample, model_output)):
            return FlowMatchEulerDiscreteScheduler.step(
                self,
                model_output,
                timestep,
                sample,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        check_output(model_output, sample)
        if exact:
            moved = self._exact_step(sample, model_output, index)
        elif plain:
            levels = self._levels
            moved = euler_step(sample, model_output, levels[index + 1] - levels[index])
        elif per_token_timesteps is not None:
            moved = self._step_tokens(sample, model_output, per_token_timesteps, generator)
        else:
            moved = self._step_stochastic(sample, model_output, index, generator)
        if moved.dtype != model_output.dtype and per_token_timesteps is None:
            moved = moved.to(model_output.dtype)
        self._step_index = index + 1
        return FlowMatchEulerDiscreteSchedulerOutput(cast(Any, moved)) if return_dict else (moved,)

    def _exact_step(self, sample: Tensor, velocity: Tensor, index: int) -> Tensor:
        """diffusers' roundings in two passes: the product to the model's dtype, then the sum.

        Its sum is taken in float32 and then rounded; a sum in the narrower dtype itself is, too.
        """
        dt = self.sigmas[index + 1] - self.sigmas[index]
        return (dt * velocity).add_(sample)

    def _step_stochastic(
        self, sample: Tensor, velocity: Tensor, index: int, generator: Any
    ) -> Tensor:
        """Back to the data, and from there to the next level with other noise."""
        sigma, following = self._levels[index : index + 2]
        x0 = euler_step(sample.to(wide(sample)), velocity, -sigma)
        return x0.lerp_(self._noise(x0, generator), following)

    def _step_tokens(
        self, sample: Tensor, velocity: Tensor, timesteps: Tensor, generator: Any
    ) -> Tensor:
        sigma, following = self._token_levels(sample, timesteps)
        tokens = sample.to(wide(sample)).flatten(0, -2)
        velocities = velocity.flatten(0, -2)
        if self.config.stochastic_sampling:
            x0 = euler_step(tokens, velocities, -sigma)
            noise = self._noise(sample, generator).flatten(0, -2)
            moved = x0.lerp_(noise, following.to(x0.dtype).unsqueeze(-1))
        else:
            moved = euler_step(tokens, velocities, sigma - following)
        return moved.reshape(sample.shape)

    def _token_levels(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's level and the next lower one of the schedule (or 0), [B·S] each."""
        try:
            timesteps = timesteps.expand(sample.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"per_token_timesteps: got shape {tuple(timesteps.shape)}, need "
                f"{tuple(sample.shape[:-1])}, one for each token of the sample"
            ) from None
        # No float64 on Apple's GPUs.
        dtype = torch.float32 if timesteps.device.type == "mps" else torch.float64
        ladder = torch.tensor([0.0, *sorted(self._levels)], dtype=dtype, device=timesteps.device)
        sigma = timesteps.reshape(-1).to(dtype) / self.config.num_train_timesteps
        below = torch.searchsorted(ladder, sigma - 1e-6) - 1
        return sigma, ladder[below.clamp_(min=0)]

    @staticmethod
    def _noise(like: Tensor, generator: Any) -> Tensor:
        """diffusers' numbers: drawn in float32, whatever the model's dtype."""
        drawn = randn_tensor(
            like.shape, generator=generator, device=like.device, dtype=torch.float32
        )
        return drawn.to(wide(like))


def _alike(sample: Tensor, velocity: Tensor) -> bool:
    """Whether a sum in their own dtype is diffusers' sum in float32, rounded."""
    same = sample.dtype == velocity.dtype and sample.shape == velocity.shape
    return same and sample.dtype in (torch.float32, torch.bfloat16, torch.float16)
