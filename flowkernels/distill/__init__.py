"""Methods: what a training step calls and what it minimises. They own no loop."""

from flowkernels.distill.boss import BOSS
from flowkernels.distill.consistency_fm import ConsistencyFM
from flowkernels.distill.fgm import FGM
from flowkernels.distill.flow_matching import FlowMatching
from flowkernels.distill.method import Method, Phase
from flowkernels.distill.scflow import SCFlow
from flowkernels.distill.trajectories import TrajectoryPlan, roll, trajectory_plan

__all__ = [
    "BOSS",
    "FGM",
    "ConsistencyFM",
    "FlowMatching",
    "Method",
    "Phase",
    "SCFlow",
    "TrajectoryPlan",
    "roll",
    "trajectory_plan",
]
