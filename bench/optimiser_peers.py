"""What the fused optimiser is measured against, and the float64 step that all are checked with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.numerics import relative_error

Tensor = torch.Tensor


@dataclass(frozen=True)
class Recipe:
    """The settings of one update."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    ema_decays: tuple[float, float] = (0.999, 0.9999)
    max_grad_norm: float | None = None


class Stepper(Protocol):
    def call(self, index: int) -> Any: ...

    def state(self) -> list[Tensor]:
        """Parameters, then each average's."""
        ...


class Eager:
    """``clip_grad_norm_``, ``AdamW(fused=True)`` and ``_foreach_lerp_``."""

    def __init__(self, values: Sequence[Tensor], grads: Sequence[Tensor], recipe: Recipe) -> None:
        self._recipe = recipe
        self._parameters = [x.clone().requires_grad_() for x in values]
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad.clone()
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._averages = [[x.clone() for x in values] for _ in recipe.ema_decays]

    @torch.no_grad()
    def call(self, index: int) -> None:
        if self._recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm)
        self._optimiser.step()
        for averages, decay in zip(self._averages, self._recipe.ema_decays, strict=True):
            torch._foreach_lerp_(averages, self._parameters, 1 - decay)

    def state(self) -> list[Tensor]:
        return [*self._parameters, *(x for averages in self._averages for x in averages)]


class Lists:
    """The update written over lists of tensors, in one function that ``compiler`` compiles."""

    def __init__(
        self,
        values: Sequence[Tensor],
        grads: Sequence[Tensor],
        recipe: Recipe,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        device = values[0].device
        self._parameters = [x.clone() for x in values]
        self._grads = [x.clone() for x in grads]
        self._first = [torch.zeros_like(x) for x in values] if recipe.betas[0] else None
        self._second = [torch.zeros_like(x) for x in values]
        self._averages = [[x.clone() for x in values] for _ in recipe.ema_decays]
        self._step = torch.zeros((), device=device)
        self._update = compiler(_update_lists)
        self._recipe = recipe

    @torch.no_grad()
    def call(self, index: int) -> None:
        self._update(
            self._parameters, self._grads, self._first, self._second, self._averages, self._step,
            self._recipe,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        return [*self._parameters, *(x for averages in self._averages for x in averages)]


def _update_lists(
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor] | None,
    second: list[Tensor],
    averages: list[list[Tensor]],
    step: Tensor,
    recipe: Recipe,
) -> None:
    beta1, beta2 = recipe.betas
    step.add_(1)
    if recipe.max_grad_norm is not None:
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        )
        clip = (recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [grad * clip for grad in grads]
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for index, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        momentum = grad if first is None else first[index].lerp_(grad, 1 - beta1)
        second[index].mul_(beta2).add_(grad * grad * (1 - beta2))
        divisor = (second[index] / correction2).sqrt() + recipe.eps
        parameter.mul_(1 - recipe.lr * recipe.weight_decay)
        parameter.sub_(recipe.lr * (momentum / correction1) / divisor)
        for average, decay in zip(averages, recipe.ema_decays, strict=True):
            average[index].lerp_(parameter, 1 - decay)


def truth(values: Sequence[Tensor], grads: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    """Parameters and averages after the first step, in float64."""
    exact_grads = [x.double() for x in grads]
    if recipe.max_grad_norm is not None:
        norm = torch.sqrt(sum((x.square().sum() for x in exact_grads), torch.zeros(()).double()))
        clip = min(1.0, recipe.max_grad_norm / (float(norm) + 1e-6))
        exact_grads = [x * clip for x in exact_grads]
    # At the first step both moments, corrected, are the gradient and its square.
    parameters = [
        x.double() * (1 - recipe.lr * recipe.weight_decay)
        - recipe.lr * grad / (grad.abs() + recipe.eps)
        for x, grad in zip(values, exact_grads, strict=True)
    ]
    averages = [
        torch.lerp(x.double(), parameter, 1 - decay)
        for decay in recipe.ema_decays
        for x, parameter in zip(values, parameters, strict=True)
    ]
    return [*parameters, *averages]


def verify(
    steppers: Mapping[str, Stepper],
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    recipe: Recipe,
) -> dict[str, float]:
    """Take each variant's first step and compare it with float64.

    A step is some hundred times smaller than the parameters and an average's step a thousand times
    smaller again, so what float32 keeps of the latter is about three digits: the parameters' steps
    are compared to 1e-3, the averages as they stand to 1e-6.

    Raises:
        AssertionError: A variant takes another step.
    """
    exact = truth(values, grads, recipe)
    count = len(values)
    errors = {}
    for name, stepper in steppers.items():
        stepper.call(0)
        found = stepper.state()
        moved = max(
            relative_error(x.detach().double() - x0, y - x0.double())
            for x, y, x0 in zip(found[:count], exact[:count], values, strict=True)
        )
        averaged = max(
            relative_error(x.detach(), y) for x, y in zip(found[count:], exact[count:], strict=True)
        )
        if not (moved <= 1e-3 and averaged <= 1e-6):
            raise AssertionError(
                f"{name}: the first step is off by {moved:.1e} (at most 1e-3), its averages by "
                f"{averaged:.1e} (at most 1e-6)"
            )
        errors[name] = moved
    return errors
