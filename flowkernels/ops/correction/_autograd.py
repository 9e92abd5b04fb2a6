"""How the correction's losses meet autograd: see ``flowkernels.ops._stored``."""

from __future__ import annotations

import torch

from flowkernels.ops._samples import REDUCTIONS
from flowkernels.ops._stored import StoredLoss
from flowkernels.ops.correction import _operators as operators
from flowkernels.ops.correction import reference

Tensor = torch.Tensor


def _self_corrected(  # type: ignore[no-untyped-def]
    v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc, c, lam_bi, reduction
):
    operands = (v, t, v_teacher, v_post, t_post, v_prev, t_prev, x0, noise)
    return reference.self_corrected(*operands, trunc, c, lam_bi, REDUCTIONS[reduction])[0]


def _pair_loss(x: Tensor, y: Tensor, t: Tensor | None, c: float, reduction: int) -> Tensor:
    if t is None:
        return reference.pseudo_huber(x, y, c, REDUCTIONS[reduction])
    return reference.self_reflow(x, y, t, REDUCTIONS[reduction])


# (six tensors like v, three times, trunc, c, lam_bi, reduction) -> total, consistency,
# bidirectional. v alone has a gradient, and total alone gives one.
SELF_CORRECTED = StoredLoss(
    "SelfCorrected",
    operators.self_corrected_forward,
    operators.self_corrected_rescale_,
    operators.self_corrected_backward,
    _self_corrected,
    differentiable=1,
    tensors=9,
    outputs=3,
    single=True,
)
# (x, y, t, c, reduction): self_reflow where there is a t, else pseudo_huber.
PAIR_LOSS = StoredLoss(
    "PairLoss",
    operators.pair_loss_forward,
    operators.pair_loss_rescale_,
    operators.pair_loss_backward,
    _pair_loss,
    differentiable=2,
    tensors=3,
)
