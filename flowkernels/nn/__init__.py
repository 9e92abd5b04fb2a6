"""Modules made of the fused operators, discriminators, and the exact velocity of a mixture."""

from flowkernels.nn.block import FeedForward, JointBlock
from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.discriminator import LatentDiscriminator
from flowkernels.nn.discriminator_config import LatentDiscriminatorConfig
from flowkernels.nn.embeddings import network_time, patchify, timestep_embedding, unpatchify
from flowkernels.nn.feature_discriminator import FeatureDiscriminator
from flowkernels.nn.minibatch import MinibatchStd
from flowkernels.nn.mixture import (
    GaussianMixture,
    energy_distance,
    mean_log_density,
    mode_spread,
    mode_weights,
)
from flowkernels.nn.mmdit import MMDiT
from flowkernels.nn.positions import rotary_positions_2d, sincos_positions_2d
from flowkernels.nn.single_block import SingleBlock

__all__ = [
    "FeatureDiscriminator",
    "FeedForward",
    "GaussianMixture",
    "JointBlock",
    "LatentDiscriminator",
    "LatentDiscriminatorConfig",
    "MMDiT",
    "MMDiTConfig",
    "MinibatchStd",
    "SingleBlock",
    "energy_distance",
    "mean_log_density",
    "mode_spread",
    "mode_weights",
    "network_time",
    "patchify",
    "rotary_positions_2d",
    "sincos_positions_2d",
    "timestep_embedding",
    "unpatchify",
]
