"""Self-Corrected Flow distillation: one student for one step and for several.

The maths is in docs/scflow.md: the terms, the forms in velocities that the losses compute, and
why the steps agree.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flowkernels.distill.adversarial import Made, View, discriminator_losses, generator_loss
from flowkernels.distill.method import (
    Method,
    NullConditions,
    Phase,
    evaluating,
    frozen,
    is_number,
    null_conditions_of,
    split_batch,
    standard_normal_like,
)
from flowkernels.distill.times import TimeSampling
from flowkernels.distill.weights import check_master_weights, move_average, with_master_weights
from flowkernels.losses import interpolate, self_corrected, self_reflow
from flowkernels.ode import euler_step, sample, uniform
from flowkernels.ode.sample import guided, velocity_pair

INPUTS = ("clean", "noised")


class SCFlow(Method):
    """Distils a teacher into a student that samples well in one step and in several.

    With `f(x, t) = x - t v(x, t)`, the endpoint that a network sees from (x, t), and
    `x̂ = ε - v_θ(ε, 1)`, the student's one-step image, it minimises

        `ρ(f_θ(x_t, t) - y)`              consistency: y is f_θ⁻(x_t', t'), or x_0 where t' < τ
        `+ bidirectional · ρ(f_θ(x_t, t) - f_θ⁻(x_t'', t''))`
        `+ gan · softplus(-D(x̂))`
        `+ reflow · ‖f_θ(x_r, t) - x̂‖²`    self-correction: x_r = (1-t) x̂ + t ε, x̂ held fixed

    where x_t' and x_t'' are the teacher's Euler steps from x_t to `t' = t - U·min(t, Δ)` and
    `t'' = t + U·min(1-t, Δ)`, θ⁻ is a moving average of θ, and ρ the pseudo-Huber distance. The
    GAN sharpens x̂ alone; the last term makes every time on the line from ε to x̂ return it.

    One step: the teacher once, θ⁻ once on [x_t'; x_t''], the student once on [x_t; ε] and once on
    x_r; then the discriminator's update, on the same images x̂; then θ⁻ moves. A term of weight 0,
    or in its warm-up, costs no network call.

    Args:
        teacher: velocity network `f(x, t, **conditions)`; its weights are frozen here.
        discriminator: network to logits [B], `f(x, t, **conditions)`, with t None for clean
            images; see `flowkernels.nn.LatentDiscriminator` and `FeatureDiscriminator`. None: no
            GAN.
        student: network to train; by default a float32 copy of the teacher.
        guidance: scale of the teacher's guidance; trained into the student.
        delta: Δ, the longest step between the times that are compared.
        trunc: τ, below which the target is the data.
        huber: c of `ρ(d) = √(d² + c²) - c`, elementwise.
        bidirectional: weight of that term, relative to the consistency's 1.
        gan: weight of that term; by default 0.1 with a discriminator and 0 without.
        reflow: weight of that term.
        bidirectional_warmup: training steps before that term begins.
        gan_warmup: as before; the discriminator learns meanwhile.
        reflow_warmup: as before.
        target_decay: decay of θ⁻, per training step.
        t_sampling: "uniform" or "logit-normal".
        t_range: (lo, hi) of the training times.
        logit_mean: mean of the logit of t, for "logit-normal".
        logit_std: its standard deviation.
        t_grid: round times up to multiples of 1/t_grid (1000 for text-to-image).
        discriminator_input: "clean" images, or "noised" to t', real and fake with the same noise
            (text-to-image).
        r1: γ of the penalty `γ/2 ‖∇D(x_0)‖²`; by default 1 on clean images, 0 on noised ones.
        r1_every: apply it every so many steps, times as many.
        null_conditions: makes the unconditional inputs of a dict of conditions; by default the
            teacher's method of that name. Used where `guidance` is not 1.

    Attributes:
        target: θ⁻, moved by `after_step`.
        step: training steps done; warm-ups and the penalty's turn depend on it. It is part of the
            state, as are all four networks.

    Raises:
        ValueError: an option out of its range, by name; networks that are the same object; a
            student or discriminator with weights of 16 bits, which small updates would leave as
            they are.

    Example:
        >>> from flowkernels.nn import MMDiT, MMDiTConfig
        >>> teacher = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
        >>> method = SCFlow(teacher)
        >>> batch = {"x0": torch.randn(2, 4, 4, 4), "labels": torch.tensor([0, 2])}
        >>> sorted(method.losses(batch))
        ['reflow', 'self_corrected']
        >>> method.generate(torch.randn(1, 4, 4, 4), 2, labels=torch.tensor([1])).shape
        torch.Size([1, 4, 4, 4])

    Source: arXiv 2412.16906.
    """

    deploy = "student"

    def __init__(
        self,
        teacher: nn.Module,
        discriminator: nn.Module | None = None,
        *,
        student: nn.Module | None = None,
        guidance: float = 1.0,
        delta: float = 0.1,
        trunc: float = 0.4,
        huber: float = 0.01,
        bidirectional: float = 0.1,
        gan: float | None = None,
        reflow: float = 0.1,
        bidirectional_warmup: int = 0,
        gan_warmup: int = 0,
        reflow_warmup: int = 0,
        target_decay: float = 0.9,
        t_sampling: str = "uniform",
        t_range: tuple[float, float] = (0.0, 1.0),
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        t_grid: int | None = None,
        discriminator_input: str = "clean",
        r1: float | None = None,
        r1_every: int = 1,
        null_conditions: NullConditions | None = None,
    ) -> None:
        super().__init__()
        gan = (0.0 if discriminator is None else 0.1) if gan is None else gan
        r1 = (1.0 if discriminator_input == "clean" else 0.0) if r1 is None else r1
        self.weights = {"bidirectional": bidirectional, "gan": gan, "reflow": reflow}
        self.warmups = {
            "bidirectional": bidirectional_warmup,
            "gan": gan_warmup,
            "reflow": reflow_warmup,
        }
        _check_options(
            guidance, delta, trunc, huber, target_decay, t_grid, discriminator_input, r1, r1_every
        )
        _check_terms(self.weights, self.warmups)
        if gan and discriminator is None:
            raise ValueError(f"gan is {gan}, but there is no discriminator; it needs one, or gan=0")
        if discriminator is not None and discriminator in (teacher, student):
            raise ValueError("discriminator is the teacher or the student; it needs its own")
        self.student = with_master_weights(student, teacher, "student")
        self.target = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.teacher = teacher.requires_grad_(False).eval()
        self.discriminator = discriminator if gan else None
        if self.discriminator is not None:
            check_master_weights(self.discriminator, "discriminator")
        self.guidance = guidance
        self.delta = delta
        self.trunc = trunc
        self.huber = huber
        self.target_decay = target_decay
        self.times = TimeSampling(t_sampling, t_range, logit_mean, logit_std)
        self.t_grid = t_grid
        self.discriminator_input = discriminator_input
        self.r1 = r1
        self.r1_every = r1_every
        self.uncompiled = ("discriminator",) if r1 else ()
        self.step = 0
        self._null_conditions = (
            null_conditions_of(teacher, null_conditions, "guidance") if guidance != 1 else None
        )
        # What the student's phase made of a batch, for the discriminator's; gone with the batch.
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._monitored: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> SCFlow:
        """Sets the mode of student and discriminator; teacher and target stay in evaluation."""
        super().train(mode)
        self.teacher.eval()
        self.target.eval()
        return self

    def phases(self) -> tuple[Phase, ...]:
        """The student, then (with a GAN) the discriminator, on the same batch."""
        student = Phase("student", ("student",))
        if self.discriminator is None:
            return (student,)
        return student, Phase("discriminator", ("discriminator",), same_batch=True)

    def losses(self, batch: Mapping[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        """Weighted terms, to be summed; see `Method.losses`.

        The student's are "self_corrected" (consistency and bidirectional), "gan" and "reflow",
        the discriminator's "discriminator" and "r1". After the student's phase the
        discriminator's takes the images x̂ that it made of this very batch (the same tensors);
        without it, or a second time, it makes new ones.
        """
        x0, conditions = split_batch(batch)
        losses = {}
        if self.wants("student", phase):
            losses.update(self._student_losses(x0, conditions))
        if self.discriminator is not None and self.wants("discriminator", phase):
            losses.update(self._discriminator_losses(x0, conditions))
        return losses

    def after_step(self) -> None:
        """Counts the step; moves θ⁻ towards the student, in one sweep over the weights."""
        move_average(self.target, self.student, self.target_decay)
        self._made.clear()
        self.step += 1

    def monitors(self) -> dict[str, Tensor]:
        """The two parts of "self_corrected", unweighted, and the mean logits of D."""
        return dict(self._monitored)

    def generate(
        self, noise: Tensor, steps: int, network: nn.Module | None = None, **conditions: Tensor
    ) -> Tensor:
        """Samples in `steps` even Euler steps, any number of them; see `Method.generate`."""
        network = self.deployed(network)
        with evaluating(network):
            return sample(network, noise, uniform(steps), conditions=conditions)

    def __getstate__(self) -> dict[str, Any]:
        """Without what a step keeps for its second phase: weak keys cannot be pickled."""
        return {**self.__dict__, "_made": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_made": WeakTensorKeyDictionary()})

    def get_extra_state(self) -> dict[str, Any]:
        """The count of steps, for a bitwise resume."""
        return {"step": self.step}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores it."""
        self.step = int(state["step"])

    # ---- the student's phase --------------------------------------------------------------------

    def _student_losses(self, x0: Tensor, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = standard_normal_like(x0)
        t, t_post, t_prev = self._draw_times(len(x0), x0.device)
        x_t, _ = interpolate(x0, t, noise)
        v_teacher, v_post, v_prev = self._targets(x_t, t, t_post, t_prev, conditions)
        v, v_1 = self._velocities(x_t, t, noise, conditions)
        total, consistency, bidirectional = self_corrected(
            v,
            t,
            v_teacher,
            v_post,
            t_post,
            v_post if v_prev is None else v_prev,
            t_post if v_prev is None else t_prev,
            x0,
            noise,
            trunc=self.trunc,
            c=self.huber,
            lam_bi=0.0 if v_prev is None else self.weights["bidirectional"],
        )
        self._monitored["consistency"] = consistency.detach()
        if v_prev is not None:
            self._monitored["bidirectional"] = bidirectional.detach()
        losses = {"self_corrected": total}
        if v_1 is None:
            return losses
        fake = noise - v_1
        if self.discriminator is not None:
            made = Made(fake.detach(), self._view(x0, t_post), conditions)
            self._made[x0] = made
            if self._runs("gan"):
                loss = generator_loss(self.discriminator, fake, made.view, conditions)
                losses["gan"] = self.weights["gan"] * loss
        if self._runs("reflow"):
            v_1 = v_1.detach()
            x_r = euler_step(noise, v_1, t - 1)  # (1-t) x̂ + t ε
            v_r = self.student(x_r, t, **conditions)
            losses["reflow"] = self.weights["reflow"] * self_reflow(v_r, v_1, t)
        return losses

    def _draw_times(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """t, and t' below it and t'' above it, independent of each other."""
        t = self.times(count, device)
        if self.t_grid is not None:
            t = (t * self.t_grid).ceil() / self.t_grid
        down, up = torch.rand((2, count), device=device)
        t_post = t - down * t.clamp(max=self.delta)
        t_prev = t + up * (1 - t).clamp(max=self.delta)
        return t, t_post, t_prev

    @torch.no_grad()
    def _targets(
        self, x_t: Tensor, t: Tensor, t_post: Tensor, t_prev: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The teacher's velocity at x_t, and θ⁻'s where the teacher's steps from there lead."""
        uncond = None if self._null_conditions is None else self._null_conditions(conditions)
        v_teacher = guided(velocity_pair(self.teacher, x_t, t, conditions, uncond), self.guidance)
        x_post = euler_step(x_t, v_teacher, t_post - t)
        if not self._runs("bidirectional"):
            return v_teacher, self.target(x_post, t_post, **conditions), None
        x_prev = euler_step(x_t, v_teacher, t_prev - t)
        both = self.target(
            torch.cat([x_post, x_prev]), torch.cat([t_post, t_prev]), **_twice(conditions)
        )
        v_post, v_prev = both.chunk(2)
        return v_teacher, v_post, v_prev

    def _velocities(
        self, x_t: Tensor, t: Tensor, noise: Tensor, conditions: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """v at (x_t, t), and at (ε, 1) where a term asks: with a graph for the GAN's alone."""
        if self._runs("gan"):
            both = self.student(
                torch.cat([x_t, noise]), torch.cat([t, torch.ones_like(t)]), **_twice(conditions)
            )
            v, v_1 = both.chunk(2)
            return v, v_1
        v = self.student(x_t, t, **conditions)
        if self.discriminator is None and not self._runs("reflow"):
            return v, None
        return v, self._one_step_velocity(noise, conditions)

    def _one_step_velocity(self, noise: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        # Frozen, so that autocast keeps no weights that it cast without a graph: the calls that
        # need one would find them.
        with torch.no_grad(), frozen(self.student):
            ones = torch.ones(len(noise), device=noise.device)
            velocity: Tensor = self.student(noise, ones, **conditions)
            return velocity

    def _runs(self, term: str) -> bool:
        return self.weights[term] > 0 and self.step >= self.warmups[term]

    # ---- the discriminator's phase --------------------------------------------------------------

    def _view(self, x0: Tensor, t_post: Tensor) -> View:
        if self.discriminator_input == "clean":
            return View()
        return View(t_post, standard_normal_like(x0))

    def _discriminator_losses(self, x0: Tensor, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.discriminator is not None  # else there is no such phase
        made = self._made.pop(x0, None)
        if made is None or not made.is_of(conditions):
            noise = standard_normal_like(x0)
            _, t_post, _ = self._draw_times(len(x0), x0.device)
            fake = noise - self._one_step_velocity(noise, conditions)
            made = Made(fake, self._view(x0, t_post), conditions)
        due = self.r1 > 0 and self.step % self.r1_every == 0
        losses, logits = discriminator_losses(
            self.discriminator,
            x0,
            made.fake,
            made.view,
            conditions,
            penalty=self.r1 * self.r1_every if due else 0.0,
        )
        self._monitored.update(logits)
        return losses


def _twice(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([value, value]) for name, value in conditions.items()}


def _check_options(
    guidance: float,
    delta: float,
    trunc: float,
    huber: float,
    target_decay: float,
    t_grid: int | None,
    discriminator_input: str,
    r1: float,
    r1_every: int,
) -> None:
    decay, grid = target_decay, t_grid
    _require(is_number(guidance), "guidance", guidance, "be a finite number")
    _require(is_number(delta) and 0 < delta <= 1, "delta", delta, "lie in (0, 1]")
    _require(is_number(trunc) and 0 <= trunc <= 1, "trunc", trunc, "lie in [0, 1]")
    _require(is_number(huber) and 1e-18 <= huber <= 1e18, "huber", huber, "lie in [1e-18, 1e18]")
    _require(is_number(decay) and 0 <= decay < 1, "target_decay", decay, "lie in [0, 1)")
    _require(grid is None or _is_count(grid, 1), "t_grid", grid, "be None or an int of at least 1")
    known = discriminator_input in INPUTS
    _require(known, "discriminator_input", discriminator_input, "be 'clean' or 'noised'")
    _require(is_number(r1) and r1 >= 0, "r1", r1, "be a number of at least 0")
    _require(_is_count(r1_every, 1), "r1_every", r1_every, "be an int of at least 1")


def _check_terms(weights: Mapping[str, float], warmups: Mapping[str, int]) -> None:
    for name, weight in weights.items():
        _require(is_number(weight) and weight >= 0, name, weight, "be a number of at least 0")
    for name, steps in warmups.items():
        _require(_is_count(steps, 0), f"{name}_warmup", steps, "be an int of at least 0")


def _require(holds: bool, name: str, value: object, needs: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must {needs}")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least
