"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from flowkernels.train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of one step.

    Linear warm-up `lr·(step+1)/warmup` over the first `warmup` steps, then constant, or a half
    cosine from `lr` to `final_lr·lr` that ends at the last step.

    Args:
        config: peak rate and schedule.
        step: the step, counted from 0.
        steps: steps of the whole run.

    Returns:
        The rate; a function of its arguments alone, so that a resumed run needs no state for it.

    Example:
        >>> config = OptimConfig(lr=1.0, schedule="cosine", warmup=2)
        >>> [round(learning_rate(config, step, 5), 3) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * (config.final_lr + (1.0 - config.final_lr) * cosine)
