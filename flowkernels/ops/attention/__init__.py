"""Attention of MM-DiT blocks: per-head norm and rotation, and two streams as one sequence."""

from __future__ import annotations

import math
from typing import Any

import torch

from flowkernels.ops import _library
from flowkernels.ops._autograd import apply
from flowkernels.ops._validate import (
    as_number,
    check_choice,
    check_shape,
    check_tensor,
    kernels_read,
)
from flowkernels.ops.attention import _cpu, _select, reference
from flowkernels.ops.attention._functions import Attention, JointHeads, QKNormRope

__all__ = ["joint_attention", "qk_norm_rope"]

Tensor = torch.Tensor
Heads = tuple[Tensor, Tensor, Tensor]
Weights = tuple[Tensor | None, Tensor | None]
Rope = tuple[Tensor, Tensor]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: Rope | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
    rounding: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """RMS-normalise queries and keys over each head and rotate them: ``r(n(q)), r(n(k))``.

    ``n(x) = x/√(mean(x²) + eps)·weight`` over the E elements of a head, and
    ``r(x) = x·cos + turned(x)·sin``, where ``turned`` maps a pair ``(x₀, x₁)`` to ``(-x₁, x₀)``.
    The norm of SD3.5 and FLUX (arXiv 2403.03206), the rotation of RoFormer (arXiv 2104.09864).

    Args:
        q: [B, S, H, E], any strides with a unit last stride.
        k: As ``q``.
        q_weight: [E] or None.
        k_weight: [E] or None.
        rope: ``(cos, sin)``, each [S, E] float32, as FLUX's position embedding gives them; takes
            no gradient in the kernels. None: no rotation.
        interleaved: Pairs are neighbours; else the first half pairs with the second.
        eps: Added to the mean of squares.
        rounding: Where a narrow dtype is rounded. ``"fp32"``: once, at the end. ``"torch"``: after
            the norm too, as ``torch.nn.RMSNorm`` does. ``"diffusers"``: before the weight too, to
            the weight's dtype.

    Returns:
        ``(q, k)``, each [B, S, H, E] in the dtype that it and its weight promote to.

    Raises:
        TypeError: An operand is no floating-point tensor, or eps no number.
        ValueError: A shape, device or choice does not fit; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ops import qk_norm_rope
        >>> q, k, v = torch.randn(2, 5, 3, 4, 8).unbind(2)
        >>> angles = torch.randn(5, 4).repeat_interleave(2, dim=-1)
        >>> q, k = qk_norm_rope(q, k, rope=(angles.cos(), angles.sin()))
        >>> q.shape, round(q.square().mean().item(), 3)
        (torch.Size([2, 5, 4, 8]), 1.0)
    """
    _check_heads(q, "q", None)
    check_tensor(k, "k", q)
    check_shape(k, "k", tuple(q.shape))
    _check_weight(q_weight, "q_weight", q)
    _check_weight(k_weight, "k_weight", q)
    cos, sin = _check_rope(rope, q, q.shape[1])
    check_choice(rounding, "rounding", reference.ROUNDINGS)
    options = (bool(interleaved), as_number(eps, "eps"), reference.ROUNDINGS.index(rounding))
    backend = _library.choose(
        "qk_norm_rope",
        q.device,
        kernels_read(q, k, q_weight, k_weight) and _rope_read(cos, sin) and q.shape[-1] > 0,
    )
    operands = (q, k, q_weight, k_weight, cos, sin)
    if backend == "reference":
        return reference.qk_norm_rope(*operands, *options)
    return apply(QKNormRope, backend, *operands, *options)


def joint_attention(
    first: Heads,
    second: Heads | None = None,
    *,
    first_norm: Weights | None = None,
    second_norm: Weights | None = None,
    rope: Rope | None = None,
    interleaved: bool = True,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    rounding: str = "fp32",
    core: str = "auto",
) -> Any:
    """Softmax attention of two streams over both, with no concatenated copies and no mask.

    ``softmax(scale·q kᵀ) v`` on the joined tokens [first, second]; before it each stream's q and k
    are RMS-normed over their heads and rotated, where asked for, on their way into the joint
    layout. The attention of MM-DiT (arXiv 2403.03206).

    Args:
        first: ``(q, k, v)`` of the first stream: q [B, Q₁, H, E], k and v [B, S₁, H, E], strided
            with a unit last stride. Q₁ is S₁, or 0 for a stream that is only attended to (with no
            rope it may be any).
        second: Likewise, or None: plain attention of one stream.
        first_norm: ``(q_weight, k_weight)``, each [E] or None, of the first stream's RMS norm.
            None: no norm.
        second_norm: Likewise.
        rope: ``(cos, sin)``, each [S₁+S₂, E] float32, over the joint sequence in the order
            [first, second]. None: no rotation.
        interleaved: As in :func:`qk_norm_rope`.
        key_lengths: [B, 2] int32 ([B, 1] with one stream): how many of each stream's first keys
            are valid in each sample. Queries of padded rows are computed like the others. None:
            all.
        scale: Of the scores; None is ``1/√E``.
        eps: Of the norms.
        rounding: As in :func:`qk_norm_rope`.
        core: Who computes the softmax and its products: ``"auto"``, ``"sdpa"`` (PyTorch's best;
            on CPU what ``"auto"`` is), ``"cudnn"``, ``"flash"``, ``"xformers"``, ``"triton"`` or
            ``"reference"``.

    Returns:
        ``(out_first, out_second)``, [B, Q₁, H·E] and [B, Q₂, H·E], views of one tensor, in the
        dtype that all streams and weights promote to; with one stream, its output alone. Where a
        sample has no valid key, 0, and so are the gradients.

    Raises:
        TypeError: An operand is no floating-point tensor, key_lengths no integer one.
        ValueError: A shape, device or choice does not fit, or the core cannot serve the call;
            names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.ops import joint_attention
        >>> image = torch.randn(2, 16, 3, 4, 8).unbind(2)
        >>> text = torch.randn(2, 7, 3, 4, 8).unbind(2)
        >>> lengths = torch.tensor([[16, 7], [16, 3]], dtype=torch.int32)
        >>> out_image, out_text = joint_attention(image, text, key_lengths=lengths)
        >>> out_image.shape, out_text.shape
        (torch.Size([2, 16, 32]), torch.Size([2, 7, 32]))
    """
    q1, k1, v1 = _check_stream(first, "first", None)
    q2, k2, v2 = (None, None, None) if second is None else _check_stream(second, "second", q1)
    weights = (
        *_check_norm(first_norm, "first_norm", q1, True),
        *_check_norm(second_norm, "second_norm", q1, second is not None),
    )
    cos, sin = _check_rope(rope, q1, k1.shape[1] + (0 if k2 is None else k2.shape[1]))
    if rope is not None:
        _check_places(q1, k1, "first")
        _check_places(q2, k2, "second")
    _check_lengths(key_lengths, q1, 1 if second is None else 2)
    check_choice(rounding, "rounding", reference.ROUNDINGS)
    check_choice(core, "core", _select.PUBLIC)
    factor = 1 / math.sqrt(max(q1.shape[-1], 1)) if scale is None else as_number(scale, "scale")

    streams = (q1, k1, v1, q2, k2, v2)
    operands = (*streams, *weights, cos, sin, key_lengths)
    norms = (first_norm is not None, second_norm is not None)
    options = (
        *norms,
        bool(interleaved),
        as_number(eps, "eps"),
        reference.ROUNDINGS.index(rounding),
    )
    backend = _library.choose(
        "joint_attention",
        q1.device,
        kernels_read(*streams, *weights) and _rope_read(cos, sin) and q1.shape[-1] > 0,
    )
    dtype = reference.promoted(*streams, *weights)
    chosen = _select.select(
        core, backend, q1.device, dtype, q1.shape[-1], lengths=key_lengths is not None
    )
    if _library.forced() == "reference":
        chosen = "reference"
    out = _computed(chosen, backend, dtype, operands, options, factor).flatten(2)
    if q2 is None:
        return out
    # One split, not two slices: its backward joins the gradients in one pass.
    out_first, out_second = out.split([q1.shape[1], q2.shape[1]], dim=1)
    return out_first, out_second


def _computed(
    core: str, backend: str, dtype: torch.dtype, operands: Any, options: Any, scale: float
) -> Any:
    """The joint output [B, Q1+Q2, H, E]: heads, then the core; or the reference in one."""
    if core == "reference":
        settings: Any = (*options, scale)
        return reference.joint_attention(*operands, *settings)
    q, k, v = _joint_heads(backend, dtype, operands, options)
    (_, k1, _, _, k2), key_lengths = operands[:5], operands[-1]
    lengths = None if key_lengths is None else reference.core_lengths(key_lengths, k1, k2)
    return apply(Attention, core, q, k, v, lengths, scale)


def _joint_heads(backend: str, dtype: torch.dtype, operands: Any, options: Any) -> Heads:
    """The joint layout: by the kernels or the reference, or one stream's own tensors."""
    q, k, v, q2 = operands[:4]
    untouched = q2 is None and not options[0] and all(x is None for x in operands[10:])
    if untouched and q.dtype == k.dtype == v.dtype == dtype and kernels_read(q, k, v):
        return q, k, v
    if backend == "reference":
        q, k, v = reference.joint_heads(*operands, *options)
        return q.contiguous(), k.contiguous(), v.contiguous()
    return apply(JointHeads, backend, *operands, *options)  # type: ignore[no-any-return]


def _rope_read(cos: Tensor | None, sin: Tensor | None) -> bool:
    """Whether the kernels read the rotation: float32, and no gradient asked for."""
    return all(
        x is None or (x.dtype == torch.float32 and not x.requires_grad and kernels_read(x))
        for x in (cos, sin)
    )


def _check_heads(x: Any, name: str, like: Tensor | None) -> None:
    """``x`` is [B, S, H, E], with the batch, heads and width of ``like``."""
    check_tensor(x, name, like)
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, need [B, S, H, E]")
    if like is not None:
        check_shape(x, name, (like.shape[0], x.shape[1], *like.shape[2:]))


def _check_stream(stream: Any, name: str, like: Tensor | None) -> Heads:
    if not isinstance(stream, (tuple, list)) or len(stream) != 3:
        got = f"{len(stream)} items" if isinstance(stream, (tuple, list)) else type(stream).__name__
        raise (ValueError if isinstance(stream, (tuple, list)) else TypeError)(
            f"{name}: got {got}, need (q, k, v)"
        )
    q, k, v = stream
    _check_heads(q, f"{name}.q", like)
    _check_heads(k, f"{name}.k", q)
    check_tensor(v, f"{name}.v", q)
    check_shape(v, f"{name}.v", tuple(k.shape))
    return q, k, v


def _check_weight(weight: Any, name: str, x: Tensor) -> None:
    if weight is not None:
        check_tensor(weight, name, x)
        check_shape(weight, name, (x.shape[-1],))


def _check_norm(norm: Any, name: str, x: Tensor, present: bool) -> Weights:
    if norm is None:
        return None, None
    if not present:
        raise ValueError(f"{name}: got weights, need None where there is no second stream")
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        raise TypeError(f"{name}: got {type(norm).__name__}, need (q_weight, k_weight)")
    _check_weight(norm[0], f"{name}.q_weight", x)
    _check_weight(norm[1], f"{name}.k_weight", x)
    return norm[0], norm[1]


def _check_rope(rope: Any, x: Tensor, rows: int) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        raise TypeError(f"rope: got {type(rope).__name__}, need (cos, sin)")
    if x.shape[-1] % 2:
        raise ValueError(f"rope: got a head of {x.shape[-1]} elements, need an even number")
    for each, name in zip(rope, ("rope.cos", "rope.sin"), strict=True):
        check_tensor(each, name, x)
        check_shape(each, name, (rows, x.shape[-1]))
    return rope[0], rope[1]


def _check_places(q: Tensor | None, k: Tensor | None, name: str) -> None:
    """Queries that are rotated are the stream's own tokens."""
    if q is not None and k is not None and q.shape[1] not in (0, k.shape[1]):
        raise ValueError(
            f"{name}.q: got {q.shape[1]} rows, need 0 or the {k.shape[1]} of its keys under rope"
        )


def _check_lengths(key_lengths: Any, x: Tensor, streams: int) -> None:
    if key_lengths is None:
        return
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths: got {type(key_lengths).__name__}, need a torch.Tensor")
    if key_lengths.dtype != torch.int32:
        raise TypeError(f"key_lengths: got dtype {key_lengths.dtype}, need torch.int32")
    if key_lengths.device != x.device:
        raise ValueError(f"key_lengths: is on {key_lengths.device}, need {x.device} like first")
    check_shape(key_lengths, "key_lengths", (x.shape[0], streams))


_library.implement_on_cpu("attention_forward", _cpu.attention_forward)
_library.implement_on_cpu("attention_backward", _cpu.attention_backward)
for _name in __all__:
    _library.register_function(_name, "flowkernels.ops")
