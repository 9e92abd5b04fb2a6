"""Flow matching: how a teacher is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
)
from flowkernels.distill.times import TimeSampling
from flowkernels.losses import contrastive_flow_matching, flow_matching, interpolate
from flowkernels.ode import METHODS, sample, shifted


class FlowMatching(Method):
    """Trains a velocity network on data: `E‖v(x_t, t) - (ε - x_0)‖²`, `x_t = (1-t) x_0 + t ε`.

    With `contrastive` λ each velocity is also held away from that of another item of the batch,
    `ũ = ε' - x_0'`: the loss is `‖v - (ε - x_0)‖² - λ‖v - ũ‖²` (docs/siblings.md says what that
    does to the samples).

    Args:
        model: velocity network `f(x, t, **conditions)`.
        contrastive: λ in [0, 1); 0 is plain flow matching. The other item is drawn anew for each
            batch, any of the others with the same probability, and no two samples share theirs. A
            batch of one has no other item: its loss is that of λ = 0.
        drop_condition: probability that a sample's conditions are all replaced by "nothing",
            which is what guidance needs later.
        t_sampling: "uniform" or "logit-normal".
        t_range: (lo, hi) of the training times.
        logit_mean: mean of the logit of t, for "logit-normal".
        logit_std: its standard deviation.
        guidance: guidance scale of `generate`.
        sampler: method of `generate`, see `flowkernels.ode.sample`.
        shift: time shift of `generate`'s schedule; 1 is uniform.
        reduction: "mean" over elements and batch, or "sum" over a sample's elements and mean
            over the batch.
        null_conditions: makes "nothing" of a dict of conditions; by default the model's method
            of that name.

    Raises:
        ValueError: an option out of its range, by name.

    Example:
        >>> from flowkernels.nn import MMDiT, MMDiTConfig
        >>> model = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
        >>> method = FlowMatching(model, drop_condition=0.1)
        >>> batch = {"x0": torch.randn(2, 4, 4, 4), "labels": torch.tensor([0, 2])}
        >>> sorted(method.losses(batch))
        ['flow_matching']

    Source: arXiv 2210.02747; arXiv 2207.12598 for dropped conditions; arXiv 2506.05350 for the
    contrastive term.
    """

    deploy = "model"

    def __init__(
        self,
        model: nn.Module,
        *,
        contrastive: float = 0.0,
        drop_condition: float = 0.1,
        t_sampling: str = "uniform",
        t_range: tuple[float, float] = (0.0, 1.0),
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        guidance: float = 1.0,
        sampler: str = "euler",
        shift: float = 1.0,
        reduction: str = "mean",
        null_conditions: NullConditions | None = None,
    ) -> None:
        super().__init__()
        if not is_number(contrastive) or not 0 <= contrastive < 1:
            raise ValueError(f"contrastive is {contrastive!r}; it must lie in [0, 1)")
        if not is_number(drop_condition) or not 0 <= drop_condition <= 1:
            raise ValueError(f"drop_condition is {drop_condition!r}; it must lie in [0, 1]")
        if not is_number(guidance):
            raise ValueError(f"guidance is {guidance!r}; it must be a finite number")
        if sampler not in METHODS:
            raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(METHODS)}")
        shifted(1, shift)  # raises for a shift that no schedule can have
        check_reduction(reduction)
        self.model = model
        self.contrastive = contrastive
        self.drop_condition = drop_condition
        self.times = TimeSampling(t_sampling, t_range, logit_mean, logit_std)
        self.guidance = guidance
        self.sampler = sampler
        self.shift = shift
        self.reduction = reduction
        self._given_null_conditions = null_conditions

    def phases(self) -> tuple[Phase, ...]:
        """One phase, "model"."""
        return (Phase("model", ("model",)),)

    def losses(self, batch: Mapping[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        """{"flow_matching": the loss}; see `Method.losses`."""
        self.wants("model", phase)
        x0, conditions = split_batch(batch)
        conditions = self._dropped(conditions, len(x0))
        t = self.times(len(x0), x0.device)
        noise = standard_normal_like(x0)
        x_t, _ = interpolate(x0, t, noise)
        velocity = self.model(x_t, t, **conditions)
        loss = self._loss(velocity, x0, noise)
        return {"flow_matching": scaled(loss, self.reduction, len(x0))}

    def generate(
        self, noise: Tensor, steps: int, network: nn.Module | None = None, **conditions: Tensor
    ) -> Tensor:
        """Samples in `steps` steps of the configured sampler; see `Method.generate`."""
        network = self.deployed(network)
        uncond = None
        if self.guidance != 1 and conditions:
            uncond = self._null_conditions("guidance")(conditions)
        with evaluating(network):
            return sample(
                network,
                noise,
                shifted(steps, self.shift),
                method=self.sampler,
                guidance=self.guidance if uncond is not None else None,
                conditions=conditions,
                uncond=uncond,
            )

    def _loss(self, velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        if self.contrastive == 0 or len(x0) < 2:
            return flow_matching(velocity, x0, noise, reduction=self.reduction)
        return contrastive_flow_matching(
            velocity,
            x0,
            noise,
            others(len(x0), x0.device),
            lam=self.contrastive,
            reduction=self.reduction,
        )

    def _null_conditions(self, option: str) -> NullConditions:
        return null_conditions_of(self.model, self._given_null_conditions, option)

    def _dropped(self, conditions: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        """Conditions with whole samples replaced by "nothing"."""
        if not conditions or self.drop_condition == 0:
            return conditions
        nothing = self._null_conditions("drop_condition")(conditions)
        device = next(iter(conditions.values())).device
        drop = torch.rand(count, device=device) < self.drop_condition
        return {
            name: torch.where(drop.view(-1, *[1] * (value.dim() - 1)), nothing[name], value)
            for name, value in conditions.items()
        }


def others(count: int, device: torch.device) -> Tensor:
    """For each of `count` >= 2 items the index of another one, from torch's default generator.

    All are moved on by the same random distance: every other item is as likely, no two items get
    the same one, and the host waits for nothing.

    Example:
        >>> others(2, torch.device("cpu"))
        tensor([1, 0])
    """
    distance = torch.randint(1, count, (1,), device=device)
    return (torch.arange(count, device=device) + distance) % count
