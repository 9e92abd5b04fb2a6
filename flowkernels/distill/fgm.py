"""Flow Generator Matching: a flow model becomes a one-step generator.

The maths is in docs/fgm.md: where the two terms come from, their gradients, the family in λ,
and why the split form is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.distill.input_gradient import Frozen, InputGradient
from flowkernels.distill.method import (
    Method,
    NullConditions,
    Phase,
    check_reduction,
    evaluating,
    is_number,
    null_conditions_of,
    scaled,
    split_batch,
    standard_normal_like,
    trainable,
)
from flowkernels.distill.times import TimeSampling
from flowkernels.losses import fgm, flow_matching, interpolate

WEIGHTINGS = (None, "t2(1-t)", "sid")


class FGM(Method):
    """Distils a velocity network into a one-step generator, without data.

    The generator makes `x_0 = σ* z - σ* v_θ(σ* z, t*)`. A second network, the fake flow v,
    learns the velocity of the generator's own samples, and the generator minimises

        `ℓ = ω(t) (2⟨d, e⟩ + λ⟨d, d⟩)`,   `d = u - v`,  `e = v - w`,  `w = ε - x_0`,

    with u the teacher (guided by `guidance`) and all of them at `x_t = (1-t) x_0 + t ε`, with ε
    independent of z. Gradients flow through x_t, x_0 and w into the generator alone; the
    weights of teacher and fake get none. One step updates the fake `fake_steps` times, then
    the generator once. From the batch the method takes shapes and conditions, no data.

    Args:
        teacher: velocity network `f(x, t, **conditions)`; its weights are frozen here.
        generator: network of the one-step generator; by default a copy of the teacher.
        fake: network of the fake flow; by default a copy of the teacher.
        lam: λ. 0, the practical form; 1, the exact objective; -0.4, SiD with α = 1.2.
        weighting: ω: None for 1, "t2(1-t)" for t²(1-t), "sid" for t/(2·max(mean|u-w|, 1e-5))
            per sample, constant in the gradient.
        guidance: scale s of the teacher, `u = u_uncond + s (u_cond - u_uncond)`, as one batch
            of 2B.
        fake_steps: K, updates of the fake per step.
        t_sampling: "uniform" or "logit-normal".
        t_range: (lo, hi) of the training times, for both phases.
        logit_mean: mean of the logit of t, for "logit-normal".
        logit_std: its standard deviation.
        t_star: t*, the time the generator is asked at, in (0, 1].
        sigma_star: σ*, the scale of its noise; by default t*.
        split_vjp: differentiate teacher and fake one after the other: the same gradient, with
            one more forward of the fake, and with the activations of one of them at a time in
            memory instead of both.
        frozen_mode: "eval" puts teacher and fake in evaluation mode in the generator's phase;
            "train" leaves their modes alone (then dropout is drawn once per step and replayed
            by the split form).
        reduction: "mean" over elements and batch, or "sum" over a sample's elements and mean
            over the batch.
        null_conditions: makes the unconditional inputs of a dict of conditions; by default the
            teacher's method of that name. Used where `guidance` is not 1.

    Attributes:
        nonfinite: int32 0-d, samples left out of the generator's loss so far because a value
            was not finite.

    Raises:
        ValueError: an option out of its range, by name; networks that are the same object.

    Example:
        >>> from flowkernels.nn import MMDiT, MMDiTConfig
        >>> teacher = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
        >>> method = FGM(teacher, weighting="sid", t_range=(0.02, 0.98))
        >>> [phase.name for phase in method.phases()]
        ['fake', 'generator']
        >>> batch = {"x0": torch.randn(2, 4, 4, 4), "labels": torch.tensor([0, 2])}
        >>> sorted(method.losses(batch))
        ['fake', 'generator']

    Source: arXiv 2410.19310; arXiv 2404.04057 for the "sid" weighting.
    """

    deploy = "generator"
    nonfinite: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        *,
        generator: nn.Module | None = None,
        fake: nn.Module | None = None,
        lam: float = 0.0,
        weighting: str | None = None,
        guidance: float = 1.0,
        fake_steps: int = 1,
        t_sampling: str = "uniform",
        t_range: tuple[float, float] = (0.0, 1.0),
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        t_star: float = 1.0,
        sigma_star: float | None = None,
        split_vjp: bool = False,
        frozen_mode: str = "eval",
        reduction: str = "mean",
        null_conditions: NullConditions | None = None,
    ) -> None:
        super().__init__()
        sigma_star = t_star if sigma_star is None else sigma_star
        _check_options(lam, weighting, guidance, fake_steps, t_star, sigma_star, frozen_mode)
        check_reduction(reduction)
        self.generator = trainable(generator, teacher, "generator")
        self.fake = trainable(fake, teacher, "fake")
        if self.generator is self.fake:
            raise ValueError("generator and fake are the same object; each needs its own weights")
        self.teacher = teacher.requires_grad_(False).eval()
        self.lam = lam
        self.weighting = weighting
        self.guidance = guidance
        self.fake_steps = fake_steps
        self.times = TimeSampling(t_sampling, t_range, logit_mean, logit_std)
        self.t_star = t_star
        self.sigma_star = sigma_star
        self.split_vjp = split_vjp
        self.frozen_mode = frozen_mode
        self.reduction = reduction
        self._null_conditions = (
            null_conditions_of(teacher, null_conditions, "guidance") if guidance != 1 else None
        )
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int32))

    def train(self, mode: bool = True) -> FGM:
        """Sets the mode of generator and fake; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def phases(self) -> tuple[Phase, ...]:
        """The fake, `fake_steps` times, then the generator."""
        return (
            Phase("fake", ("fake",), repeats=self.fake_steps),
            Phase("generator", ("generator",)),
        )

    def losses(self, batch: Mapping[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        """{"fake": loss} and/or {"generator": loss}; see `Method.losses`.

        The generator's loss is a signed difference near zero: its value says nothing about
        convergence.
        """
        x0, conditions = split_batch(batch)
        losses = {}
        if self.wants("fake", phase):
            losses["fake"] = self._fake_loss(standard_normal_like(x0), conditions)
        if self.wants("generator", phase):
            losses["generator"] = self._generator_loss(standard_normal_like(x0), conditions)
        return losses

    def generate(
        self, noise: Tensor, steps: int = 1, network: nn.Module | None = None, **conditions: Tensor
    ) -> Tensor:
        """One-step samples `σ* z - σ* v(σ* z, t*)`; see `Method.generate`.

        Raises:
            ValueError: `steps` is not 1.
        """
        if steps != 1:
            raise ValueError(f"steps is {steps}; an FGM generator samples in 1")
        network = self.deployed(network)
        with torch.no_grad(), evaluating(network):
            return self._one_step(network, noise, conditions)

    def _one_step(
        self, network: nn.Module, noise: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        z = noise if self.sigma_star == 1 else self.sigma_star * noise
        t = torch.full((len(z),), self.t_star, device=z.device, dtype=torch.float32)
        return torch.sub(z, network(z, t, **conditions), alpha=self.sigma_star)

    def _fake_loss(self, z: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Flow matching of the fake on the generator's samples."""
        # Autocast would cache the generator's weights cast without a graph, and the generator's
        # own phase would then find them and get no gradient.
        with torch.no_grad():
            x0 = self._one_step(self.generator, z, conditions)
        torch.clear_autocast_cache()
        t = self.times(len(x0), x0.device)
        noise = standard_normal_like(x0)
        x_t, _ = interpolate(x0, t, noise)
        velocity = self.fake(x_t, t, **conditions)
        loss = flow_matching(velocity, x0, noise, reduction=self.reduction)
        return scaled(loss, self.reduction, len(x0))

    def _generator_loss(self, z: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """ℓ on fresh z, t and ε; ε is never z (docs/fgm.md, "the trap")."""
        x0 = self._one_step(self.generator, z, conditions)
        plan = Frozen(
            teacher=self.teacher,
            fake=self.fake,
            loss=self._loss,
            t=self.times(len(x0), x0.device),
            noise=standard_normal_like(x0),
            conditions=conditions,
            uncond=None if self._null_conditions is None else self._null_conditions(conditions),
            split=self.split_vjp,
            eval_mode=self.frozen_mode == "eval",
        )
        loss: Tensor = InputGradient.apply(x0, plan)  # type: ignore[no-untyped-call]
        return scaled(loss, self.reduction, len(x0))

    def _loss(
        self, u: Tensor, u_uncond: Tensor | None, v: Tensor, x0: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        options: dict[str, Any] = {}
        if self.weighting == "t2(1-t)":
            options["weight"] = t * t * (1 - t)
        elif self.weighting == "sid":
            options["normalize"] = "sid"
        return fgm(
            u,
            v,
            x0,
            noise,
            t,
            lam=self.lam,
            u_uncond=u_uncond,
            guidance=self.guidance,
            nonfinite=self.nonfinite,
            reduction=self.reduction,
            **options,
        )


def _check_options(
    lam: float,
    weighting: str | None,
    guidance: float,
    fake_steps: int,
    t_star: float,
    sigma_star: float,
    frozen_mode: str,
) -> None:
    for name, value in (("lam", lam), ("guidance", guidance)):
        if not is_number(value):
            raise ValueError(f"{name} is {value!r}; it must be a finite number")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting is {weighting!r}; it must be None, 't2(1-t)' or 'sid'")
    if type(fake_steps) is not int or fake_steps < 1:
        raise ValueError(f"fake_steps is {fake_steps!r}; it must be an int of at least 1")
    if not is_number(t_star) or not 0 < t_star <= 1:
        raise ValueError(f"t_star is {t_star!r}; it must lie in (0, 1]")
    if not is_number(sigma_star) or sigma_star <= 0:
        raise ValueError(f"sigma_star is {sigma_star!r}; it must be a positive number")
    if frozen_mode not in ("eval", "train"):
        raise ValueError(f"frozen_mode is {frozen_mode!r}; it must be 'eval' or 'train'")
