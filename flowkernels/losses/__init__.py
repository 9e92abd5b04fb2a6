"""Losses of flow matching and of its distillation, and the noising process they share."""

from flowkernels.losses.consistency import consistency_flow_matching
from flowkernels.ops.adversarial import gan_discriminator, gan_generator, r1_penalty
from flowkernels.ops.contrastive import contrastive_flow_matching
from flowkernels.ops.correction import pseudo_huber, self_corrected, self_reflow
from flowkernels.ops.interpolate import interpolate
from flowkernels.ops.losses import fgm, flow_matching, straightening

__all__ = [
    "consistency_flow_matching",
    "contrastive_flow_matching",
    "fgm",
    "flow_matching",
    "gan_discriminator",
    "gan_generator",
    "interpolate",
    "pseudo_huber",
    "r1_penalty",
    "self_corrected",
    "self_reflow",
    "straightening",
]
