"""How the losses meet autograd: see ``flowkernels.ops._stored``."""

from __future__ import annotations

from flowkernels.ops._samples import REDUCTIONS
from flowkernels.ops._stored import StoredLoss
from flowkernels.ops.losses import _operators as operators
from flowkernels.ops.losses import reference


def _flow_matching(v, x0, noise, dt, weight, reduction):  # type: ignore[no-untyped-def]
    return reference.flow_matching(v, x0, noise, dt, weight, REDUCTIONS[reduction])


def _fgm(u, v, x0, noise, u_uncond, t, weight, omega, lam, guidance, sid, reduction):  # type: ignore[no-untyped-def]
    settings = (lam, guidance, sid, REDUCTIONS[reduction])
    return reference.fgm(u, v, x0, noise, t, weight, u_uncond, *settings)[0]


def _fgm_backward(u, v, x0, noise, u_uncond, t, weight, omega, lam, guidance, sid, reduction):  # type: ignore[no-untyped-def]
    return u, v, x0, noise, u_uncond, omega, lam, guidance, reduction


# (v, x0, noise, dt, weight, reduction). straightening too: there x0 and noise are x_start and
# x_end, and dt is given.
FLOW_MATCHING = StoredLoss(
    "FlowMatching",
    operators.flow_matching_forward,
    operators.flow_matching_rescale_,
    operators.flow_matching_backward,
    _flow_matching,
    differentiable=3,
    tensors=5,
)
# (u, v, x0, noise, u_uncond, t, weight, lam, guidance, sid, reduction) -> loss and the number of
# samples left out; ω is kept.
FGM = StoredLoss(
    "FGM",
    operators.fgm_forward,
    operators.fgm_rescale_,
    operators.fgm_backward,
    _fgm,
    differentiable=5,
    tensors=7,
    outputs=2,
    kept=1,
    backward_arguments=_fgm_backward,
)
