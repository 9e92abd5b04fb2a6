"""Per-head norm, rotation and joint attention in plain PyTorch: the specification of the kernels.

    n(x)  = x / sqrt(mean(x²) + eps) · weight                                   over the E of a head
    r(x)  = x · cos + turned(x) · sin          turned: (x₀, x₁) → (-x₁, x₀) in pairs, or in halves
    q, k  = r(n(q)), r(n(k))                                    each stream with weights of its own
    out   = softmax(scale · q kᵀ) v            over the valid keys of both streams; 0 if none is

Arithmetic is at least float32, and float64 where an operand is. Roundings to a narrower dtype:

    FP32        one, at the end
    TORCH       after the norm, weight included, and after the rotation: ``torch.nn.RMSNorm``
    DIFFUSERS   x̂ to the weight's dtype, the product in it, and after the rotation; without a
                weight x̂ to x's dtype. A float32 weight rounds nothing

The joint q, k, v are rounded to the dtype that all streams and weights promote to; so are outputs.
"""

from __future__ import annotations

import torch

from flowkernels.ops._autograd import outside_autocast

Tensor = torch.Tensor

ROUNDINGS = ("fp32", "torch", "diffusers")
FP32, TORCH, DIFFUSERS = range(3)


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that torch's promotion gives these operands."""
    found = [tensor.dtype for tensor in tensors if tensor is not None]
    result = found[0]
    for dtype in found[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rms_norm_heads(
    x_BSHE: Tensor, weight_E: Tensor | None, eps: float, rounding: int, dtype: torch.dtype
) -> Tensor:
    """n(x) with the roundings of ``rounding``; ``dtype`` is what TORCH rounds to."""
    compute = _wide(dtype)
    x = x_BSHE.to(compute)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if rounding == DIFFUSERS:
        y = y.to(x_BSHE.dtype if weight_E is None else weight_E.dtype)
        # In the weight's dtype: one rounding more.
        return (y if weight_E is None else y * weight_E).to(compute)
    if weight_E is not None:
        y = y * weight_E.to(compute)
    return y.to(dtype).to(compute) if rounding == TORCH else y


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """A quarter turn of each pair: neighbours where ``interleaved``, else halves."""
    if interleaved:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-imaginary, real], dim=-1).flatten(-2)
    real, imaginary = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([-imaginary, real], dim=-1)


def rotate(x_BSHE: Tensor, cos_SE: Tensor, sin_SE: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos_SE.unsqueeze(1), sin_SE.unsqueeze(1)
    return x_BSHE * cos + turned(x_BSHE, interleaved) * sin


def _head(
    x: Tensor,
    normed: bool,
    weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    eps: float,
    rounding: int,
    dtype: torch.dtype,
) -> Tensor:
    """r(n(x)) in ``dtype``; rope's rows are x's."""
    compute = _wide(dtype)
    y = rms_norm_heads(x, weight, eps, rounding, dtype) if normed else x.to(compute)
    if rope is not None:
        cos, sin = (each.to(torch.promote_types(compute, each.dtype)) for each in rope)
        y = rotate(y, cos, sin, interleaved)
    return y.to(dtype)


def qk_norm_rope(
    q_BSHE: Tensor,
    k_BSHE: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = True,
    eps: float = 1e-6,
    rounding: int = FP32,
) -> tuple[Tensor, Tensor]:
    rope = None if cos is None or sin is None else (cos, sin)
    options = (rope, interleaved, eps, rounding)
    return (
        _head(q_BSHE, True, q_weight, *options, promoted(q_BSHE, q_weight)),
        _head(k_BSHE, True, k_weight, *options, promoted(k_BSHE, k_weight)),
    )


def clamped_lengths(key_lengths: Tensor, *keys: Tensor | None) -> list[Tensor]:
    """The valid keys of each stream, each [B], within 0..S_i."""
    return [
        key_lengths[:, index].clamp(0, k.shape[1]) for index, k in enumerate(keys) if k is not None
    ]


def core_lengths(key_lengths: Tensor, k1: Tensor, k2: Tensor | None) -> Tensor:
    """Valid keys of a sample after packing, [B] int32: the one length that a core needs."""
    first, *second = clamped_lengths(key_lengths, k1, k2)
    return (first + second[0] if second else first).to(torch.int32)


def valid_rows(x_BSHE: Tensor, count_B: Tensor) -> Tensor:
    """x with 0 in the rows from ``count`` on."""
    valid = torch.arange(x_BSHE.shape[1], device=x_BSHE.device) < count_B.unsqueeze(1)
    return torch.where(valid[:, :, None, None], x_BSHE, x_BSHE.new_zeros(()))


def packed(x_BSHE: Tensor, key_lengths: Tensor, k1: Tensor, k2: Tensor | None) -> Tensor:
    """Rows of [first, second] with the valid ones of each sample moved to its front, then zeros."""
    first, *second = clamped_lengths(key_lengths, k1, k2)
    first = first.unsqueeze(1)
    total = first + second[0].unsqueeze(1) if second else first
    row = torch.arange(x_BSHE.shape[1], device=x_BSHE.device).unsqueeze(0)
    # The second stream starts at row S1; past the end nothing is taken, whatever it points at.
    source = torch.where(row < first, row, row - first + k1.shape[1]).clamp(max=x_BSHE.shape[1] - 1)
    taken = x_BSHE.gather(1, source[:, :, None, None].expand(x_BSHE.shape))
    return valid_rows(taken, total.squeeze(1))


def joint_heads(
    q1: Tensor,
    k1: Tensor,
    v1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    q1_weight: Tensor | None,
    k1_weight: Tensor | None,
    q2_weight: Tensor | None,
    k2_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_lengths: Tensor | None,
    norm1: bool,
    norm2: bool,
    interleaved: bool,
    eps: float,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams' q, k, v in the joint layout: normed, rotated, keys and values packed."""
    dtype = promoted(q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight)

    if key_lengths is not None:
        # Padding is dropped before the norm: through it a NaN's gradient of zero would be NaN.
        first, *second = clamped_lengths(key_lengths, k1, k2)
        k1 = valid_rows(k1, first)
        k2 = valid_rows(k2, second[0]) if k2 is not None else None

    def head(x: Tensor, normed: bool, weight: Tensor | None, start: int) -> Tensor:
        rope = None
        if cos is not None and sin is not None:
            rope = (cos[start : start + x.shape[1]], sin[start : start + x.shape[1]])
        return _head(x, normed, weight, rope, interleaved, eps, rounding, dtype)

    q, k, v = head(q1, norm1, q1_weight, 0), head(k1, norm1, k1_weight, 0), v1.to(dtype)
    if q2 is not None and k2 is not None and v2 is not None:
        start = k1.shape[1]
        q = torch.cat([q, head(q2, norm2, q2_weight, start)], dim=1)
        k = torch.cat([k, head(k2, norm2, k2_weight, start)], dim=1)
        v = torch.cat([v, v2.to(dtype)], dim=1)
    if key_lengths is not None:
        k, v = packed(k, key_lengths, k1, k2), packed(v, key_lengths, k1, k2)
    return q, k, v


def attention(
    q_BQHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, lengths_B: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ) v over the first ``lengths`` keys of each sample, [B, Q, H, E]."""
    dtype = promoted(q_BQHE, k_BSHE, v_BSHE)
    q, k, v = (x.transpose(1, 2).to(_wide(dtype)) for x in (q_BQHE, k_BSHE, v_BSHE))
    # Autocast would take the products in a narrower dtype than the op promises.
    with outside_autocast((q,)):
        scores_BHQS = q @ k.transpose(2, 3) * scale
        if lengths_B is not None:
            valid = torch.arange(k.shape[2], device=k.device) < lengths_B.unsqueeze(1)
            # With no valid key all are kept: they are zeros, so output and gradients are.
            valid = valid | (lengths_B <= 0).unsqueeze(1)
            scores_BHQS = scores_BHQS.masked_fill(~valid[:, None, None, :], float("-inf"))
        out = torch.softmax(scores_BHQS, dim=-1) @ v
    return out.transpose(1, 2).to(dtype)


def joint_attention(
    q1: Tensor,
    k1: Tensor,
    v1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    q1_weight: Tensor | None,
    k1_weight: Tensor | None,
    q2_weight: Tensor | None,
    k2_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_lengths: Tensor | None,
    norm1: bool,
    norm2: bool,
    interleaved: bool,
    eps: float,
    rounding: int,
    scale: float,
) -> Tensor:
    """Attention of the joint tokens, [B, Q1+Q2, H, E]: rows of the streams' outputs in order."""
    q, k, v = joint_heads(
        q1, k1, v1, q2, k2, v2, q1_weight, k1_weight, q2_weight, k2_weight, cos, sin,
        key_lengths, norm1, norm2, interleaved, eps, rounding,
    )  # fmt: skip
    lengths = None if key_lengths is None else core_lengths(key_lengths, k1, k2)
    return attention(q, k, v, lengths, scale)
