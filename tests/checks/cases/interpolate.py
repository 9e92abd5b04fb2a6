"""interpolate, with noise given and from a counter."""

from __future__ import annotations

import numpy as np
import torch

from flowkernels.losses import interpolate
from tests.checks.case import OpCase, bad, draw

# A vector, samples of less and more than a chunk, sizes that hold no whole groups of four normals.
SAMPLE_SHAPES = ((3, 85), (1, 1), (2, 8), (5,), (3, 4, 16, 33), (2, 3, 3001))
BENCHMARK_SHAPES = ((32, 4, 32, 32), (16, 16, 128, 128), (256, 3, 32, 32), (64, 3, 256, 256))
EDGE_SHAPES = ((1, 16), (2, 1), (0, 16), (2, 0))
COMPILE_SHAPES = ((2, 16), (4, 48), (3, 112))


def philox_words(groups: np.ndarray, seed: int, offset: int) -> np.ndarray:
    """philox4x32-10 from its definition, in numpy: uint64 [N, 4]."""
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    halves = [np.uint64(half) for value in (offset, seed) for half in divmod(value % 2**64, 2**32)]
    offset_high, offset_low, key_high, key_low = halves
    counter = [groups & low, groups >> word, offset_low + 0 * groups, offset_high + 0 * groups]
    for step in range(10):
        k0 = (key_low + np.uint64(step * 0x9E3779B9)) & low
        k1 = (key_high + np.uint64(step * 0xBB67AE85)) & low
        first = counter[0] * np.uint64(0xD2511F53)
        second = counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> word) ^ counter[1] ^ k0,
            second & low,
            (first >> word) ^ counter[3] ^ k1,
            first & low,
        ]
    return np.stack(counter, axis=-1)


def normals(count: int, seed: int, offset: int) -> torch.Tensor:
    """The first elements of the noise of (seed, offset), float64."""
    groups = np.arange((count + 3) // 4, dtype=np.uint64)
    fraction = (philox_words(groups, seed, offset) >> np.uint64(8)).astype(np.float64) / 2**24
    radius = np.sqrt(-2 * np.log(fraction[:, 0::2] + 2**-24))
    angle = 2 * np.pi * fraction[:, 1::2]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return torch.from_numpy(pairs.reshape(-1)[:count].copy())


def times(shape, device):
    """t [B] in [0, 1], float32: from the same generator as ``draw``."""
    if torch.device(device).type == "meta":
        return torch.empty(shape[:1], device=device)
    return torch.rand(shape[:1]).to(device)


def _inputs(shape, dtype, device, variant):
    inputs = {"x0": draw(shape, dtype, device), "t": times(shape, device), "noise": None}
    if variant == "given":
        inputs["noise"] = draw(shape, dtype, device)
    else:
        inputs["seed"], inputs["offset"] = (2**63 + 11, 5)
        if variant == "seed_tensor":
            inputs["seed"] = torch.tensor(-(2**63) + 11, device=device)
            inputs["offset"] = torch.tensor(5, device=device)
    if variant == "not_returned":
        inputs["return_noise"] = False
    return inputs


def _truth(x0, t, noise=None, seed=None, offset=0, return_noise=True):
    if noise is None:
        noise = normals(x0.numel(), int(seed), int(offset)).to(x0.device).reshape(x0.shape)
    t = t.reshape(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * noise, noise if return_noise else None


INTERPOLATE = OpCase(
    name="interpolate",
    function=interpolate,
    reference=_truth,
    make_inputs=_inputs,
    differentiable=("x0", "noise"),
    variants=("given", "seeded", "seed_tensor", "not_returned"),
    shapes=SAMPLE_SHAPES,
    benchmark_shapes=BENCHMARK_SHAPES,
    fixed=("t",),
    compile_shapes=COMPILE_SHAPES,
    edge_shapes=EDGE_SHAPES,
    bad_inputs={
        "no dimension": bad(ValueError, r"^x0: got a tensor with no dimension", x0=torch.ones(())),
        "t of another batch": bad(ValueError, r"^t: got shape \(2,\), need \[B\]", t=torch.ones(2)),
        "t no vector": bad(ValueError, r"^t: got shape \(3, 1\), need \[B\]", t=torch.ones(3, 1)),
        "t a number": bad(TypeError, r"^t: got float, need a torch.Tensor", t=0.5),
        "t of integers": bad(
            TypeError, r"^t: got dtype torch.int64", t=torch.ones(3, dtype=torch.int64)
        ),
        "noise of another shape": bad(
            ValueError, r"^noise: got shape \(3, 84\), need \(3, 85\)", noise=torch.ones(3, 84)
        ),
        "noise and seed": bad(
            ValueError, r"^seed: got one beside noise", noise=torch.ones(3, 85), seed=1
        ),
        "seed of 65 bits": bad(ValueError, r"^seed: got .*need 64 bits", seed=2**64),
        "seed a float": bad(TypeError, r"^seed: got float, need an int", seed=1.0),
        "seed of 32 bits": bad(
            TypeError, r"^seed: got dtype torch.int32", seed=torch.tensor(1, dtype=torch.int32)
        ),
        "seed a vector": bad(ValueError, r"^seed: got shape \(1,\)", seed=torch.tensor([1])),
        "offset a bool": bad(TypeError, r"^offset: got bool", seed=1, offset=True),
    },
)

CASES = (INTERPOLATE,)
