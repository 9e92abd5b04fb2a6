"""The noising process in plain PyTorch: the specification of the kernels.

    x_t = (1 - t)·x0 + t·noise

Noise from a seed is element-addressed: with i the index in the contiguous order of x0,
    words = philox4x32-10(counter = (⌊i/4⌋ lo, hi, offset lo, hi), key = (seed lo, hi))
    u1 = ((words[0] >> 8) + 1)·2⁻²⁴,  u2 = (words[1] >> 8)·2⁻²⁴       (and words[2], words[3])
    z[0], z[1] = √(-2 ln u1)·(cos 2πu2, sin 2πu2)                       (and z[2], z[3])
and element i is z[i % 4], in float32 and then rounded to x0's dtype.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch

from flowkernels.ops._samples import per_sample

Tensor = torch.Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _halves(value: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The low and high 32 bits of a 64-bit pattern; an arithmetic shift leaves the same bits."""
    return value & _MASK, (value >> 32) & _MASK


def philox(groups: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
    """philox4x32-10 of counters (group lo, hi, offset lo, hi): int64 [N, 4] of 32-bit words.

    Products of two 32-bit words fill 64 bits; int64 wraps, so both halves come out right.
    """
    counter: list[int | Tensor] = [*_halves(groups), *_halves(offset)]
    key = list(_halves(seed))
    for _ in range(_ROUNDS):
        first = counter[0] * _MULTIPLIERS[0]
        second = counter[2] * _MULTIPLIERS[1]
        counter = [
            ((second >> 32) & _MASK) ^ counter[1] ^ key[0],
            second & _MASK,
            ((first >> 32) & _MASK) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    words = [torch.as_tensor(word, device=groups.device).expand_as(groups) for word in counter]
    return torch.stack(words, dim=-1)


def normals(n: int, seed: int | Tensor, offset: int | Tensor, device: torch.device) -> Tensor:
    """Elements 0 to n of the noise of (seed, offset): float32 [n]."""
    groups = torch.arange((n + 3) // 4, device=device, dtype=torch.int64)
    fraction = philox(groups, seed, offset) >> 8
    u1 = (fraction[:, 0::2] + 1).double() * 2.0**-24
    u2 = fraction[:, 1::2].double() * 2.0**-24
    radius, angle = (-2.0 * u1.log()).sqrt(), 2.0 * math.pi * u2
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.reshape(-1)[:n].float()


def seeded_noise(x0: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
    """Noise of x0's shape, contiguous and in its dtype."""
    return normals(x0.numel(), seed, offset, x0.device).reshape(x0.shape).to(x0.dtype)


def interpolate(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    dtype = torch.promote_types(x0.dtype, noise.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    time = per_sample(t, x0).to(compute)
    return ((1 - time) * x0.to(compute) + time * noise.to(compute)).to(dtype)
