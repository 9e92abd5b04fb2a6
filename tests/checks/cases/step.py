"""euler_step."""

from __future__ import annotations

import torch

from flowkernels.ode import euler_step
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
    return inputs


def _truth(x, v, dt, v_uncond, guidance):
    if isinstance(dt, torch.Tensor) and dt.dim() == 1:
        dt = dt.reshape(-1, *[1] * (x.dim() - 1))
    if v_uncond is not None:
        v = (1 - guidance) * v_uncond + guidance * v
    return x + dt * v


EULER_STEP = OpCase(
    name="euler_step",
    function=euler_step,
    reference=_truth,
    make_inputs=_inputs,
    differentiable=("x", "v", "v_uncond"),
    variants=("number", "vector_guided", "scalar_guided", "vector", "guided"),
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

CASES = (EULER_STEP,)
