"""The operators that norm, rotate and lay out heads, against their reference in float64.

They are called as the public functions call them, so what belongs to the kernels alone is seen:
packed keys, strides, queries that are absent, single weights' gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from flowkernels.ops import _library
from flowkernels.ops.attention import _operators as operators
from flowkernels.ops.attention import reference
from tests.checks.case import DTYPES, strided
from tests.checks.compare import assert_close
from tests.checks.contexts import interpretable, poisoned_memory, threads
from tests.ops.test_interpreter import interpret

Tensor = torch.Tensor
KERNELS = "triton" if _library.INTERPRETED else "native"
# A program at a time: the interpreter sees fewer mixes of dtypes and one rotation of each rounding.
MIXES = ("float32", "bfloat16", "mixed_all") if _library.INTERPRETED else tuple(DTYPES)
ROPES = ("none", "interleaved", "halves")
EPS = 1e-6
NAMES = ("q1", "k1", "v1", "q2", "k2", "v2", "q1_weight", "k1_weight", "q2_weight", "k2_weight")


class Heads(NamedTuple):
    """What one call of ``joint_heads_forward`` gets."""

    tensors: tuple[Tensor | None, ...]  # by NAMES
    cos: Tensor | None
    sin: Tensor | None
    lengths: Tensor | None
    norms: tuple[bool, bool]
    interleaved: bool
    rounding: int = reference.FP32

    def options(self) -> tuple[Any, ...]:
        return (*self.norms, self.interleaved, EPS, self.rounding)

    def operands(self) -> tuple[Any, ...]:
        return (*self.tensors, self.cos, self.sin, self.lengths)


def draw(
    *,
    batch: int = 2,
    first: int = 4,
    second: int | None = 3,
    heads: int = 2,
    width: int = 64,
    queries: tuple[int, int] | None = None,
    rope: str = "interleaved",
    norms: tuple[bool, bool] = (True, True),
    weights: bool = True,
    lengths: list[list[int]] | None = None,
    dtypes: str = "float32",
    rounding: int = reference.FP32,
    seed: int = 0,
) -> Heads:
    torch.manual_seed(seed)
    cycle = DTYPES[dtypes]
    keys = (first, 0 if second is None else second)
    tensors: list[Tensor | None] = []
    for stream, rows in enumerate((first, second)):
        for kind in range(3):
            count = rows if queries is None or kind else queries[stream]
            tensors.append(None if rows is None else torch.randn(batch, count, heads, width))
    for stream, rows in enumerate((first, second)):
        for _ in range(2):
            there = weights and norms[stream] and rows is not None
            tensors.append(1 + 0.3 * torch.randn(width) if there else None)
    tensors = [
        None if x is None else x.to(cycle[i % len(cycle)]) for i, x in enumerate(tensors)
    ]  # fmt: skip
    angle = torch.randn(sum(keys), width)
    turning = rope != "none"
    return Heads(
        tuple(tensors),
        angle.cos() if turning else None,
        angle.sin() if turning else None,
        None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        norms,
        rope == "interleaved",
        rounding,
    )


def run(call: Heads, wanted: int | None = None, grads: Any = None) -> dict[str, Tensor]:
    """Forward and backward of the kernels, by name."""
    *outputs, q_rstd, k_rstd = operators.joint_heads_forward(
        KERNELS, *call.operands(), *call.options()
    )
    grads = grads_of(outputs) if grads is None else grads
    mask = sum(1 << i for i, x in enumerate(call.tensors) if x is not None)
    mask = mask if wanted is None else wanted & mask
    found = operators.joint_heads_backward(
        KERNELS, *grads, *call.operands(), q_rstd, k_rstd, *call.options(), mask
    )
    names = [name for i, name in enumerate(NAMES) if mask >> i & 1]
    return dict(zip("qkv", outputs, strict=True)) | dict(zip(names, found, strict=True))


def grads_of(outputs: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]


def formula(call: Heads, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The reference and autograd through it, in ``dtype`` or in the dtypes given."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).contiguous().requires_grad_()
        for x in call.tensors
    ]
    rope = (call.cos, call.sin)
    outputs = reference.joint_heads(*leaves, *rope, call.lengths, *call.options())
    grads = [grad.to(dtype or grad.dtype) for grad in grads_of(outputs_like(call, outputs))]
    present = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(outputs, present, grads, allow_unused=True))
    named = dict(zip("qkv", (out.detach() for out in outputs), strict=True))
    for name, x in zip(NAMES, leaves, strict=True):
        if x is not None:
            gradient = next(found)
            named[name] = torch.zeros_like(x) if gradient is None else gradient
    return named


def outputs_like(call: Heads, outputs: Any) -> list[Tensor]:
    """Of the operator's own dtype, so that all get the same gradients."""
    dtype = operators.heads_dtype(*call.tensors)
    return [out.detach().to(dtype) for out in outputs]


def agrees(call: Heads) -> dict[str, Tensor]:
    ours = run(call)
    truth, yardstick = formula(call, torch.float64), formula(call)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert value.dtype == yardstick[name].dtype, name
        assert value.shape == truth[name].shape, name
        assert_close(name, value, yardstick[name], truth[name])
    return ours


@interpretable
@pytest.mark.parametrize("dtypes", MIXES)
@pytest.mark.parametrize("rope", ROPES)
def test_agrees_with_float64(rope: str, dtypes: str):
    agrees(draw(rope=rope, dtypes=dtypes))
    agrees(draw(rope=rope, dtypes=dtypes, lengths=[[2, 3], [4, 1]], weights=False))


@interpretable
@pytest.mark.parametrize("width", [1, 17, 32, 80, 96, 128, 256])
def test_head_widths(width: int):
    rope = "none" if width % 2 else "interleaved"
    # A head of one element normalises to ±1: its gradient is rounding noise alone.
    norms = (width > 1, width > 1)
    agrees(draw(width=width, heads=2, rope=rope, norms=norms))
    if width % 2 == 0:
        agrees(draw(width=width, heads=2, rope="halves", dtypes="bfloat16"))


@interpretable
@pytest.mark.parametrize("heads", [1, 5, 24])
def test_numbers_of_heads(heads: int):
    agrees(draw(heads=heads, first=3, second=2))


@interpretable
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("norms", [(False, False), (True, False), (False, True)])
def test_streams_without_norm(norms: tuple[bool, bool], rope: str):
    agrees(draw(norms=norms, rope=rope))
    agrees(draw(norms=norms, rope=rope, dtypes="bfloat16", lengths=[[1, 2], [0, 0]]))


@interpretable
@pytest.mark.parametrize(
    "lengths", [[[4, 3], [4, 3]], [[0, 0], [0, 3]], [[4, 0], [1, 2]], [[-4, 9], [99, -1]]]
)
def test_packed_keys(lengths: list[list[int]]):
    """Valid rows come first, the rest is zero; lengths beyond the streams are clamped to them."""
    call = draw(lengths=lengths)
    ours = agrees(call)
    for b, (first, second) in enumerate(lengths):
        first, second = min(max(first, 0), 4), min(max(second, 0), 3)
        for name in "kv":
            assert not ours[name][b, first + second :].any()
        for name, length in {"k1": first, "v1": first, "k2": second, "v2": second}.items():
            assert not ours[name][b, length:].any()


@interpretable
def test_one_stream():
    agrees(draw(second=None))
    agrees(draw(second=None, lengths=[[3], [0]]))


@interpretable
@pytest.mark.parametrize("queries", [(4, 0), (0, 3), (2, 7)])
def test_streams_that_are_only_attended_to(queries: tuple[int, int]):
    """Rows of queries and keys may differ; a position in the rope is that of the keys."""
    agrees(draw(queries=queries, rope="interleaved" if 0 in queries else "none"))


@interpretable
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_empty_streams(sizes: tuple[int, int]):
    agrees(draw(first=sizes[0], second=sizes[1], lengths=[[0, 0], [1, 1]]))
    agrees(draw(first=sizes[0], second=sizes[1]))


@interpretable
def test_empty_batch():
    ours = run(draw(batch=0))
    assert ours["q"].shape == (0, 7, 2, 64)
    assert not ours["q1_weight"].any()


@interpretable
@pytest.mark.parametrize("rounding", [reference.TORCH, reference.DIFFUSERS])
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16", "mixed_bf16_fp32", "mixed_all"])
def test_roundings(rounding: int, dtypes: str):
    for rope in ROPES[1:2] if _library.INTERPRETED else ROPES:
        for weights in (True, False):
            small = {"batch": 1, "first": 3, "second": 2, "heads": 2}
            agrees(draw(rope=rope, dtypes=dtypes, rounding=rounding, weights=weights, **small))


@interpretable
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "mixed_bf16_fp32"])
def test_views_are_read_in_place(dtypes: str):
    """Columns of one [B, S, 3, H, E] matrix; chunks with NaN beside them; transposed gradients."""
    call = draw(dtypes=dtypes, lengths=[[4, 1], [2, 3]])
    plain = run(call)
    views = call._replace(tensors=tuple(x if x is None else view(x) for x in call.tensors))
    outputs = [plain[name] for name in "qkv"]
    grads = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads_of(outputs)]
    same(run(views, grads=grads), plain)
    if len(DTYPES[dtypes]) == 1:
        fused = [torch.stack(call.tensors[i : i + 3], dim=2) for i in (0, 3)]
        columns = [column for matrix in fused for column in matrix.unbind(2)]
        same(run(call._replace(tensors=(*columns, *call.tensors[6:]))), plain)


def view(x: Tensor) -> Tensor:
    return strided(x) if x.dim() == 4 else x


def same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        assert torch.equal(value, others[name]), name


@interpretable
def test_only_what_is_wanted_is_written():
    call = draw(lengths=[[4, 1], [2, 3]])
    everything = run(call)
    for i, name in enumerate(NAMES):
        found = run(call, wanted=1 << i)
        assert found.keys() == {"q", "k", "v", name}
        same(found, everything)


@interpretable
def test_every_element_is_written():
    call = draw(lengths=[[4, 1], [2, 3]])
    plain = run(call)
    with poisoned_memory():
        same(run(call), plain)


@interpretable
def test_nan_stays_where_it_is():
    """A NaN in one head of k spoils that head's k and its gradient, and the weight's gradient."""
    call = draw(lengths=[[4, 1], [2, 3]])
    call.tensors[1][0, 1, 1, 7] = float("nan")
    ours = agrees(call)
    assert ours["k"].isnan().sum() == 64
    # Beyond the valid keys nothing is read.
    call = draw(lengths=[[3, 1], [2, 3]])
    call.tensors[1][0, 3] = float("nan")
    call.tensors[5][0, 1:] = float("inf")
    assert all(value.isfinite().all() for value in run(call).values())


@interpretable
@pytest.mark.parametrize("interleaved", [True, False])
def test_qk_norm_rope(interleaved: bool):
    """q and k of one stream, each in a dtype of its own."""
    call = draw(second=None, rope="interleaved" if interleaved else "halves")
    q, k, _ = call.tensors[:3]
    q, weights = q.bfloat16(), (call.tensors[6].bfloat16(), call.tensors[7])
    rest = (call.cos, call.sin, interleaved, EPS, reference.FP32)
    q_out, k_out, q_rstd, k_rstd = operators.qk_norm_rope_forward(KERNELS, q, k, *weights, *rest)
    assert (q_out.dtype, k_out.dtype) == (torch.bfloat16, torch.float32)
    grads = grads_of((q_out, k_out))
    backward = (*grads, q, k, *weights, *rest[:2], q_rstd, k_rstd, *rest[2:])
    found = operators.qk_norm_rope_backward(KERNELS, *backward, 0b1111)
    (only,) = operators.qk_norm_rope_backward(KERNELS, *backward, 0b0100)
    assert torch.equal(only, found[2])

    def peer(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, *weights)]
        outputs = reference.qk_norm_rope(*leaves, *rest)
        given = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, given)]

    ours = (q_out, k_out, *found)
    for value, yardstick, truth in zip(ours, peer(None), peer(torch.float64), strict=True):
        assert value.dtype == yardstick.dtype
        assert_close("qk_norm_rope", value, yardstick.detach(), truth.detach())


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_results_do_not_depend_on_threads(dtypes: str):
    call = draw(first=333, second=77, heads=8, dtypes=dtypes, lengths=[[333, 70], [100, 77]])
    with threads(1):
        alone = run(call)
    for count in (2, 3):
        with threads(count):
            same(run(call), alone)


def eager(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, rounding: int) -> Tensor:
    """The operators that a model runs: torch's or diffusers' norm, then the rotation."""
    if rounding == reference.TORCH:
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    else:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        y = x * torch.rsqrt(variance + EPS)
        y = y.to(x.dtype) if weight is None else y.to(weight.dtype) * weight
    return reference.rotate(y.float(), cos, sin, True).to(x.dtype)


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("rounding", [reference.TORCH, reference.DIFFUSERS])
@pytest.mark.parametrize("weighted", [True, False])
def test_bits_of_eager_in_bfloat16(rounding: int, weighted: bool, width: int):
    """With a model's own roundings the bits are those of its separate operators (C++ on CPU)."""
    call = draw(
        first=211, second=None, heads=4, width=width, dtypes="bfloat16", rounding=rounding,
        weights=weighted,
    )  # fmt: skip
    ours = run(call, wanted=1)
    for name, x, weight in (("q", 0, 6), ("k", 1, 7)):
        peer = eager(call.tensors[x], call.tensors[weight], call.cos, call.sin, rounding)
        assert torch.equal(ours[name], peer), name


def test_kernels_interpreted():
    """The Triton kernels through all of the above that is marked so, in a process of their own."""
    finished = interpret("tests/ops/test_heads.py")
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert "skipped" not in finished.stdout.strip().splitlines()[-1]
