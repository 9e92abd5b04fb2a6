"""euler_step and rk_combine."""

from __future__ import annotations

import torch

from flowkernels.ode import euler_step, rk_combine
from flowkernels.ops.step._euler import guided_euler_step
from tests.checks.case import OpCase, bad, draw
from tests.checks.cases.interpolate import (
    BENCHMARK_SHAPES,
    COMPILE_SHAPES,
    EDGE_SHAPES,
    SAMPLE_SHAPES,
    times,
)


def _inputs(shape, dtype, device, variant):
    inputs = {"x": draw(shape, dtype, device), "v": draw(shape, dtype, device)}
    inputs["v_uncond"] = draw(shape, dtype, device) if "guided" in variant else None
    inputs["dt"] = -0.125
    if variant.startswith("scalar"):
        inputs["dt"] = -times((1,), device).reshape(())
    if variant.startswith("vector"):
        inputs["dt"] = -times(shape, device)
    inputs["guidance"] = 3.5
    if variant == "guided_pair":
        inputs["pair"] = True
    return inputs


def _step(x, v, dt, *, pair=False, v_uncond=None, guidance=1.0, **out):
    """As the sampler's loop calls it where `pair`: the velocities in one tensor, two results."""
    if pair:
        return guided_euler_step(x, torch.cat([v, v_uncond]), dt, guidance, None)
    return euler_step(x, v, dt, v_uncond=v_uncond, guidance=guidance, **out)


def _truth(x, v, dt, v_uncond, guidance, pair=False):
    if isinstance(dt, torch.Tensor) and dt.dim() == 1:
        dt = dt.reshape(-1, *[1] * (x.dim() - 1))
    if v_uncond is not None:
        v = (1 - guidance) * v_uncond + guidance * v
    result = x + dt * v
    return (result, torch.cat([result, result])) if pair else result


EULER_STEP = OpCase(
    name="euler_step",
    function=_step,
    reference=_truth,
    make_inputs=_inputs,
    differentiable=("x", "v", "v_uncond"),
    variants=("number", "vector_guided", "scalar_guided", "vector", "guided_pair", "guided"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("dt",),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "no dimension": bad(ValueError, r"^x: got a tensor with no dimension", x=torch.ones(())),
        "v of another shape": bad(
            ValueError, r"^v: got shape \(3, 84\), need \(3, 85\)", v=torch.ones(3, 84)
        ),
        "v_uncond of another shape": bad(
            ValueError, r"^v_uncond: got shape \(85,\)", v_uncond=torch.ones(85)
        ),
        "dt of another batch": bad(
            ValueError, r"^dt: got shape \(2,\), need \[B\]", dt=torch.ones(2)
        ),
        "dt a string": bad(TypeError, r"^dt: got str, need a number or a tensor", dt="fast"),
        "dt of integers": bad(TypeError, r"^dt: got dtype torch.int64", dt=torch.tensor(1)),
        "out of another dtype": bad(
            ValueError,
            r"^out: got dtype torch.bfloat16, need torch.float32",
            out=torch.ones(3, 85, dtype=torch.bfloat16),
        ),
        "out of another shape": bad(
            ValueError, r"^out: got shape \(3, 84\)", out=torch.ones(3, 84)
        ),
        "out of shared memory": bad(
            ValueError, r"^out: its samples share memory", out=torch.ones(1, 85).expand(3, 85)
        ),
        "out where a gradient is asked for": bad(
            ValueError,
            r"^out: is given while a gradient is asked for",
            out=torch.ones(3, 85),
            v=torch.ones(3, 85, requires_grad=True),
        ),
    },
)

WEIGHTS = (0.75, -1.5, 2.25)


def _stage_inputs(shape, dtype, device, variant):
    """Three stages by name: what the checks cast, stride and poison are tensors, not lists."""
    inputs = {name: draw(shape, dtype, device) for name in ("y", "k0", "k1", "k2")}
    inputs["dt"] = -0.125
    if "scalar" in variant:
        inputs["dt"] = -times((1,), device).reshape(())
    if "vector" in variant:
        inputs["dt"] = -times(shape, device)
    inputs["stacked"] = "stacked" in variant
    return inputs


def _combine(y, k0, k1, k2, dt, stacked=False, weights=WEIGHTS, out=None, drop=0):
    ks = torch.stack([k0, k1, k2]) if stacked else [k0, k1, k2][drop:]
    return rk_combine(y, ks, weights, dt, out=out)


def _combine_truth(y, k0, k1, k2, dt, stacked):
    if isinstance(dt, torch.Tensor) and dt.dim() == 1:
        dt = dt.reshape(-1, *[1] * (y.dim() - 1))
    return y + dt * sum(weight * k for weight, k in zip(WEIGHTS, (k0, k1, k2), strict=True))


RK_COMBINE = OpCase(
    name="rk_combine",
    function=_combine,
    reference=_combine_truth,
    make_inputs=_stage_inputs,
    differentiable=("y", "k0", "k1", "k2", "dt"),
    variants=("number", "vector", "scalar", "stacked", "vector_stacked"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("dt",),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "y a number": bad(TypeError, r"^y: got float, need a torch.Tensor", y=1.0, stacked=False),
        "y of integers": bad(TypeError, r"^y: got dtype torch.int64", y=torch.ones(3, dtype=int)),
        "a stage of another shape": bad(
            ValueError,
            r"^ks\[1\]: got shape \(3, 84\), need \(3, 85\)",
            k1=torch.ones(3, 84),
            stacked=False,
        ),
        "a stage that is no tensor": bad(
            TypeError, r"^ks\[2\]: got str, need a torch.Tensor", k2="k", stacked=False
        ),
        "stacked stages of another shape": bad(
            ValueError, r"^ks: got shape \(3, 3, 85\), need \[n, ...\]", y=torch.ones(3, 84)
        ),
        "no stage": bad(ValueError, r"^ks: got no stage", drop=3, stacked=False, weights=()),
        "fewer weights than stages": bad(
            ValueError, r"^weights: got 2, need one for each of 3 stages", weights=(1.0, 2.0)
        ),
        "weights of another length": bad(
            ValueError, r"^weights: got shape \(2,\), need \(3,\)", weights=torch.ones(2)
        ),
        "weights of integers": bad(
            TypeError, r"^weights: got dtype torch.int64", weights=torch.ones(3, dtype=int)
        ),
        "a weight that is a string": bad(
            TypeError, r"^weights: got str, need a number", weights=(1.0, "2", 3.0)
        ),
        "weights a number": bad(TypeError, r"^weights: got float, need a sequence", weights=1.0),
        "dt of another batch": bad(ValueError, r"^dt: got shape \(2,\), need", dt=torch.ones(2)),
        "dt a string": bad(TypeError, r"^dt: got str, need a number or a tensor", dt="fast"),
        "dt of integers": bad(TypeError, r"^dt: got dtype torch.int64", dt=torch.tensor(1)),
        "out of another dtype": bad(
            ValueError,
            r"^out: got dtype torch.bfloat16, need torch.float32",
            out=torch.ones(3, 85, dtype=torch.bfloat16),
        ),
        "out of another shape": bad(
            ValueError, r"^out: got shape \(3, 84\)", out=torch.ones(3, 84)
        ),
        "out of shared memory": bad(
            ValueError, r"^out: its samples share memory", out=torch.ones(1, 85).expand(3, 85)
        ),
        "out where a gradient is asked for": bad(
            ValueError,
            r"^out: is given while a gradient is asked for",
            out=torch.ones(3, 85),
            k1=torch.ones(3, 85, requires_grad=True),
        ),
    },
)

CASES = (EULER_STEP, RK_COMBINE)
