"""The noising process ``x_t = (1 - t)·x0 + t·noise``, with noise given, drawn or counter-based."""

from __future__ import annotations

from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import FusedFunction, mask_of, record, scatter
from flowkernels.ops._samples import (
    check_batch_vector,
    check_like,
    check_samples,
    kernels_read_samples,
    per_sample,
    readable_samples,
    tracked,
)
from flowkernels.ops.interpolate import _operators as operators
from flowkernels.ops.interpolate import reference

__all__ = ["interpolate"]

Tensor = torch.Tensor


def interpolate(
    x0: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    return_noise: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The state of the noising process at time t: ``x_t = (1 - t)·x0 + t·noise``.

    t = 0 is data, t = 1 is noise (the convention of diffusers; flow matching, arXiv 2210.02747).
    With a ``seed`` the noise is a function of (seed, offset, element index) alone: standard
    normals from philox4x32-10, the same whatever the device, the dtype or the tile, recomputed
    where it is needed and stored only if asked for. Under CUDA-graph capture seed and offset have
    to be device tensors: an int would repeat the same noise at each replay.

    Args:
        x0: [B, ...], data. Samples that are not contiguous take the reference path.
        t: [B], time of each sample; its dtype does not count in the result's.
        noise: [B, ...] of x0's shape. Where neither it nor ``seed`` is given, it is drawn from
            torch's generator, in x0's dtype.
        seed: int in [-2⁶³, 2⁶⁴) or 0-d int64 tensor on x0's device.
        offset: As ``seed``: which of the seed's streams. Used with ``seed`` only.
        return_noise: False: the second result is None, and seeded noise is never stored.

    Returns:
        ``(x_t, noise)``: x_t in the dtype that x0 and noise promote to, formed in float32 from
        the noise as it is returned, after rounding to x0's dtype; rounded once.
        Gradients: (1 - t) to x0, t to a given noise, and to t through the reference path.

    Raises:
        TypeError: An operand is no floating-point tensor, or a seed no integer.
        ValueError: A shape or device does not fit, or noise and seed are both given; names the
            argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import interpolate
        >>> x0, t = torch.zeros(2, 3), torch.ones(2)
        >>> x_t, noise = interpolate(x0, t, seed=7)
        >>> torch.equal(x_t, noise)
        True
    """
    check_samples(x0, "x0")
    check_batch_vector(t, "t", x0)
    if noise is not None:
        check_like(noise, "noise", x0)
        if seed is not None:
            raise ValueError("seed: got one beside noise, need at most one of the two")
    elif seed is None:
        noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device)
    time_needs_grad = t.requires_grad and torch.is_grad_enabled()
    backend = _library.choose(
        "interpolate", x0.device, not time_needs_grad and kernels_read_samples(x0, noise)
    )
    if backend != "reference" and t.dtype == torch.float64:
        t = t.float()
    if noise is not None:
        return _with_noise(backend, x0, t, noise), noise if return_noise else None
    assert seed is not None
    return _with_seed(
        backend, x0, t, _bits(seed, "seed", x0), _bits(offset, "offset", x0), return_noise
    )


def _with_noise(backend: str, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    if backend == "reference":
        return reference.interpolate(x0, t, noise)
    if tracked(x0, noise, constants=(t,)):
        return record(Interpolate, backend, x0, t, noise)
    return operators.interpolate_forward(backend, x0, t, noise)


def _with_seed(
    backend: str,
    x0: Tensor,
    t: Tensor,
    seed: int | Tensor,
    offset: int | Tensor,
    return_noise: bool,
) -> tuple[Tensor, Tensor | None]:
    if backend == "reference":
        noise = _noise_of(x0, seed, offset)
        return reference.interpolate(x0, t, noise), noise if return_noise else None
    if torch.compiler.is_compiling():
        # A number would be a constant of the graph, and each new seed a recompile.
        seed, offset = _on_device(seed, x0), _on_device(offset, x0)
    arguments = (x0, t, *_pair(seed), *_pair(offset), return_noise)
    if tracked(x0, constants=(t,)):
        x_t, noise = record(InterpolateSeeded, backend, *arguments)
    else:
        x_t, noise = operators.interpolate_seeded(backend, *arguments)
    return x_t, noise if return_noise else None


def _noise_of(x0: Tensor, seed: int | Tensor, offset: int | Tensor) -> Tensor:
    """Seeded noise for an x0 that the kernels do not read, with the bits that they give."""
    backend = _library.choose("interpolate", x0.device, True)
    if backend == "reference":
        return reference.seeded_noise(x0, seed, offset)
    dtype = x0.dtype if kernels_read_samples(x0.new_empty(0)) else torch.float32
    like = torch.zeros(x0.shape, dtype=dtype, device=x0.device)
    t = torch.zeros(x0.shape[:1], dtype=torch.float32, device=x0.device)
    arguments = (*_pair(seed), *_pair(offset), True)
    _, noise = operators.interpolate_seeded(backend, like, t, *arguments)
    return noise.to(x0.dtype)


def philox(groups: Tensor, seed: int | Tensor = 0, offset: int | Tensor = 0) -> Tensor:
    """Words of philox4x32-10: the bits behind ``interpolate(seed=...)``.

    Group g holds the words of elements 4g to 4g + 3: counter (g lo, g hi, offset lo, offset hi),
    key (seed lo, seed hi). (Salmon et al., SC 2011.)

    Args:
        groups: [N] int64, each the 64-bit pattern of a group's index.
        seed: int in [-2⁶³, 2⁶⁴) or 0-d int64 tensor.
        offset: As ``seed``.

    Returns:
        int64 [N, 4], each word in [0, 2³²).

    Raises:
        TypeError: groups is no int64 tensor, or a seed no integer.
        ValueError: A shape or device does not fit.

    Example:
        >>> import torch
        >>> from flowkernels.ops.interpolate import philox
        >>> [f"{int(word):08x}" for word in philox(torch.zeros(1, dtype=torch.int64))[0]]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        found = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"groups: got {found}, need an int64 tensor")
    if groups.dim() != 1:
        raise ValueError(f"groups: got shape {tuple(groups.shape)}, need [N]")
    seed, offset = _bits(seed, "seed", groups), _bits(offset, "offset", groups)
    backend = _library.choose("interpolate", groups.device, True)
    if backend == "reference":
        return reference.philox(groups, seed, offset)
    return operators.philox(backend, groups.contiguous(), *_pair(seed), *_pair(offset))


class Interpolate(FusedFunction):
    """Saves t alone: the map is linear in x0 and noise."""

    @staticmethod
    def forward(ctx: Any, backend: str, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        ctx.backend, ctx.dtypes = backend, (x0.dtype, noise.dtype)
        return operators.interpolate_forward(backend, x0, t, noise)

    @staticmethod
    def backward(ctx: Any, grad_x_t: Tensor) -> Any:
        (t,) = ctx.saved_tensors
        needed = (ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grad_x0, grad_noise = _gradients(ctx.backend, grad_x_t, t, needed, ctx.dtypes)
        return None, grad_x0, None, grad_noise


class InterpolateSeeded(FusedFunction):
    """The same with noise that nobody differentiates: it is a constant of (seed, offset)."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x0: Tensor,
        t: Tensor,
        seed: Tensor | None,
        seed_value: int,
        offset: Tensor | None,
        offset_value: int,
        return_noise: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(t)
        ctx.backend, ctx.dtypes = backend, (x0.dtype, x0.dtype)
        x_t, noise = operators.interpolate_seeded(
            backend, x0, t, seed, seed_value, offset, offset_value, return_noise
        )
        ctx.mark_non_differentiable(noise)
        ctx.set_materialize_grads(False)
        return x_t, noise

    @staticmethod
    def backward(ctx: Any, grad_x_t: Tensor | None, _: Tensor | None) -> Any:
        (t,) = ctx.saved_tensors
        grad_x0 = None
        if grad_x_t is not None:
            grad_x0, _ = _gradients(ctx.backend, grad_x_t, t, (True, False), ctx.dtypes)
        return None, grad_x0, None, None, None, None, None, None


def _gradients(
    backend: str,
    grad_x_t: Tensor,
    t: Tensor,
    needed: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[Tensor | None]:
    """(1 - t)·grad and t·grad; plain, differentiable products under ``create_graph``."""
    if torch.is_grad_enabled():
        time = per_sample(t.to(torch.promote_types(t.dtype, torch.float32)), grad_x_t)
        factors = zip((1 - time, time), needed, strict=True)
        found = [factor * grad_x_t for factor, need in factors if need]
    else:
        found = operators.interpolate_backward(
            backend, readable_samples(grad_x_t), t, mask_of(needed)
        )
    return [
        None if grad is None else grad.to(dtype)
        for grad, dtype in zip(scatter(found, needed), dtypes, strict=True)
    ]


def _bits(value: int | Tensor, name: str, like: Tensor) -> int | Tensor:
    """A seed or an offset as a tensor, or as the signed integer of the same 64 bits."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name}: got dtype {value.dtype}, need torch.int64")
        if value.dim() != 0:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, need a 0-d tensor")
        if value.device != like.device:
            raise ValueError(f"{name}: is on {value.device}, need {like.device} like the data")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int or a 0-d int64 tensor")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: got {value}, need 64 bits: from -2**63 to 2**64 - 1")
    return value - 2**64 if value >= 2**63 else value


def _on_device(value: int | Tensor, like: Tensor) -> int | Tensor:
    # Negative ones may stand for 2⁶³ and more, which a graph has no variable for.
    if isinstance(value, Tensor) or value < 0:
        return value
    return torch.full((), value, dtype=torch.int64, device=like.device)


def _pair(value: int | Tensor) -> tuple[Tensor | None, int]:
    """How operators take a seed: a tensor, or None and the integer."""
    return (value, 0) if isinstance(value, Tensor) else (None, value)


_library.register_function("interpolate", "flowkernels.losses")
