"""bellman_step."""

from __future__ import annotations

import torch

from flowkernels.ops.bellman import bellman_step
from tests.checks.case import OpCase, bad, draw
from tests.checks.cases.interpolate import (
    BENCHMARK_SHAPES,
    COMPILE_SHAPES,
    EDGE_SHAPES,
    SAMPLE_SHAPES,
)


def _inputs(shape, dtype, device, variant):
    inputs = {"x": draw(shape, dtype, device), "v": draw(shape, dtype, device), "dt": -0.125}
    inputs["previous"] = None if "first" in variant else draw(shape, dtype, device)
    inputs["v_uncond"] = draw(shape, dtype, device) if "guided" in variant else None
    inputs["guidance"] = 3.5
    return inputs


def _truth(x, v, dt, previous, v_uncond, guidance):
    if v_uncond is not None:
        v = (1 - guidance) * v_uncond + guidance * v
    return x + dt * v, v, None if previous is None else v - previous


BELLMAN_STEP = OpCase(
    name="bellman_step",
    function=bellman_step,
    reference=_truth,
    make_inputs=_inputs,
    differentiable=("x", "v", "v_uncond", "previous"),
    variants=("guided", "first", "first_guided", "plain"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
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
        "previous no tensor": bad(
            TypeError, r"^previous: got list, need a torch.Tensor", previous=[1.0]
        ),
        "dt a string": bad(TypeError, r"^dt: got str, need a number", dt="fast"),
        "out without a place for the increment": bad(
            ValueError,
            r"^out: its third tensor takes the increment",
            out=(torch.ones(3, 85), torch.ones(3, 85), None),
        ),
        "out of another dtype": bad(
            ValueError,
            r"^out\[1\]: got dtype torch.bfloat16, need torch.float32",
            out=(torch.ones(3, 85), torch.ones(3, 85, dtype=torch.bfloat16), torch.ones(3, 85)),
        ),
        "out where a gradient is asked for": bad(
            ValueError,
            r"^out: is given while a gradient is asked for",
            out=(torch.ones(3, 85), torch.ones(3, 85), torch.ones(3, 85)),
            v=torch.ones(3, 85, requires_grad=True),
        ),
    },
)

CASES = (BELLMAN_STEP,)
