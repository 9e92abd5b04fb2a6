"""How a method draws its training times."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flowkernels.distill.method import is_number


@dataclasses.dataclass(frozen=True)
class TimeSampling:
    """The law of training times.

    `t = lo + (hi - lo)·s` with s uniform on [0, 1), or s = sigmoid(mean + std·n) with n normal
    ("logit-normal": more of the middle; arXiv 2403.03206).

    Args:
        kind: "uniform" or "logit-normal".
        limits: (lo, hi), 0 ≤ lo < hi ≤ 1.
        logit_mean: mean of the normal behind "logit-normal".
        logit_std: its standard deviation.

    Raises:
        ValueError: a value out of its range, by the name that methods give it.

    Example:
        >>> t = TimeSampling("uniform", (0.5, 1.0))(3, torch.device("cpu"))
        >>> t.shape, bool((t >= 0.5).all())
        (torch.Size([3]), True)
    """

    kind: str = "uniform"
    limits: tuple[float, float] = (0.0, 1.0)
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit-normal"):
            raise ValueError(f"t_sampling is {self.kind!r}; it must be 'uniform' or 'logit-normal'")
        limits = tuple(self.limits)  # recipes bring lists
        numbers = len(limits) == 2 and all(map(is_number, limits))
        if not numbers or not 0 <= limits[0] < limits[1] <= 1:
            raise ValueError(f"t_range is {limits!r}; it needs (lo, hi) with 0 <= lo < hi <= 1")
        object.__setattr__(self, "limits", limits)
        if not is_number(self.logit_mean):
            raise ValueError(f"logit_mean is {self.logit_mean!r}; it must be a finite number")
        if not is_number(self.logit_std) or self.logit_std <= 0:
            raise ValueError(f"logit_std is {self.logit_std!r}; it must be a positive number")

    def __call__(self, count: int, device: torch.device) -> Tensor:
        """`count` times, float32 on `device`, from its default generator."""
        if self.kind == "uniform":
            s = torch.rand(count, device=device)
        else:
            s = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(count, device=device))
        low, high = self.limits
        return low + (high - low) * s
