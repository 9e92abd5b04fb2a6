"""self_corrected, self_reflow and pseudo_huber."""

from __future__ import annotations

import torch

from flowkernels.losses import pseudo_huber, self_corrected, self_reflow
from tests.checks.case import OpCase, bad, draw
from tests.checks.cases.interpolate import (
    BENCHMARK_SHAPES,
    COMPILE_SHAPES,
    EDGE_SHAPES,
    SAMPLE_SHAPES,
    times,
)
from tests.checks.cases.losses import _flat, _reduce

TRUNC = 0.5
SAMPLES = ("v", "v_teacher", "v_post", "v_prev", "x0", "noise")
TIMES = ("t", "t_post", "t_prev")

# By variant: reduction, c, lam_bi. Differences are of size 1: c of size 1 bends ρ among them.
_SELF_CORRECTED = {
    "mean": ("mean", 1.0, 0.1),
    "none": ("none", 1.0, 0.5),
    "sum": ("sum", 0.3, 2.0),
    "mean_narrow": ("mean", 0.01, 0.1),
    "none_alone": ("none", 0.5, 0.0),
}


def _self_corrected_inputs(shape, dtype, device, variant):
    inputs = {name: draw(shape, dtype, device) for name in SAMPLES}
    t = times(shape, device)
    inputs |= {"t": t, "t_post": 0.9 * t, "t_prev": 0.1 + 0.9 * t}
    inputs["t_post"][-1:] = TRUNC  # which is not below TRUNC
    reduction, c, lam_bi = _SELF_CORRECTED[variant]
    return {**inputs, "trunc": TRUNC, "c": c, "lam_bi": lam_bi, "reduction": reduction}


def _self_corrected_truth(
    v, t, v_teacher, v_post, t_post, v_prev, t_prev, x0, noise, trunc, c, lam_bi, reduction
):
    """From the states: x_t, and the teacher's step to either side of it."""
    v = _flat(v)
    constants = (_flat(x.detach()) for x in (v_teacher, v_post, v_prev, x0, noise))
    v_teacher, v_post, v_prev, x0, noise = constants
    t, t_post, t_prev = (time[:, None] for time in (t, t_post, t_prev))
    x_t = (1 - t) * x0 + t * noise
    post = x_t + (t_post - t) * v_teacher - t_post * v_post
    prev = x_t + (t_prev - t) * v_teacher - t_prev * v_prev
    d_con = x_t - t * v - torch.where(t_post < trunc, x0, post)
    d_bi = x_t - t * v - prev
    consistency, bidirectional = (
        _reduce((d**2 + c**2).sqrt() - c, None, reduction) for d in (d_con, d_bi)
    )
    return consistency + lam_bi * bidirectional, consistency.detach(), bidirectional.detach()


def _bad_operands(first, *others):
    """Shapes, devices and types of operands like the first, which is [3, 85]."""
    found = {
        f"{first} without a dimension": bad(
            ValueError, rf"^{first}: got a tensor with no dimension", **{first: torch.ones(())}
        ),
        "unknown reduction": bad(
            ValueError, r"^reduction: got 'max', need one of none, mean, sum", reduction="max"
        ),
    }
    for name in others:
        wrong = {
            "of another shape": (ValueError, r"got shape \(3, 84\), need", torch.ones(3, 84)),
            "elsewhere": (ValueError, "is on meta, need cpu", torch.ones(3, 85, device="meta")),
            "of integers": (TypeError, "got dtype torch.int64", torch.ones(3, 85).long()),
            "no tensor": (TypeError, "got NoneType, need a torch.Tensor", None),
        }
        for what, (error, match, value) in wrong.items():
            found[f"{name} {what}"] = bad(error, rf"^{name}: {match}", **{name: value})
    return found


def _bad_times(*names):
    found = {}
    for name in names:
        wrong = {
            "of another batch": (ValueError, r"got shape \(2,\), need \[B\]", torch.ones(2)),
            "no vector": (ValueError, r"got shape \(3, 1\), need \[B\]", torch.ones(3, 1)),
            "a number": (TypeError, "got float, need a torch.Tensor", 0.5),
            "elsewhere": (ValueError, "is on meta, need cpu", torch.ones(3, device="meta")),
        }
        for what, (error, match, value) in wrong.items():
            found[f"{name} {what}"] = bad(error, rf"^{name}: {match}", **{name: value})
    return found


BAD_C = {
    "c of zero": bad(ValueError, r"^c: got 0.0, need a number > 0", c=0.0),
    "c negative": bad(ValueError, r"^c: got -0.1, need a number > 0", c=-0.1),
    "c not finite": bad(ValueError, r"^c: got inf, need", c=float("inf")),
    "c not a number": bad(ValueError, r"^c: got nan, need", c=float("nan")),
    "c with a square of zero": bad(ValueError, r"^c: got 1e-30, need .* from 1e-18", c=1e-30),
    "c a string": bad(TypeError, r"^c: got str, need a number", c="small"),
}

SELF_CORRECTED = OpCase(
    name="self_corrected",
    function=self_corrected,
    reference=_self_corrected_truth,
    make_inputs=_self_corrected_inputs,
    differentiable=("v",),
    variants=tuple(_SELF_CORRECTED),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=TIMES,
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        **_bad_operands(*SAMPLES),
        **_bad_times(*TIMES),
        **BAD_C,
        "trunc not finite": bad(ValueError, r"^trunc: got inf, need a finite", trunc=float("inf")),
        "trunc none": bad(TypeError, r"^trunc: got NoneType, need a number", trunc=None),
        "lam_bi not finite": bad(
            ValueError, r"^lam_bi: got nan, need a finite", lam_bi=float("nan")
        ),
    },
)


def _self_reflow_inputs(shape, dtype, device, variant):
    inputs = {name: draw(shape, dtype, device) for name in ("v_r", "v_1")}
    return {**inputs, "t": times(shape, device), "reduction": variant}


def _self_reflow_truth(v_r, v_1, t, reduction):
    """From the endpoint, with a noise of zero: x̂ = -v_1 and x_r = (1 - t)·x̂."""
    corrected = -_flat(v_1.detach())
    t = t[:, None]
    endpoint = (1 - t) * corrected - t * _flat(v_r)
    return _reduce((endpoint - corrected) ** 2, None, reduction)


SELF_REFLOW = OpCase(
    name="self_reflow",
    function=self_reflow,
    reference=_self_reflow_truth,
    make_inputs=_self_reflow_inputs,
    differentiable=("v_r",),
    variants=("mean", "none", "sum"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("t",),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={**_bad_operands("v_r", "v_1"), **_bad_times("t")},
)

_PSEUDO_HUBER = {
    "mean": ("mean", 1.0),
    "none": ("none", 0.3),
    "sum": ("sum", 1.0),
    "mean_narrow": ("mean", 0.01),
}


def _pseudo_huber_inputs(shape, dtype, device, variant):
    reduction, c = _PSEUDO_HUBER[variant]
    inputs = {name: draw(shape, dtype, device) for name in ("x", "y")}
    return {**inputs, "c": c, "reduction": reduction}


def _pseudo_huber_truth(x, y, c, reduction):
    return _reduce((_flat(x - y) ** 2 + c**2).sqrt() - c, None, reduction)


PSEUDO_HUBER = OpCase(
    name="pseudo_huber",
    function=pseudo_huber,
    reference=_pseudo_huber_truth,
    make_inputs=_pseudo_huber_inputs,
    differentiable=("x", "y"),
    variants=tuple(_PSEUDO_HUBER),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={**_bad_operands("x", "y"), **BAD_C},
)

CASES = (SELF_CORRECTED, SELF_REFLOW, PSEUDO_HUBER)
