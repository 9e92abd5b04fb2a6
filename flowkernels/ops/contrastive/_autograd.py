"""How contrastive flow matching meets autograd: see ``flowkernels.ops._stored``."""

from __future__ import annotations

from flowkernels.ops._samples import REDUCTIONS
from flowkernels.ops._stored import StoredLoss
from flowkernels.ops.contrastive import _operators as operators
from flowkernels.ops.contrastive import reference


def _formula(v, x0, noise, negatives, weight, lam, reduction):  # type: ignore[no-untyped-def]
    return reference.contrastive_flow_matching(
        v, x0, noise, negatives, weight, lam, REDUCTIONS[reduction]
    )


# (v, x0, noise, negatives, weight, lam, reduction). Its gradient is that of v alone: the others
# take the reference path.
CONTRASTIVE = StoredLoss(
    "ContrastiveFlowMatching",
    operators.contrastive_forward,
    operators.contrastive_rescale_,
    operators.contrastive_backward,
    _formula,
    differentiable=1,
    tensors=5,
    single=True,
)
