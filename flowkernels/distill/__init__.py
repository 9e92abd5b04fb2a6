"""Methods: what a training step calls and what it minimises. They own no loop."""

from flowkernels.distill.boss import BOSS
from flowkernels.distill.fgm import FGM
from flowkernels.distill.flow_matching import FlowMatching
from flowkernels.distill.method import Method, Phase
from flowkernels.distill.trajectories import TrajectoryPlan, roll, trajectory_plan

__all__ = [
    "BOSS",
    "FGM",
    "FlowMatching",
    "Method",
    "Phase",
    "TrajectoryPlan",
    "roll",
    "trajectory_plan",
]
