"""Optimisers and moving averages that take one sweep over memory and never wait for the device."""

from flowkernels.optim.adamw_ema import AdamWEMA
from flowkernels.optim.ema import EMA

__all__ = ["EMA", "AdamWEMA"]
