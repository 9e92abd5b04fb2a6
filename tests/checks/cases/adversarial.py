"""gan_generator, gan_discriminator, and R1's penalty of an input gradient."""

from __future__ import annotations

import torch

from flowkernels.losses import gan_discriminator, gan_generator
from flowkernels.ops.adversarial import gradient_penalty
from tests.checks.case import OpCase, bad, draw
from tests.checks.cases.interpolate import (
    BENCHMARK_SHAPES,
    COMPILE_SHAPES,
    EDGE_SHAPES,
    SAMPLE_SHAPES,
)

# A logit for each patch, a logit for each sample.
LOGIT_SHAPES = ((64, 1, 30, 30), (32, 1), (32,))

# By variant: what a normal number is multiplied by. At 1000 all but a few logits are saturated.
_SCALES = {"near": 1.0, "far": 1000.0}


def _softplus(x):
    """ln(1 + eˣ), differentiable twice for x of any size: no side overflows."""
    return torch.where(x > 0, x, 0.0) + torch.log1p(torch.exp(-torch.where(x > 0, x, -x)))


def _generator_inputs(shape, dtype, device, variant):
    return {"logits": draw(shape, dtype, device) * _SCALES[variant]}


def _generator_truth(logits):
    return _softplus(-logits).mean()


GAN_GENERATOR = OpCase(
    name="gan_generator",
    function=gan_generator,
    reference=_generator_truth,
    make_inputs=_generator_inputs,
    differentiable=("logits",),
    variants=("near", "far"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=LOGIT_SHAPES,
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "no dimension": bad(
            ValueError, r"^logits: got a tensor with no dimension", logits=torch.ones(())
        ),
        "a number": bad(TypeError, r"^logits: got float, need a torch.Tensor", logits=1.0),
    },
)


def _discriminator_inputs(shape, dtype, device, variant):
    scale = _SCALES.get(variant, 1.0)
    other = shape
    if variant == "another_batch":  # and one logit for each sample of it
        other = (2 * shape[0] + 1,)
    return {
        "real_logits": draw(shape, dtype, device) * scale,
        "fake_logits": draw(other, dtype, device) * scale,
    }


def _discriminator_truth(real_logits, fake_logits):
    return _softplus(-real_logits).mean() + _softplus(fake_logits).mean()


GAN_DISCRIMINATOR = OpCase(
    name="gan_discriminator",
    function=gan_discriminator,
    reference=_discriminator_truth,
    make_inputs=_discriminator_inputs,
    differentiable=("real_logits", "fake_logits"),
    variants=("near", "far", "another_batch"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=LOGIT_SHAPES,
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "real without a dimension": bad(
            ValueError, r"^real_logits: got a tensor with no dim", real_logits=torch.ones(())
        ),
        "fake without a dimension": bad(
            ValueError, r"^fake_logits: got a tensor with no dim", fake_logits=torch.ones(())
        ),
        "fake elsewhere": bad(
            ValueError,
            r"^fake_logits: is on meta, need cpu",
            fake_logits=torch.ones(3, device="meta"),
        ),
    },
)


def _penalty_inputs(shape, dtype, device, variant):
    return {"gradient": draw(shape, dtype, device), "gamma": 0.7}


def _penalty_truth(gradient, gamma):
    rows = gradient[:, None] if gradient.dim() == 1 else gradient.flatten(1)
    return gamma / 2 * (rows**2).sum(1).mean()


# What r1_penalty does with the input gradient that it takes: the rest of it is autograd's.
R1_PENALTY = OpCase(
    name="r1_penalty",
    function=gradient_penalty,
    reference=_penalty_truth,
    make_inputs=_penalty_inputs,
    differentiable=("gradient",),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "no dimension": bad(
            ValueError, r"^gradient: got a tensor with no dimension", gradient=torch.ones(())
        ),
        "gamma a string": bad(TypeError, r"^gamma: got str, need a number", gamma="big"),
    },
)

CASES = (GAN_GENERATOR, GAN_DISCRIMINATOR, R1_PENALTY)
