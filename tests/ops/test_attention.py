"""The attention family: the checks that every op passes, and what is its alone."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import flowkernels
from flowkernels.ops import _library, joint_attention, qk_norm_rope
from flowkernels.ops.attention import _select, cores, reference
from tests.checks import OpChecks
from tests.checks.cases import attention
from tests.checks.compare import assert_close
from tests.checks.contexts import interpretable, threads

KERNELS = "triton" if _library.INTERPRETED else "native"
HALVES = (torch.bfloat16, torch.float16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestQKNormRope(OpChecks):
    case = attention.QK_NORM_ROPE


class TestJointAttention(OpChecks):
    case = attention.JOINT_ATTENTION


def heads(batch: int, rows: int, width: int = 16, dtype=torch.float32, seed: int = 0):
    """q, k, v [B, S, 2, E] as views of one projection."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn((batch, rows, 3, 2, width), generator=generator)
    return fused.to(dtype).unbind(2)


def angles(rows: int, width: int):
    """As FLUX's position embedding: both of a pair alike."""
    turns = torch.randn(rows, width // 2).repeat_interleave(2, dim=-1)
    return turns.cos(), turns.sin()


def rotated_as_diffusers(x, cos, sin):
    """Products and sum in float32, one rounding; neighbours are pairs."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


@interpretable
@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_torch_rounding_is_that_of_the_module(dtype, backend: str):
    """RMSNorm of the dtype, then FLUX's rotation. A sum of squares taken in another order may move
    a row's scale by an ulp of float32, and then a rounding to the narrow dtype once in thousands;
    the reference takes the module's order and has its bits.
    """
    q, k, _ = heads(2, 37, 64, dtype)
    norm = torch.nn.RMSNorm(64, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    rope = angles(37, 64)
    with torch.no_grad():
        wanted = [rotated_as_diffusers(norm(x), *rope) for x in (q, k)]
        with flowkernels.backend(backend):
            found = qk_norm_rope(
                q, k, q_weight=norm.weight, k_weight=norm.weight, rope=rope, rounding="torch"
            )
    compare_bits(found, wanted, exact=backend == "reference")


@interpretable
@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_diffusers_rounding_is_that_of_the_module(dtype, affine: bool, backend: str):
    normalization = pytest.importorskip("diffusers.models.normalization")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    q, k, _ = heads(2, 37, 64, dtype)
    norm = normalization.RMSNorm(64, eps=1e-6, elementwise_affine=affine).to(dtype)
    if affine:
        torch.nn.init.normal_(norm.weight)
    rope = angles(37, 64)
    with torch.no_grad():
        wanted = [embeddings.apply_rotary_emb(norm(x), rope, sequence_dim=1) for x in (q, k)]
        with flowkernels.backend(backend):
            found = qk_norm_rope(
                q, k, q_weight=norm.weight, k_weight=norm.weight, rope=rope, rounding="diffusers"
            )
    compare_bits(found, wanted, exact=backend == "reference")


def compare_bits(found, wanted, exact: bool) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        if exact:
            assert torch.equal(ours, theirs)
        elif ours.dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
        else:
            assert (ours != theirs).sum() <= 1e-3 * ours.numel()
            # One rounding more or less: a step of the narrow dtype, as is the rotation's of it.
            torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1.6e-2)


@interpretable
@pytest.mark.parametrize("backend", ["reference", KERNELS])
@pytest.mark.parametrize("lengths", [[(5, 4), (3, 2)], [(0, 4), (5, 0)], [(0, 0), (2, 1)]], ids=str)
def test_padding_is_not_there(lengths, backend: str):
    """Keys beyond a length have no part, not even as NaN; queries beyond it are served."""
    first, second = heads(2, 5), heads(2, 4, seed=1)
    key_lengths = torch.tensor(lengths, dtype=torch.int32)
    poisoned = [[x.clone() for x in stream] for stream in (first, second)]
    for sample, pair in enumerate(lengths):
        for stream, length in zip(poisoned, pair, strict=True):
            for x in stream[1:]:
                x[sample, length:] = float("nan")
    leaves = [x.requires_grad_() for stream in poisoned for x in stream]
    with flowkernels.backend(backend):
        outs = joint_attention(
            tuple(leaves[:3]), tuple(leaves[3:]), key_lengths=key_lengths, first_norm=(None, None)
        )
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])
    for sample, (one, two) in enumerate(lengths):
        keys = [slice(0, one), slice(0, two)]
        kept = [x[sample, rows] for x, rows in zip((first[1], second[1]), keys, strict=True)]
        values = [x[sample, rows] for x, rows in zip((first[2], second[2]), keys, strict=True)]
        kept[0] = F.rms_norm(kept[0], (16,), eps=1e-6)
        queries = [F.rms_norm(first[0][sample], (16,), eps=1e-6), second[0][sample]]
        q, k, v = (torch.cat(x).transpose(0, 1) for x in (queries, kept, values))
        wanted = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
        wanted = torch.zeros_like(wanted) if one + two == 0 else wanted
        ours = torch.cat([out[sample] for out in outs])
        # Float32 sums over nine keys of values near 1.
        torch.testing.assert_close(ours, wanted.flatten(1), rtol=1e-5, atol=1e-6)
        for index, length in ((1, one), (2, one), (4, two), (5, two)):
            assert not grads[index][sample, length:].any()
            assert grads[index][sample].isfinite().all()
        if one + two == 0:
            assert not any(grad[sample].any() for grad in grads)


@interpretable
def test_a_nan_stays_in_its_sample():
    first, second = heads(3, 5), heads(3, 4, seed=1)
    spoilt = [x.clone() for x in first]
    spoilt[1][1, 2, 0, 3] = float("nan")
    with flowkernels.backend(KERNELS):
        clean = joint_attention(first, second)
        found = joint_attention(tuple(spoilt), second)
    for ours, wanted in zip(found, clean, strict=True):
        assert ours[1].isnan().any()
        assert torch.equal(ours[::2], wanted[::2])


def test_one_stream_is_plain_attention():
    q, k, v = heads(2, 37, 64)
    ours = joint_attention((q, k[:, :11], v[:, :11]))
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, :11], v[:, :11]))
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_outputs_are_views_of_one_tensor():
    out_first, out_second = joint_attention(heads(2, 5), heads(2, 4))
    assert out_first.untyped_storage().data_ptr() == out_second.untyped_storage().data_ptr()


def test_saved_activations_hold_each_stream_once():
    """Without norms the inputs are not kept: the joint layout is all that backward reads."""
    streams = [x.clone().requires_grad_() for x in (*heads(2, 5), *heads(2, 4))]
    with flowkernels.backend(KERNELS):
        out = torch.cat(joint_attention(tuple(streams[:3]), tuple(streams[3:])), dim=1)
    for x in streams:
        x.data.fill_(float("nan"))
    kept = torch.autograd.grad(out.sum(), streams)
    assert all(each.isfinite().all() for each in kept)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("lengths", [None, [9, 3, 0], [7, 7, 7]], ids=str)
def test_opcheck_of_the_core(lengths, dtype):
    """On CPU the core's functions are called outright, its operators only where compiled."""
    operators = torch.ops.flowkernels
    q, k, v = heads(3, 9, dtype=dtype)
    q, k, v = q[:, :5].contiguous(), k.contiguous(), v.contiguous()
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out, lse = operators.attention_forward(q, k, v, counts, 0.25)
    torch.library.opcheck(operators.attention_forward.default, (q, k, v, counts, 0.25))
    torch.library.opcheck(
        operators.attention_backward.default,
        (torch.randn_like(out), q, k, v, out, lse, counts, 0.25),
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("lengths", [None, [9, 3, 0]], ids=str)
@pytest.mark.parametrize("width", [5, 16], ids=str)
def test_opcheck_of_the_short_core(width, lengths, dtype):
    """Strided operands, too, and widths that fill no vector."""
    operators = torch.ops.flowkernels
    q, k, v = torch.randn(3, 9, 3, 2, width).to(dtype).unbind(2)
    q = q[:, :7]
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    out, _ = operators.short_attention_forward(q, k, v, counts, 0.25)
    torch.library.opcheck(operators.short_attention_forward.default, (q, k, v, counts, 0.25))
    grad = torch.randn_like(out)
    torch.library.opcheck(operators.short_attention_backward.default, (grad, q, k, v, counts, 0.25))


@pytest.mark.parametrize("size", [1, 30], ids=lambda size: f"scores_{size}")
@pytest.mark.parametrize("shape", [(5, 8), (17, 32), (81, 64)], ids=str)
def test_the_short_core_is_as_near_to_float64_as_pytorch(shape, size):
    """Also where one key has nearly all the weight: there rounding of large scores matters most."""
    tokens, width = shape
    q, k, v = heads(4, tokens, width)
    operands = (q * size, k, v)
    grad = torch.randn(q.shape)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        out = function(*leaves)
        found = torch.autograd.grad(out, leaves, grad.to(dtype).view(out.shape))
        return [each.double().flatten() for each in (out, *found)]

    def plain(*leaves):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
        return out.transpose(1, 2)

    truth = run(plain, torch.float64)
    ours, peer = run(lambda *x: joint_attention(x), torch.float32), run(plain, torch.float32)
    for mine, other, exact in zip(ours, peer, truth, strict=True):
        assert (mine - exact).norm() <= 2 * (other - exact).norm()


def test_long_narrow_backward():
    """From 512 tokens bfloat16 is multiplied as it is, where the processor has products for it."""
    q, k, v = heads(1, 513, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = joint_attention(tuple(leaves))
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth = joint_attention(tuple(exact), core="reference")
    wanted = torch.autograd.grad(truth, exact, torch.ones_like(truth))
    peers = [x.clone().requires_grad_() for x in (q, k, v)]
    peer = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in peers))
    eager = torch.autograd.grad(peer, peers, torch.ones_like(peer))
    for name, *each in zip("qkv", found, eager, wanted, strict=True):
        assert_close(name, *each)


@pytest.mark.parametrize("lengths", [None, [[5, 4], [3, 2], [0, 0]]], ids=str)
def test_repeats_and_threads(lengths):
    first, second = heads(3, 33, 64), heads(3, 17, 64)
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)

    def run():
        leaves = [x.detach().clone().requires_grad_() for x in (*first, *second)]
        outs = joint_attention(tuple(leaves[:3]), tuple(leaves[3:]), key_lengths=key_lengths)
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])]

    with threads(1):
        one = run()
    with threads(2):
        two = run()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class BlockByBlock:
    """What ``joint_attention`` uses of ``xformers.ops.fmha``, by its documented interface."""

    def __init__(self, queries: list[int], keys: list[int]) -> None:
        self.sizes = (queries, keys)

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int]) -> BlockByBlock:
        return cls(q_seqlen, kv_seqlen)

    @staticmethod
    def _attend(q, k, v, bias, scale):
        if bias is None:
            return reference.attention(q, k, v, None, scale)
        queries, keys = bias.sizes
        parts = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
        return torch.cat([reference.attention(*part, None, scale) for part in parts], dim=1)

    @classmethod
    def memory_efficient_attention_forward_requires_grad(cls, q, k, v, attn_bias, *, scale):
        return cls._attend(q, k, v, attn_bias, scale), torch.zeros(1)

    @classmethod
    def memory_efficient_attention_backward(cls, grad, output, lse, q, k, v, attn_bias, *, scale):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(cls._attend(*leaves, attn_bias, scale), leaves, grad)


class TestCores:
    """Which core serves a call; those of a GPU are asked, not run."""

    @pytest.mark.parametrize(
        ("core", "device", "dtype", "width", "lengths", "reason"),
        [
            ("cudnn", CPU, torch.bfloat16, 64, False, "needs CUDA tensors, got cpu"),
            ("flash", CUDA, torch.float32, 64, False, "serves bfloat16 and float16, got float32"),
            ("flash", CUDA, torch.bfloat16, 60, False, "head dims that are multiples of 8 up to"),
            ("cudnn", CUDA, torch.bfloat16, 256, False, "multiples of 8 up to 128, got 256"),
            ("cudnn", CUDA, torch.bfloat16, 64, True, "takes no key_lengths"),
            ("triton", CUDA, torch.float64, 64, False, "serves float32, bfloat16 and float16"),
            ("triton", CUDA, torch.float32, 512, False, "head dims up to 256, got 512"),
            ("sdpa", CUDA, torch.bfloat16, 60, False, "multiples of 8, got 60"),
            ("sdpa", CPU, torch.float64, 64, False, "got float64"),
        ],
    )
    def test_says_why_it_cannot(self, core, device, dtype, width, lengths, reason):
        with pytest.raises(ValueError, match=f"^core: '{core}' .*{reason}") as caught:
            _select.select(core, "native", device, dtype, width, lengths)
        assert "\n" not in str(caught.value)

    def test_says_what_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(_select, "_INSTALLED", {"triton": False, "xformers": False})
        with pytest.raises(ValueError, match=r"^core: 'xformers' needs xformers, which is not"):
            _select.select("xformers", "triton", CUDA, torch.bfloat16, 64, False)
        with pytest.raises(ValueError, match=r"^core: 'triton' needs Triton, which is not"):
            _select.select("triton", "triton", CUDA, torch.bfloat16, 64, False)

    def test_sdpa_is_what_pytorch_has(self):
        def select(device, dtype, width=64, lengths=False):
            return _select.select("sdpa", "native", device, dtype, width, lengths)

        assert select(CPU, torch.bfloat16) == "cpu"
        assert select(CUDA, torch.bfloat16) == select(CUDA, torch.float16, lengths=True) == "flash"
        assert select(CUDA, torch.float32) == select(CUDA, torch.bfloat16, 512) == "efficient"

    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
    @pytest.mark.parametrize("lengths", [False, True])
    def test_auto_is_deterministic_where_asked(self, dtype, lengths):
        torch.use_deterministic_algorithms(True)
        try:
            found = _select.select("auto", "triton", CUDA, dtype, 64, lengths)
        finally:
            torch.use_deterministic_algorithms(False)
        assert found in ("flash", "triton")
        assert _select.select("auto", "triton", CUDA, dtype, 64, lengths) in cores.CORES

    def test_auto_always_finds_one(self, monkeypatch):
        monkeypatch.setattr(_select, "_INSTALLED", {"triton": False, "xformers": False})
        assert _select.select("auto", "native", CUDA, torch.float32, 33, True) == "reference"
        assert _select.select("auto", "native", CPU, torch.float64, 64, True) == "reference"
        assert _select.select("auto", "native", CPU, torch.float16, 33, True) == "cpu"

    @pytest.mark.parametrize("core", ["auto", "sdpa", "reference"])
    def test_served_here(self, core):
        first, second = heads(2, 5), heads(2, 4)
        wanted = joint_attention(first, second)
        for ours, theirs in zip(joint_attention(first, second, core=core), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
    @pytest.mark.parametrize("lengths", [False, True])
    def test_calls_pytorch_by_its_schema(self, name, lengths):
        """On meta tensors: every argument is there, and shapes come back in our layout."""
        if name == "cudnn" and lengths:
            return
        make = lambda rows: torch.empty(2, rows, 3, 64, dtype=torch.bfloat16, device="meta")  # noqa: E731
        q, k, v, grad_out = make(5), make(9), make(9), make(5)
        counts = torch.empty(2, dtype=torch.int32, device="meta") if lengths else None
        core = cores.CORES[name]
        out, saved = core.forward(q, k, v, counts, 0.125)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        found = core.backward(grad_out, q, k, v, out, saved, counts, 0.125)
        assert [each.shape for each in found] == [q.shape, k.shape, v.shape]

    @pytest.mark.parametrize("lengths", [None, [9, 0, 4]], ids=str)
    def test_xformers_gets_pairs_of_sequences(self, monkeypatch, lengths):
        """With a stand-in for the library, which attends block by block in plain PyTorch."""
        monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", types.SimpleNamespace(fmha=BlockByBlock))
        bias = types.SimpleNamespace(BlockDiagonalMask=BlockByBlock)
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
        q, k, v = heads(3, 9)
        q, k, v = q[:, :5].contiguous(), k.contiguous(), v.contiguous()
        counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        grad_out, found = torch.randn(q.shape), []
        for core in (cores.CORES["xformers"], cores.CORES["cpu"]):
            out, saved = core.forward(q, k, v, counts, 0.25)
            found.append([out, *core.backward(grad_out, q, k, v, out, saved, counts, 0.25)])
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)

    def test_flash_takes_lengths_as_pairs_of_sequences(self):
        """Each sample's queries with its valid keys, then no query with the padded ones."""
        q, k = torch.empty(3, 5, 1, 8), torch.empty(3, 9, 1, 8)
        ends = cores._interleaved_ends(q, k, torch.tensor([9, 0, 4], dtype=torch.int32))
        assert ends[0].tolist() == [0, 5, 5, 10, 10, 15, 15]
        assert ends[1].tolist() == [0, 9, 9, 9, 18, 22, 27]
        assert all(each.dtype == torch.int32 and each.is_contiguous() for each in ends)

    def test_bias_row_is_aligned_and_not_repeated(self):
        q, k = torch.empty(2, 5, 3, 8), torch.empty(2, 9, 3, 8)
        bias = cores._bias(q, k, torch.tensor([9, 4], dtype=torch.int32))
        assert bias.shape == (2, 3, 5, 9)
        assert bias.untyped_storage().nbytes() == 2 * 16 * 4
        assert bias[1, 2, 3].tolist() == [0.0] * 4 + [float("-inf")] * 5
