"""Losses of flow matching and of its distillation, and the noising process they share."""

from flowkernels.ops.interpolate import interpolate
from flowkernels.ops.losses import fgm, flow_matching, straightening

__all__ = ["fgm", "flow_matching", "interpolate", "straightening"]
