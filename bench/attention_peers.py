"""Joint attention as models write it in PyTorch: norm, rotate, concatenate, attend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """FLUX's rotation of neighbours, in float32; x [B, S, H, E]."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return rotated(normed(q, q_weight), cos, sin), rotated(normed(k, k_weight), cos, sin)


def _split(out: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, S, E] as the streams' [B, S_i, H·E], views as SD3 takes them."""
    joint = out.transpose(1, 2).flatten(2)
    rows = first.shape[1]
    return joint[:, :rows], joint[:, rows:]


def _attend(
    streams: tuple[tuple[Tensor, Tensor], ...], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of (first, second) pairs of q, k, v."""
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in streams)
    return _split(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), streams[0][0])


def joint_attention(
    q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor
) -> tuple[Tensor, Tensor]:
    """SD3: concatenate and attend."""
    return _attend(((q1, q2), (k1, k2), (v1, v2)))


def normed_joint_attention(
    q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    """SD3.5: norm each stream's heads first."""
    a, b, c, d = weights
    return _attend(((normed(q1, a), normed(q2, c)), (normed(k1, b), normed(k2, d)), (v1, v2)))


def rotated_joint_attention(
    q1: Tensor,
    k1: Tensor,
    v1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v2: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """FLUX: norm each stream's heads, concatenate, rotate."""
    q = torch.cat([normed(q1, a), normed(q2, c)], dim=1)
    k = torch.cat([normed(k1, b), normed(k2, d)], dim=1)
    v = torch.cat([v1, v2], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (rotated(q, cos, sin), rotated(k, cos, sin), v))
    image, text = _split(F.scaled_dot_product_attention(q, k, v), q1)
    return image.contiguous(), text.contiguous()


def masked_joint_attention(
    q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """SD3 with padded text: a boolean mask of the valid keys, as SDPA takes it."""
    valid = [
        torch.arange(k.shape[1], device=k.device) < lengths[:, index, None]
        for index, k in enumerate((k1, k2))
    ]
    mask = torch.cat(valid, dim=1)[:, None, None]
    return _attend(((q1, q2), (k1, k2), (v1, v2)), mask)
