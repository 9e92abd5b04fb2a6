"""flow_matching, straightening and fgm."""

from __future__ import annotations

import torch

from flowkernels.losses import fgm, flow_matching, straightening
from tests.checks.case import OpCase, bad, draw
from tests.checks.cases.interpolate import (
    BENCHMARK_SHAPES,
    COMPILE_SHAPES,
    EDGE_SHAPES,
    SAMPLE_SHAPES,
    times,
)


def _reduce(losses_BN, weight, reduction):
    """Losses of elements [B, N] to the result."""
    if weight is not None:
        losses_BN = losses_BN * weight[:, None]
    if reduction == "sum":
        return losses_BN.sum()
    losses = losses_BN.sum(1) / losses_BN.shape[1]
    return losses if reduction == "none" else losses.sum() / len(losses)


def _flat(x):
    return x[:, None] if x.dim() == 1 else x.flatten(1)


def _flow_matching_inputs(shape, dtype, device, variant):
    reduction, _, weighted = variant.partition("_")
    inputs = {name: draw(shape, dtype, device) for name in ("v", "x0", "noise")}
    inputs["weight"] = times(shape, device) if weighted else None
    return {**inputs, "reduction": reduction}


def _flow_matching_truth(v, x0, noise, weight, reduction):
    return _reduce(_flat((v - (noise - x0)) ** 2), weight, reduction)


def _bad_operands(first, *others):
    return {
        f"{first} without a dimension": bad(
            ValueError, rf"^{first}: got a tensor with no dimension", **{first: torch.ones(())}
        ),
        **{
            f"{name} of another shape": bad(
                ValueError, rf"^{name}: got shape \(3, 84\), need", **{name: torch.ones(3, 84)}
            )
            for name in others
        },
        **{
            f"{name} elsewhere": bad(
                ValueError,
                rf"^{name}: is on meta, need cpu",
                **{name: torch.ones(3, 85, device="meta")},
            )
            for name in others
        },
        "weight of another batch": bad(
            ValueError, r"^weight: got shape \(2,\), need \[B\]", weight=torch.ones(2)
        ),
        "weight a number": bad(TypeError, r"^weight: got float", weight=2.0),
        "unknown reduction": bad(
            ValueError, r"^reduction: got 'max', need one of none, mean, sum", reduction="max"
        ),
    }


FLOW_MATCHING = OpCase(
    name="flow_matching",
    function=flow_matching,
    reference=_flow_matching_truth,
    make_inputs=_flow_matching_inputs,
    differentiable=("v", "x0", "noise"),
    variants=("mean", "none_weighted", "sum_weighted", "mean_weighted", "none"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("weight",),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs=_bad_operands("v", "x0", "noise"),
)


def _straightening_inputs(shape, dtype, device, variant):
    reduction, _, weighted = variant.partition("_")
    inputs = {name: draw(shape, dtype, device) for name in ("v", "x_start", "x_end")}
    inputs["dt"] = -0.05 - times(shape, device)  # as in sampling, and never near 0
    inputs["weight"] = times(shape, device) if weighted else None
    return {**inputs, "reduction": reduction}


def _straightening_truth(v, x_start, x_end, dt, weight, reduction):
    slope = _flat(x_end - x_start) / dt[:, None]
    return _reduce((_flat(v) - slope) ** 2, weight, reduction)


STRAIGHTENING = OpCase(
    name="straightening",
    function=straightening,
    reference=_straightening_truth,
    make_inputs=_straightening_inputs,
    differentiable=("v", "x_start", "x_end"),
    variants=("mean", "none_weighted", "sum_weighted", "mean_weighted", "none"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("dt", "weight"),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        **_bad_operands("v", "x_start", "x_end"),
        "dt of another batch": bad(
            ValueError, r"^dt: got shape \(2,\), need \[B\]", dt=torch.ones(2)
        ),
        "dt a number": bad(TypeError, r"^dt: got float", dt=-0.5),
        "dt elsewhere": bad(
            ValueError, r"^dt: is on meta, need cpu", dt=torch.ones(3, device="meta")
        ),
    },
)

# By variant: reduction, lam, whether weighted, the normaliser, guidance (None: no u_uncond).
_FGM = {
    "mean": ("mean", 0.0, False, None, None),
    "none_exact_weighted": ("none", 1.0, True, None, None),
    "sum_sid": ("sum", -0.4, False, "sid", None),
    "mean_sid_guided": ("mean", 0.0, True, "sid", 1.5),
    "none_guided": ("none", -0.4, False, None, 0.0),
}


def _fgm_inputs(shape, dtype, device, variant):
    reduction, lam, weighted, normalize, guidance = _FGM[variant]
    inputs = {name: draw(shape, dtype, device) for name in ("u", "v", "x0", "noise")}
    # Else 2·d·e averages to near zero, and the rounding of its terms is all that one would see.
    inputs["v"] *= 2
    inputs["u_uncond"] = None if guidance is None else draw(shape, dtype, device)
    inputs["t"] = times(shape, device)
    inputs["weight"] = times(shape, device) if weighted else None
    inputs |= {"lam": lam, "normalize": normalize, "reduction": reduction}
    inputs["guidance"] = 1.0 if guidance is None else guidance
    return inputs


def _fgm_truth(u, v, x0, noise, t, lam, weight, normalize, u_uncond, guidance, reduction):
    u, v, w = _flat(u), _flat(v), _flat(noise - x0)
    if u_uncond is not None:
        u = (1 - guidance) * _flat(u_uncond) + guidance * u
    finite = (u + v + w).isfinite().all(1, keepdim=True) & t.isfinite()[:, None]
    u, v, w = (torch.where(finite, x, 0.0) for x in (u, v, w))
    losses = 2 * (u - v) * (v - w) + lam * (u - v) ** 2
    if normalize == "sid":
        size = (u - w).abs().mean(1, keepdim=True).detach()
        losses = losses * t[:, None] / (2 * size.clamp_min(1e-5))
    return _reduce(losses, weight, reduction)


FGM = OpCase(
    name="fgm",
    function=fgm,
    reference=_fgm_truth,
    make_inputs=_fgm_inputs,
    differentiable=("u", "v", "x0", "noise", "u_uncond"),
    variants=tuple(_FGM),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("t", "weight"),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES[:3],
    bad_inputs={
        **_bad_operands("u", "v", "x0", "noise", "u_uncond"),
        "t of another batch": bad(ValueError, r"^t: got shape \(2,\), need \[B\]", t=torch.ones(2)),
        "t a number": bad(TypeError, r"^t: got float", t=0.5),
        "unknown normaliser": bad(
            ValueError, r"^normalize: got 'l2', need one of sid", normalize="l2"
        ),
        "a float counter": bad(
            TypeError, r"^nonfinite: got torch.float32, need an int32", nonfinite=torch.zeros(())
        ),
        "counters": bad(
            ValueError,
            r"^nonfinite: got shape \(3,\)",
            nonfinite=torch.zeros(3, dtype=torch.int32),
        ),
        "counter elsewhere": bad(
            ValueError,
            r"^nonfinite: is on meta",
            nonfinite=torch.zeros((), dtype=torch.int32, device="meta"),
        ),
    },
)

CASES = (FLOW_MATCHING, STRAIGHTENING, FGM)
