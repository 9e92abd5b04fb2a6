"""gelu_tanh and swiglu."""

from __future__ import annotations

import math

import torch

import flowkernels
from tests.checks.case import ROW_SHAPES, OpCase, bad, draw


def _gelu_inputs(shape, dtype, device, variant):
    leading = {"plain": shape, "two_dimensions": shape[1:], "one_dimension": shape[-1:]}
    x = draw(leading.get(variant, shape), dtype, device)
    if variant == "tails":  # where the gate is 0 or 1 to the last digit, and exp would overflow
        x = x * 40
    return {"x": x, "bias": None if variant == "plain" else draw(shape[-1:], dtype, device)}


def _gelu_truth(x, bias=None):
    u = x if bias is None else x + bias
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


GELU_TANH = OpCase(
    name="gelu_tanh",
    function=flowkernels.ops.gelu_tanh,
    reference=_gelu_truth,
    make_inputs=_gelu_inputs,
    differentiable=("x", "bias"),
    variants=("bias", "plain", "two_dimensions", "one_dimension", "tails"),
    bad_inputs={
        "no dimension": bad(ValueError, r"^x: got a 0-d tensor, need", x=torch.ones(())),
        "bias of another width": bad(
            ValueError, r"^bias: got shape \(2,\), need \(17,\)", bias=torch.ones(2)
        ),
        "bias elsewhere": bad(
            ValueError, r"^bias: is on meta, need cpu", bias=torch.ones(17, device="meta")
        ),
    },
)


def _even(shape):
    return (*shape[:-1], shape[-1] + shape[-1] % 2)


def _swiglu_inputs(shape, dtype, device, variant):
    x = draw(shape[1:] if variant == "two_dimensions" else shape, dtype, device)
    return {"x": x * 60 if variant == "tails" else x}


def _swiglu_truth(x):
    gate, value = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * value


SWIGLU = OpCase(
    name="swiglu",
    function=flowkernels.ops.swiglu,
    reference=_swiglu_truth,
    make_inputs=_swiglu_inputs,
    differentiable=("x",),
    variants=("plain", "two_dimensions", "tails"),
    shapes=tuple((*shape[:-1], 2 * shape[-1]) for shape in ROW_SHAPES),
    allowed=_even,
    bad_inputs={
        "odd": bad(ValueError, r"^x: got shape \(2, 3\), need an even last", x=torch.ones(2, 3)),
        "no dimension": bad(ValueError, r"^x: got shape \(\), need", x=torch.ones(())),
    },
)

CASES = (GELU_TANH, SWIGLU)
