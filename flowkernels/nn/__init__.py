"""Modules made of the fused operators, and the exact velocity of a Gaussian mixture."""

from flowkernels.nn.attention import joint_attention
from flowkernels.nn.block import FeedForward, JointBlock
from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.embeddings import (
    network_time,
    patchify,
    sincos_positions_2d,
    timestep_embedding,
    unpatchify,
)
from flowkernels.nn.mixture import (
    GaussianMixture,
    energy_distance,
    mean_log_density,
    mode_spread,
    mode_weights,
)
from flowkernels.nn.mmdit import MMDiT

__all__ = [
    "FeedForward",
    "GaussianMixture",
    "JointBlock",
    "MMDiT",
    "MMDiTConfig",
    "energy_distance",
    "joint_attention",
    "mean_log_density",
    "mode_spread",
    "mode_weights",
    "network_time",
    "patchify",
    "sincos_positions_2d",
    "timestep_embedding",
    "unpatchify",
]
