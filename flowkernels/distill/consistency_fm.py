"""Consistency-FM: a flow that is straight within each segment of time.

The maths is in docs/siblings.md: time's direction, the velocity form of the loss, what its
solution is, and what more steps than segments do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowkernels.distill.flow_matching import FlowMatching
from flowkernels.distill.method import (
    NullConditions,
    evaluating,
    is_number,
    scaled,
    split_batch,
    standard_normal_like,
)
from flowkernels.distill.weights import check_master_weights, move_average
from flowkernels.losses import consistency_flow_matching, interpolate


class ConsistencyFM(FlowMatching):
    """Trains a velocity network whose steps from anywhere in a segment end at the same point.

    Time is cut into K even segments. In each of them, with e its end nearer to data and
    `f(x, t) = x - (t - e) v(x, t)`, the loss compares two states of one straight line
    `x_t = (1-t) x_0 + t ε`, at t and at `r = max(t - Δ, e)`:

        `‖f_θ(x_t, t) - f_θ⁻(x_r, r)‖² + α ‖v_θ(x_t, t) - v_θ⁻(x_r, r)‖²`  (α only where r > e).

    θ⁻ is a moving average of θ, without gradient. K Euler steps, one for each segment, are what
    it is made for; `generate` takes any number of even steps, multiples of K being the ones whose
    steps do not straddle two segments. With Δ of at least 1/K every r is e, and the loss is flow
    matching, weighted by (t - e)².

    Args:
        model: velocity network `f(x, t, **conditions)`; start from a flow-matching teacher where
            there is one.
        segments: K.
        delta: Δ. Small ones leave less bias, and take longer to carry what is known at a
            segment's end to its beginning.
        alpha: α, weight of the velocities' own difference.
        target_decay: decay of θ⁻ at each training step; 0: θ⁻ is θ without gradient.
        drop_condition: as in `FlowMatching`, and so are the others below.
        t_sampling: "uniform" or "logit-normal".
        t_range: (lo, hi) of the training times.
        logit_mean: mean of the logit of t, for "logit-normal".
        logit_std: its standard deviation.
        guidance: guidance scale of `generate`.
        reduction: "mean" over elements and batch, or "sum" over a sample's elements and mean
            over the batch.
        null_conditions: makes "nothing" of a dict of conditions.

    Attributes:
        target: θ⁻, moved by `after_step`; None where `target_decay` is 0.

    Raises:
        ValueError: an option out of its range, by name; a model with weights of 16 bits, of which
            small updates leave the average as it is.

    Example:
        >>> from flowkernels.nn import MMDiT, MMDiTConfig
        >>> model = MMDiT(MMDiTConfig(image_size=4, dim=8, depth=1, heads=1, num_classes=3))
        >>> method = ConsistencyFM(model, segments=2, delta=0.05)
        >>> batch = {"x0": torch.randn(2, 4, 4, 4), "labels": torch.tensor([0, 2])}
        >>> sorted(method.losses(batch))
        ['consistency']

    Source: arXiv 2407.02398.
    """

    target: nn.Module | None

    def __init__(
        self,
        model: nn.Module,
        *,
        segments: int = 2,
        delta: float = 1e-3,
        alpha: float = 1e-5,
        target_decay: float = 0.999,
        drop_condition: float = 0.1,
        t_sampling: str = "uniform",
        t_range: tuple[float, float] = (0.0, 1.0),
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        guidance: float = 1.0,
        reduction: str = "mean",
        null_conditions: NullConditions | None = None,
    ) -> None:
        super().__init__(
            model,
            drop_condition=drop_condition,
            t_sampling=t_sampling,
            t_range=t_range,
            logit_mean=logit_mean,
            logit_std=logit_std,
            guidance=guidance,
            reduction=reduction,
            null_conditions=null_conditions,
        )
        if type(segments) is not int or segments < 1:
            raise ValueError(f"segments is {segments!r}; it must be an int of at least 1")
        if not is_number(delta) or not 0 < delta <= 1:
            raise ValueError(f"delta is {delta!r}; it must lie in (0, 1]")
        if not is_number(alpha) or alpha < 0:
            raise ValueError(f"alpha is {alpha!r}; it must be a number of at least 0")
        if not is_number(target_decay) or not 0 <= target_decay < 1:
            raise ValueError(f"target_decay is {target_decay!r}; it must lie in [0, 1)")
        check_master_weights(model, "model")  # of 16 bits, an average would stand still
        self.segments = segments
        self.delta = delta
        self.alpha = alpha
        self.target_decay = target_decay
        # Its copy is made before any training step: it starts where the model starts.
        self.target = copy.deepcopy(model).requires_grad_(False).eval() if target_decay else None

    def train(self, mode: bool = True) -> ConsistencyFM:
        """Sets the model's mode; the target stays in evaluation mode."""
        super().train(mode)
        if self.target is not None:
            self.target.eval()
        return self

    def losses(self, batch: Mapping[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        """{"consistency": the loss}; see `Method.losses`."""
        self.wants("model", phase)
        x0, conditions = split_batch(batch)
        conditions = self._dropped(conditions, len(x0))
        t = self.times(len(x0), x0.device)
        end = self.segment_end(t)
        r = torch.maximum(t - self.delta, end)
        noise = standard_normal_like(x0)
        target_velocity = self._target_velocity(interpolate(x0, r, noise)[0], r, conditions)
        velocity = self.model(interpolate(x0, t, noise)[0], t, **conditions)
        loss = consistency_flow_matching(
            velocity,
            target_velocity,
            x0,
            noise,
            t,
            r,
            end,
            alpha=self.alpha,
            reduction=self.reduction,
        )
        return {"consistency": scaled(loss, self.reduction, len(x0))}

    def after_step(self) -> None:
        """Moves θ⁻ towards the model, in one sweep over the weights."""
        if self.target is not None:
            move_average(self.target, self.model, self.target_decay)

    def segment_end(self, t: Tensor) -> Tensor:
        """Where the segments of times t [B] end: the largest i/K below t (and 0 at t = 0).

        A time on a boundary is the beginning of the segment below it, as in sampling.
        """
        # Looked up: t·K rounds to either side of a whole number.
        ends = torch.arange(self.segments, device=t.device, dtype=t.dtype) / self.segments
        return ends[torch.bucketize(t, ends).sub(1).clamp(min=0)]

    def _target_velocity(self, x_r: Tensor, r: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        network = self.model if self.target is None else self.target
        with torch.no_grad(), evaluating(network):
            velocity: Tensor = network(x_r, r, **conditions)
        # Autocast would keep the model's weights cast without a graph, and its own forward would
        # find them and get no gradient.
        torch.clear_autocast_cache()
        return velocity
