"""Schemas and fakes of the interpolation operators.

A seed (and an offset) comes as a 0-d int64 tensor, read on the device, or else as an integer.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define

Tensor = torch.Tensor

_KERNELS = "flowkernels.ops.interpolate.kernels:"
_SEED = "Tensor? seed, int seed_value, Tensor? offset, int offset_value"


def _forward_fake(x0, t, noise):  # type: ignore[no-untyped-def]
    return x0.new_empty(x0.shape, dtype=torch.promote_types(x0.dtype, noise.dtype))


def _seeded_fake(x0, t, seed, seed_value, offset, offset_value, return_noise):  # type: ignore[no-untyped-def]
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape if return_noise else (0,))


def _backward_fake(grad_x_t, t, wanted):  # type: ignore[no-untyped-def]
    return [grad_x_t.new_empty(grad_x_t.shape) for bit in range(2) if wanted >> bit & 1]


def _philox_fake(groups, seed, seed_value, offset, offset_value):  # type: ignore[no-untyped-def]
    return groups.new_empty((groups.shape[0], 4))


interpolate_forward = define(
    "interpolate_forward",
    "(Tensor x0, Tensor t, Tensor noise) -> Tensor",
    _forward_fake,
    triton=_KERNELS + "interpolate_forward",
)
interpolate_seeded = define(
    "interpolate_seeded",
    f"(Tensor x0, Tensor t, {_SEED}, bool return_noise) -> (Tensor, Tensor)",
    _seeded_fake,
    triton=_KERNELS + "interpolate_seeded",
)
# Gradients are in the dtype of grad_x_t, the promotion of x0's and noise's; the bits of `wanted`
# are (x0, noise).
interpolate_backward = define(
    "interpolate_backward",
    "(Tensor grad_x_t, Tensor t, int wanted) -> Tensor[]",
    _backward_fake,
    triton=_KERNELS + "interpolate_backward",
)
philox = define(
    "philox",
    f"(Tensor groups, {_SEED}) -> Tensor",
    _philox_fake,
    triton=_KERNELS + "philox",
)
