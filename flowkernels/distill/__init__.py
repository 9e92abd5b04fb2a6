"""Methods: what a training step calls and what it minimises. They own no loop."""

from flowkernels.distill.fgm import FGM
from flowkernels.distill.flow_matching import FlowMatching
from flowkernels.distill.method import Method, Phase

__all__ = ["FGM", "FlowMatching", "Method", "Phase"]
