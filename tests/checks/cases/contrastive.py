"""contrastive_flow_matching. x0 and noise asking for a gradient take the reference path: the
kernels' gradient is that of v.
"""

from __future__ import annotations

import torch

from flowkernels.losses import contrastive_flow_matching
from tests.checks.case import OpCase, bad, draw
from tests.checks.cases.interpolate import (
    BENCHMARK_SHAPES,
    COMPILE_SHAPES,
    EDGE_SHAPES,
    SAMPLE_SHAPES,
    times,
)


def negatives_of(batch, device="cpu", dtype=torch.int64):
    """Random indices, an item's own among them."""
    if torch.device(device).type == "meta":
        return torch.empty(batch, dtype=dtype, device=device)
    return torch.randint(0, max(batch, 1), (batch,)).to(device, dtype)


# By variant: reduction, λ, whether weighted, dtype of the indices.
_VARIANTS = {
    "mean": ("mean", 0.05, False, torch.int64),
    "none_weighted": ("none", 0.5, True, torch.int32),
    "sum_weighted": ("sum", 0.05, True, torch.int64),
    "mean_weighted": ("mean", 0.9, True, torch.uint8),
    "none": ("none", 0.0, False, torch.int64),
}


def _inputs(shape, dtype, device, variant):
    reduction, lam, weighted, integers = _VARIANTS[variant]
    inputs = {name: draw(shape, dtype, device) for name in ("v", "x0", "noise")}
    inputs["negatives"] = negatives_of(shape[0], device, integers)
    inputs["weight"] = times(shape, device) if weighted else None
    return {**inputs, "lam": lam, "reduction": reduction}


def _truth(v, x0, noise, negatives, lam, weight, reduction):
    v, u = (x[:, None] if x.dim() == 1 else x.flatten(1) for x in (v, noise - x0))
    losses = (v - u) ** 2 - lam * (v - u[negatives.long()]) ** 2
    if weight is not None:
        losses = losses * weight[:, None]
    if reduction == "sum":
        return losses.sum()
    losses = losses.sum(1) / losses.shape[1]
    return losses if reduction == "none" else losses.sum() / len(losses)


CONTRASTIVE = OpCase(
    name="contrastive_flow_matching",
    function=contrastive_flow_matching,
    reference=_truth,
    make_inputs=_inputs,
    differentiable=("v",),
    variants=tuple(_VARIANTS),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("weight",),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "v without a dimension": bad(
            ValueError, r"^v: got a tensor with no dimension", v=torch.ones(())
        ),
        **{
            f"{name} of another shape": bad(
                ValueError, rf"^{name}: got shape \(3, 84\), need", **{name: torch.ones(3, 84)}
            )
            for name in ("x0", "noise")
        },
        **{
            f"{name} a list": bad(TypeError, rf"^{name}: got list", **{name: [1.0]})
            for name in ("x0", "noise", "negatives")
        },
        "negatives of floats": bad(
            TypeError,
            r"^negatives: got dtype torch.float32, need an integer dtype",
            negatives=torch.ones(3),
        ),
        "negatives of booleans": bad(
            TypeError,
            r"^negatives: got dtype torch.bool, need an integer dtype",
            negatives=torch.ones(3, dtype=torch.bool),
        ),
        "negatives of another batch": bad(
            ValueError,
            r"^negatives: got shape \(2,\), need \[B\] with B = 3",
            negatives=torch.tensor([0, 1]),
        ),
        "negatives elsewhere": bad(
            ValueError,
            r"^negatives: is on meta, need cpu",
            negatives=torch.zeros(3, dtype=torch.int64, device="meta"),
        ),
        "a negative behind the batch": bad(
            ValueError,
            r"^negatives: got an index of 3, need 0 to 2",
            negatives=torch.tensor([0, 3, 1]),
        ),
        "a negative before the batch": bad(
            ValueError,
            r"^negatives: got an index of -1, need 0 to 2",
            negatives=torch.tensor([0, 2, -1]),
        ),
        "lam a string": bad(TypeError, r"^lam: got str, need a number", lam="small"),
        "weight of another batch": bad(
            ValueError, r"^weight: got shape \(2,\), need \[B\]", weight=torch.ones(2)
        ),
        "unknown reduction": bad(
            ValueError, r"^reduction: got 'max', need one of none, mean, sum", reduction="max"
        ),
    },
)

CASES = (CONTRASTIVE,)
