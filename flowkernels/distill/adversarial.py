"""A discriminator in a method: what it is shown, its losses, what it asks of a generator.

Real and fake images go through it in calls of their own, or in one that it offers for both
(`pairs`): statistics over a group of samples must never mix them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowkernels.distill.input_gradient import InputGradient
from flowkernels.distill.method import frozen
from flowkernels.losses import gan_discriminator, gan_generator, interpolate, r1_penalty


@dataclasses.dataclass(frozen=True)
class View:
    """How a discriminator sees images: as they are, or noised to given times.

    Args:
        t: [B] times, or None for images as they are.
        noise: [B, ...], the same for real and fake; with `t` only.
    """

    t: Tensor | None = None
    noise: Tensor | None = None

    def logits(
        self, discriminator: nn.Module, images: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """The discriminator's logits [B] of images [B, ...]."""
        logits: Tensor = discriminator(self._seen(images), self.t, **conditions)
        return logits

    def both_logits(
        self,
        discriminator: nn.Module,
        real: Tensor,
        fake: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Its logits of real and of fake images, from one call where it keeps them apart."""
        pairs = getattr(discriminator, "pairs", None)
        if pairs is None:
            real_logits = self.logits(discriminator, real, conditions)
            return real_logits, self.logits(discriminator, fake, conditions)
        real_logits, fake_logits = pairs(self._seen(real), self._seen(fake), self.t, **conditions)
        return real_logits, fake_logits

    def _seen(self, images: Tensor) -> Tensor:
        if self.t is None:
            return images
        seen, _ = interpolate(images, self.t, self.noise)
        return seen


@dataclasses.dataclass(frozen=True)
class Made:
    """Images that a generator made of a batch's conditions, and how a discriminator sees them.

    Args:
        fake: [B, ...], without a graph.
        view: how it sees them.
        conditions: keyword tensors [B, ...].
    """

    fake: Tensor
    view: View
    conditions: Mapping[str, Tensor]

    def is_of(self, conditions: Mapping[str, Tensor]) -> bool:
        """Whether these are the very tensors that they were made of."""
        return conditions.keys() == self.conditions.keys() and all(
            value is self.conditions[name] for name, value in conditions.items()
        )


def generator_loss(
    discriminator: nn.Module, fake: Tensor, view: View, conditions: Mapping[str, Tensor]
) -> Tensor:
    """`softplus(-D(x̂))` in the mean, with a gradient to x̂ and none to the discriminator.

    Its graph through the discriminator is differentiated and freed in the forward pass: what
    stays alive is the generator's own.

    Args:
        discriminator: network to logits, `f(x, t, **conditions)`.
        fake: [B, ...] generated images.
        view: how it sees them.
        conditions: keyword tensors [B, ...].

    Returns:
        0-d loss.
    """
    loss: Tensor = InputGradient.apply(fake, _Judged(discriminator, view, conditions))  # type: ignore[no-untyped-call]
    return loss


def discriminator_losses(
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor,
    view: View,
    conditions: Mapping[str, Tensor],
    penalty: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`softplus(-D(x_0)) + softplus(D(x̂))`, and R1 on the real images.

    Args:
        discriminator: network to logits.
        real: [B, ...] data.
        fake: [B, ...] generated images; gets no gradient.
        view: how it sees both.
        conditions: keyword tensors of both.
        penalty: γ of `γ/2 ‖∇D(x_0)‖²`; 0 for none.

    Returns:
        The losses {"discriminator"} and, with a penalty, {"r1"}; and the mean logits of both, for
        logs.
    """
    real, fake = real.detach(), fake.detach()
    if penalty:
        # Calls of their own: the penalty's second backward would run over the fake half too.
        real = real.requires_grad_()
        real_logits = view.logits(discriminator, real, conditions)
        fake_logits = view.logits(discriminator, fake, conditions)
    else:
        real_logits, fake_logits = view.both_logits(discriminator, real, fake, conditions)
    losses = {"discriminator": gan_discriminator(real_logits, fake_logits)}
    if penalty:
        losses["r1"] = r1_penalty(real_logits, real, penalty)
    logits = {
        "real_logit": real_logits.detach().mean(),
        "fake_logit": fake_logits.detach().mean(),
    }
    return losses, logits


@dataclasses.dataclass(frozen=True)
class _Judged:
    """The generator's loss as a function of its images, for `InputGradient`."""

    discriminator: nn.Module
    view: View
    conditions: Mapping[str, Tensor]

    def value(self, x0: Tensor) -> Tensor:
        """The loss without any gradient."""
        with frozen(self.discriminator), torch.no_grad():
            return self._loss(x0)

    def value_and_gradient(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient with respect to the images."""
        # Frozen weights are also kept out of autocast's cache, where the discriminator's own
        # phase would find them without a graph.
        with frozen(self.discriminator), torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            loss = self._loss(x0)
            # A backward pass must not be autocast again: its operands already have their dtypes.
            with torch.autocast(x0.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(loss, x0)
        return loss.detach(), gradient

    def _loss(self, x0: Tensor) -> Tensor:
        return gan_generator(self.view.logits(self.discriminator, x0, self.conditions))
