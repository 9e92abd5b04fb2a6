"""The gradient of a distillation loss with respect to the generator's samples alone.

Teacher and fake are constants of the generator's loss, yet gradients pass through their inputs.
So the whole loss is one function of x_0: `InputGradient` computes its value and ∂x_0 in the
forward pass, frees every activation of both networks, and only scales ∂x_0 in backward. What
stays alive in between is the generator's own graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowkernels.distill.method import evaluating, frozen
from flowkernels.losses import interpolate
from flowkernels.ode.sample import velocity_pair


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A loss `loss(u, u_uncond, v, x_0, ε, t)` of two frozen networks at one x_t.

    Args:
        teacher: network of u, and of u_uncond where `uncond` is given.
        fake: network of v.
        loss: a scalar of (u, u_uncond, v, x_0, ε, t), differentiable in the first four.
        t: [B] times.
        noise: ε [B, ...], independent of x_0.
        conditions: keyword tensors of both networks.
        uncond: the teacher's unconditional inputs, or None.
        split: differentiate the networks one after the other.
        eval_mode: put both in evaluation mode.
    """

    teacher: nn.Module
    fake: nn.Module
    loss: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], Tensor]
    t: Tensor
    noise: Tensor
    conditions: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None
    split: bool
    eval_mode: bool

    def value(self, x0: Tensor) -> Tensor:
        """The loss without any gradient."""
        with self._held(), torch.no_grad():
            x_t, _ = interpolate(x0, self.t, self.noise)
            v = self._fake_velocity(x_t)
            u, u_uncond = self._teacher_velocities(x_t)
            return self.loss(u, u_uncond, v, x0, self.noise, self.t)

    def value_and_gradient(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its whole gradient with respect to x_0."""
        with self._held(), torch.enable_grad():
            return self._split(x0.detach()) if self.split else self._joint(x0.detach())

    def _joint(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks in one graph."""
        x0 = x0.requires_grad_()
        x_t, _ = interpolate(x0, self.t, self.noise)
        v = self._fake_velocity(x_t)
        u, u_uncond = self._teacher_velocities(x_t)
        loss = self.loss(u, u_uncond, v, x0, self.noise, self.t)
        (gradient,) = _gradients([loss], [x0])
        return loss.detach(), gradient

    def _split(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """`∂x_0 = direct + (1-t)(J_uᵀ∂u + J_vᵀ∂v)`, one network's activations at a time.

        The fake runs twice: first for its value, which the teacher's gradient needs, and again
        with a graph once the teacher's is gone.
        """
        x_t, _ = interpolate(x0, self.t, self.noise)
        replay = _replayable(x0.device, active=not self.eval_mode)
        with torch.no_grad():
            v = self._fake_velocity(x_t)

        x_in = x_t.detach().requires_grad_()
        velocities = [u for u in self._teacher_velocities(x_in) if u is not None]
        leaves = [leaf.detach().requires_grad_() for leaf in (*velocities, v, x0)]
        u_uncond = leaves[1] if len(velocities) == 2 else None
        loss = self.loss(leaves[0], u_uncond, leaves[-2], leaves[-1], self.noise, self.t)
        *d_velocities, dv, direct = _gradients([loss], leaves)
        (through_teacher,) = _gradients(velocities, [x_in], d_velocities)
        del velocities, leaves, d_velocities

        x_in = x_t.detach().requires_grad_()
        with replay():
            v = self._fake_velocity(x_in)
        (through_fake,) = _gradients([v], [x_in], [dv])

        keep = (1 - self.t).view(-1, *[1] * (x0.dim() - 1))
        return loss.detach(), direct + keep * (through_teacher + through_fake)

    def _fake_velocity(self, x_t: Tensor) -> Tensor:
        velocity: Tensor = self.fake(x_t, self.t, **self.conditions)
        return velocity

    def _teacher_velocities(self, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        return velocity_pair(self.teacher, x_t, self.t, self.conditions, self.uncond)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen(self.teacher, self.fake))
            if self.eval_mode:
                stack.enter_context(evaluating(self.teacher, self.fake))
            yield


class Plan(Protocol):
    """A loss of generated samples whose gradient is taken at once."""

    def value(self, x0: Tensor) -> Tensor:
        """The loss without any gradient."""

    def value_and_gradient(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient with respect to x_0."""


class InputGradient(torch.autograd.Function):
    """A plan's loss as a function of x_0: (x_0, plan) to a scalar."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, plan: Plan) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return plan.value(x0)
        loss, gradient = plan.value_and_gradient(x0)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    # A backward pass must not be autocast again: its operands already have their dtypes.
    with torch.autocast(inputs[0].device.type, enabled=False):
        return torch.autograd.grad(outputs, inputs, grad_outputs)


def _replayable(device: torch.device, *, active: bool) -> Callable[[], Any]:
    """A context manager factory that repeats the random draws made from this moment on."""
    if not active:
        return contextlib.nullcontext
    on_gpu = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()

    @contextlib.contextmanager
    def replay() -> Iterator[None]:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            if on_gpu:
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
            yield

    return replay
