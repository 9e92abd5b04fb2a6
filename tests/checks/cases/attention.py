"""qk_norm_rope and joint_attention."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import flowkernels
from flowkernels.ops import _library
from tests.checks.case import OpCase, bad, draw

HEADS = 2
# A row of one or two elements normalises to ±1 whatever it is, so its gradient is zero but for eps
# and all that is left to compare is rounding noise. An eps near the row's size makes it a function.
EPS = {True: 25.0, False: 1e-6}


def _angles(rows, width, device):
    """cos and sin of angles of their own for every element: kernels may not assume pairs equal."""
    angles = 3 * draw((rows, width), torch.float32, device)
    return angles.cos(), angles.sin()


def _rotated(x, cos, sin, interleaved):
    """Pair by pair: (x0·cos0 - x1·sin0, x1·cos1 + x0·sin1)."""
    half = x.shape[-1] // 2
    one = slice(0, None, 2) if interleaved else slice(0, half)
    two = slice(1, None, 2) if interleaved else slice(half, None)
    cos, sin = cos[:, None], sin[:, None]
    first = x[..., one] * cos[..., one] - x[..., two] * sin[..., one]
    second = x[..., two] * cos[..., two] + x[..., one] * sin[..., two]
    if interleaved:
        return torch.stack([first, second], dim=-1).reshape(x.shape)
    return torch.cat([first, second], dim=-1)


def _head(x, normed, weight, cos, sin, interleaved, eps):
    if normed:
        dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
        x = F.rms_norm(x.to(dtype), x.shape[-1:], None if weight is None else weight.to(dtype), eps)
    return x if cos is None else _rotated(x, cos, sin, interleaved).to(x.dtype)


def _qk_inputs(shape, dtype, device, variant):
    """Variants: what is there (weights, rope), and options."""
    parts = variant.split("_")
    weights, rope = "plain" not in parts, "norope" not in parts
    columns = shape[-1:]
    rows = _angles(shape[1], shape[-1], device) if rope else (None, None)
    return {
        "q": 2 * draw(shape, dtype, device) + 0.5,
        "k": draw(shape, dtype, device),
        "q_weight": draw(columns, dtype, device) if weights else None,
        "k_weight": draw(columns, dtype, device) if weights and "onlyq" not in parts else None,
        "cos": rows[0],
        "sin": rows[1],
        "interleaved": "half" not in parts,
        "rounding": next((each for each in parts if each in ("torch", "diffusers")), "fp32"),
        "eps": EPS[shape[-1] <= 2],
    }


def _qk(q, k, q_weight, k_weight, cos, sin, interleaved, rounding, eps):
    return flowkernels.ops.qk_norm_rope(
        q,
        k,
        q_weight=q_weight,
        k_weight=k_weight,
        rope=None if cos is None else (cos, sin),
        interleaved=interleaved,
        rounding=rounding,
        eps=eps,
    )


def _qk_truth(q, k, q_weight, k_weight, cos, sin, interleaved, rounding, eps):
    return tuple(
        _head(x, True, weight, cos, sin, interleaved, eps)
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def _even(shape):
    """Rotation takes pairs. The interpreter, a program at a time, gets fewer of them."""
    if _library.INTERPRETED:
        shape = (*(min(size, 9) for size in shape[:-1]), min(shape[-1], 70))
    return (*shape[:-1], shape[-1] + shape[-1] % 2)


QK_NORM_ROPE = OpCase(
    name="qk_norm_rope",
    function=_qk,
    reference=_qk_truth,
    make_inputs=_qk_inputs,
    differentiable=("q", "k", "q_weight", "k_weight"),
    variants=(
        "interleaved",
        "half",
        "plain",
        "norope",
        "plain_norope",
        "onlyq",
        "torch",
        "diffusers",
        "half_diffusers_plain",
    ),
    fixed=("cos", "sin"),
    # Heads of SD3 and FLUX, and widths that no vector register divides.
    shapes=(
        (2, 5, 3, 18),
        (1, 1, 1, 2),
        (2, 37, 3, 64),
        (1, 33, 2, 128),
        (3, 7, 5, 80),
        (1, 2, 1, 334),
    ),
    benchmark_shapes=((4, 1024, 24, 64), (1, 1536, 24, 128), (4, 1024, 38, 64)),
    compile_shapes=((2, 3, 4, 16), (4, 5, 4, 16), (3, 7, 4, 16)),
    edge_shapes=((1, 3, 4, 16), (2, 1, 4, 16), (0, 3, 4, 16), (2, 0, 4, 16)),
    gradcheck_shape=(2, 2, 2, 4),
    allowed=_even,
    bad_inputs={
        "three dimensions": bad(
            ValueError, r"^q: got shape \(2, 3, 4\), need \[B, S, H, E\]", q=torch.ones(2, 3, 4)
        ),
        "k of another shape": bad(
            ValueError, r"^k: got shape \(2, 5, 3, 16\), need", k=torch.ones(2, 5, 3, 16)
        ),
        "k elsewhere": bad(
            ValueError, "^k: is on meta, need cpu", k=torch.ones(2, 5, 3, 18, device="meta")
        ),
        "weight": bad(
            ValueError, r"^q_weight: got shape \(3, 18\), need \(18,\)", q_weight=torch.ones(3, 18)
        ),
        "rope of other rows": bad(
            ValueError, r"^rope\.cos: got shape \(4, 18\), need \(5, 18\)", cos=torch.ones(4, 18)
        ),
        "rounding": bad(
            ValueError, "^rounding: got 'fp8', need one of fp32, torch, diffusers", rounding="fp8"
        ),
        "eps": bad(TypeError, "^eps: got str, need a number", eps="small"),
    },
)


def _lengths(batch, *rows):
    """All valid, then part of each stream, then one stream alone, none, and more than there are."""
    first, *second = rows
    patterns = [
        (first, *second),
        (first // 2, *(max(1, each // 3) for each in second)),
        (first, *(0 for _ in second)),
        (0, *(0 for _ in second)),
        (first + 5, *(each + 1 for each in second)),
        (-1, *(each // 2 for each in second)),
    ]
    # The gradients of one valid key's score are 0 but for rounding noise: none is valid then.
    valid = [
        sum(min(max(length, 0), most) for length, most in zip(pattern, rows, strict=True))
        for pattern in patterns
    ]
    patterns = [
        (0,) * len(rows) if count == 1 else pattern
        for pattern, count in zip(patterns, valid, strict=True)
    ]
    # The second sample first: batches of one and two see ragged lengths.
    taken = [patterns[(index + 1) % len(patterns)] for index in range(batch)]
    return torch.tensor(taken, dtype=torch.int32).reshape(batch, len(rows))


def _joint_inputs(shape, dtype, device, variant):
    """Variants: one or two streams, then what is there. Shape: B, S1, S2, E."""
    batch, first, second, width = shape
    parts = variant.split("_")
    two = "one" not in parts
    first = first if two else first + second

    def stream(name, rows, present):
        queries = 0 if f"{name}queryless" in parts else rows
        sizes = {"q": queries, "k": rows, "v": rows}
        return {
            f"{name}.{each}": draw((batch, size, HEADS, width), dtype, device) if present else None
            for each, size in sizes.items()
        }

    def norm(name, normed):
        affine = normed and "plain" not in parts
        return {
            f"{name}_norm.{each}_weight": draw((width,), dtype, device) if affine else None
            for each in "qk"
        }

    norm1 = "norm" in parts
    norm2 = ("norm" in parts or "norm2" in parts) and two
    rows = (first, second) if two else (first,)
    cos, sin = _angles(sum(rows), width, device) if "rope" in parts else (None, None)
    lengths = _lengths(batch, *rows).to(device) if "lengths" in parts else None
    return {
        **stream("first", first, True),
        **stream("second", second, two),
        **norm("first", norm1),
        **norm("second", norm2),
        "cos": cos,
        "sin": sin,
        "key_lengths": lengths,
        "norms": (norm1, norm2),
        "scale": 0.3 if "scale" in parts else None,
        "eps": EPS[width <= 2],
        "rounding": next((each for each in parts if each in ("torch", "diffusers")), "fp32"),
        "core": "auto",
    }


def _named(inputs, name):
    return tuple(inputs[f"{name}.{each}"] for each in "qkv")


def _weights(inputs, name):
    return tuple(inputs[f"{name}_norm.{each}_weight"] for each in "qk")


def _joint(**inputs):
    norm1, norm2 = inputs["norms"]
    two = inputs["second.k"] is not None
    return flowkernels.ops.joint_attention(
        _named(inputs, "first"),
        _named(inputs, "second") if two else None,
        first_norm=_weights(inputs, "first") if norm1 else None,
        second_norm=_weights(inputs, "second") if norm2 else None,
        rope=None if inputs["cos"] is None else (inputs["cos"], inputs["sin"]),
        key_lengths=inputs["key_lengths"],
        scale=inputs["scale"],
        eps=inputs["eps"],
        rounding=inputs["rounding"],
        core=inputs["core"],
    )


def _joint_truth(**inputs):
    """By a mask over unpacked keys."""
    return _unpacked(inputs, _softmax_product)


def _joint_peer(**inputs):
    """As models do it in PyTorch: norm, rotation, concatenation, SDPA with a mask."""
    if inputs["rounding"] != "fp32":
        return _joint(**inputs)
    with torch.autocast(inputs["first.q"].device.type, enabled=False):
        return _unpacked(inputs, _sdpa)


def _unpacked(inputs, core):
    streams = [_named(inputs, "first")]
    if inputs["second.k"] is not None:
        streams.append(_named(inputs, "second"))
    start, queries, keys, values, valid = 0, [], [], [], []
    for index, ((q, k, v), name) in enumerate(zip(streams, ("first", "second"), strict=False)):
        rows = k.shape[1]
        q_weight, k_weight = _weights(inputs, name)
        cos, sin = (
            None if inputs[each] is None else inputs[each][start : start + rows]
            for each in ("cos", "sin")
        )
        options = (True, inputs["eps"])
        here = (None, None) if cos is None else (cos[: q.shape[1]], sin[: q.shape[1]])
        count = torch.full((v.shape[0],), rows, device=v.device)
        if inputs["key_lengths"] is not None:
            count = inputs["key_lengths"][:, index]
        valid.append(torch.arange(rows, device=v.device) < count[:, None])
        # Before the norm too: through it a NaN's gradient of zero would be NaN.
        k = torch.where(valid[-1][:, :, None, None], k, 0)
        queries.append(_head(q, inputs["norms"][index], q_weight, *here, *options))
        keys.append(_head(k, inputs["norms"][index], k_weight, cos, sin, *options))
        values.append(v)
        start += rows
    q, k, v = (torch.cat(each, dim=1) for each in (queries, keys, values))
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (q, k, v)))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = core(q, k, v, torch.cat(valid, dim=1), inputs["scale"]).flatten(2)
    if len(streams) == 1:
        return out
    return out.split([each[0].shape[1] for each in streams], dim=1)


def _softmax_product(q, k, v, valid, scale):
    """Rows with no valid key are 0; what lies in an invalid row is never looked at."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (torch.where(valid[:, :, None, None], x, 0) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    if scores.shape[-1]:
        largest = scores.detach().amax(-1, keepdim=True)
        scores = scores - torch.where(largest == float("-inf"), 0, largest)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhe->bqhe", weights / torch.where(total == 0, 1, total), v)


def _sdpa(q, k, v, valid, scale):
    some = valid.any(1)[:, None, None, None]
    k, v = (torch.where(valid[:, :, None, None], x, 0) for x in (k, v))
    mask = None if valid.all() else valid[:, None, None] | ~some
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not k.shape[2]:
        return torch.zeros_like(q).transpose(1, 2) + q.sum() * 0
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
    return torch.where(some, out, 0)


JOINT_ATTENTION = OpCase(
    name="joint_attention",
    function=_joint,
    reference=_joint_truth,
    peer=_joint_peer,
    make_inputs=_joint_inputs,
    differentiable=(
        *(f"{name}.{each}" for name in ("first", "second") for each in "qkv"),
        *(f"{name}_norm.{each}_weight" for name in ("first", "second") for each in "qk"),
    ),
    variants=(
        "two_norm_rope_lengths",
        "two",
        "two_lengths",
        "one",
        "one_norm_rope_lengths",
        "two_rope_scale",
        "two_norm_plain",
        "two_norm2_rope_diffusers",
        "two_norm_rope_torch",
        "two_secondqueryless_norm_rope",
        "two_firstqueryless_rope_lengths",
    ),
    fixed=("cos", "sin"),
    shapes=(
        (3, 5, 4, 18),
        (1, 1, 1, 2),
        (6, 7, 3, 32),
        (2, 33, 17, 64),
        (1, 130, 7, 80),
        (2, 17, 5, 128),
    ),
    # SD3-medium and FLUX.1-dev at 512 px, SD3.5-large's heads; a head of 80.
    benchmark_shapes=((2, 1024, 333, 64), (1, 1024, 512, 128), (1, 64, 33, 80)),
    # No size is HEADS: dynamic shapes take equal sizes for one.
    compile_shapes=((4, 3, 5, 16), (5, 7, 9, 16), (3, 8, 6, 16)),
    edge_shapes=(
        (1, 3, 5, 16),
        (2, 1, 5, 16),
        (2, 3, 1, 16),
        (0, 3, 5, 16),
        (2, 0, 5, 16),
        (2, 3, 0, 16),
    ),
    gradcheck_shape=(2, 2, 3, 4),
    allowed=_even,
    bad_inputs={
        "three dimensions": bad(
            ValueError,
            r"^first\.q: got shape \(2, 3, 4\), need",
            **{"first.q": torch.ones(2, 3, 4)},
        ),
        "keys of another head": bad(
            ValueError,
            r"^second\.k: got shape \(3, 4, 2, 16\), need \(3, 4, 2, 18\)",
            **{"second.k": torch.ones(3, 4, 2, 16)},
        ),
        "rope of other rows": bad(
            ValueError, r"^rope\.cos: got shape \(4, 18\), need \(9, 18\)", cos=torch.ones(4, 18)
        ),
        "queries of other rows under rope": bad(
            ValueError,
            r"^first\.q: got 2 rows, need 0 or the 5 of its keys",
            **{"first.q": torch.ones(3, 2, 2, 18)},
        ),
        "lengths of one stream": bad(
            ValueError,
            r"^key_lengths: got shape \(3, 1\), need \(3, 2\)",
            key_lengths=torch.ones(3, 1, dtype=torch.int32),
        ),
        "lengths of another dtype": bad(
            TypeError,
            r"^key_lengths: got dtype torch.int64, need torch.int32",
            key_lengths=torch.ones(3, 2, dtype=torch.int64),
        ),
        "rounding": bad(ValueError, "^rounding: got 'fp8', need one of", rounding="fp8"),
        "unknown core": bad(ValueError, "^core: got 'fast', need one of auto, sdpa", core="fast"),
        "core that is not there": bad(
            ValueError, "^core: 'flash' needs CUDA tensors, got cpu", core="flash"
        ),
        "scale": bad(TypeError, "^scale: got str, need a number", scale="large"),
    },
)

CASES = (QK_NORM_ROPE, JOINT_ATTENTION)
