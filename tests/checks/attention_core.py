"""What the attention core must hold, wherever its kernels run: interpreted, or on a GPU.

The kernels are called through their launchers. The truth is float64 autograd on each sample's
valid keys alone; the yardstick the same formula in the operands' dtype.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from tests.checks.compare import assert_close
from tests.checks.contexts import poisoned_memory

Tensor = torch.Tensor
NAMES = ("out", "lse", "dq", "dk", "dv")


class Operands(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    lengths: Tensor | None
    scale: float


class Setting(NamedTuple):
    """Sizes, and each sample's valid keys."""

    queries: int
    keys: int
    width: int
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        lengths = "all" if self.lengths is None else "-".join(map(str, self.lengths))
        return f"{self.queries}x{self.keys}x{self.width}-{lengths}-{str(self.dtype)[6:]}"


def operands(
    setting: Setting, *, heads: int = 2, scale: float | None = None, device: Any = "cpu"
) -> Operands:
    generator = torch.Generator().manual_seed(0)
    batch = 2 if setting.lengths is None else len(setting.lengths)

    def draw(rows: int) -> Tensor:
        values = torch.randn((batch, rows, heads, setting.width), generator=generator)
        return values.to(device, setting.dtype)

    lengths = None
    if setting.lengths is not None:
        lengths = torch.tensor(setting.lengths, dtype=torch.int32, device=device)
    q, k, v, grad = (
        draw(s) for s in (setting.queries, setting.keys, setting.keys, setting.queries)
    )
    return Operands(q, k, v, grad, lengths, setting.width**-0.5 if scale is None else scale)


def formula(given: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything by autograd, sample by sample, on the valid keys."""
    q, k, v, grad = (x.detach().to(dtype) for x in given[:4])
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    outs, lses = [], []
    for sample in range(q.shape[0]):
        valid = k.shape[1]
        if given.lengths is not None:
            valid = min(max(int(given.lengths[sample]), 0), valid)
        scores = torch.einsum("qhe,khe->hqk", q[sample], k[sample, :valid]) * given.scale
        weights = torch.softmax(scores, -1)
        outs.append(torch.einsum("hqk,khe->qhe", weights, v[sample, :valid]))
        lses.append(torch.logsumexp(scores, -1))
    out = torch.stack(outs)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    found = zip(NAMES, (out, torch.stack(lses), dq, dk, dv), strict=True)
    return {name: value.detach() for name, value in found}


def core(given: Operands) -> dict[str, Tensor]:
    """Everything by the kernels."""
    from flowkernels.ops.attention import core_kernels

    q, k, v, grad, lengths, scale = given
    out, lse = core_kernels.attention_forward(q, k, v, lengths, scale)
    gradients = core_kernels.attention_backward(grad, q, k, v, out, lse, lengths, scale)
    return dict(zip(NAMES, (out, lse, *gradients), strict=True))


def assert_core_agrees(given: Operands) -> dict[str, Tensor]:
    ours = core(given)
    truth, peer = formula(given, torch.float64), formula(given, given.q.dtype)
    for name, value in ours.items():
        assert value.is_contiguous(), name
        assert value.dtype == (torch.float32 if name == "lse" else given.q.dtype), name
        assert value.shape == truth[name].shape, name
        assert_close(name, value, peer[name], truth[name])
    return ours


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# Odd and prime sizes, whole blocks and blocks with a rest, ragged and empty samples.
SETTINGS = (
    Setting(1, 3, 64),
    Setting(3, 17, 32),
    Setting(17, 3, 64),
    Setting(65, 130, 64),
    Setting(130, 65, 128),
    Setting(65, 257, 80),
    Setting(17, 33, 24),
    Setting(5, 7, 200),
    Setting(65, 256, 64),
    Setting(33, 130, 64, (0, 1, 129, 130)),
    Setting(17, 257, 128, (128, 0, 3)),
    Setting(65, 65, 80, (64, 65)),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CoreChecks:
    """A subclass says on which device."""

    device: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES

    def operands(self, setting: Setting, **options: Any) -> Operands:
        return operands(setting, device=self.device, **options)

    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_agrees_with_float64(self, setting: Setting):
        for dtype in self.dtypes:
            assert_core_agrees(self.operands(setting._replace(dtype=dtype)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_chunks_of_wider_rows_are_read_in_place(self, dtype: torch.dtype):
        """q, k, v as a fused projection leaves them, NaN all around; grad_out a view too."""
        given = self.operands(Setting(65, 65, 64, (65, 40), dtype))
        whole = torch.full((3, 67, 5, 2, 64), float("nan"), dtype=dtype, device=self.device)
        views = [whole[1:, 1:66, i] for i in range(4)]
        for view, value in zip(views, given[:4], strict=True):
            view.copy_(value)
        assert_equal(
            core(given._replace(**dict(zip(Operands._fields, views, strict=False)))),
            assert_core_agrees(given),
        )

    def test_rows_that_cannot_be_read_in_whole_vectors(self):
        given = self.operands(Setting(65, 130, 64, dtype=torch.float16))

        def shifted(x: Tensor) -> Tensor:
            return torch.empty((*x.shape[:3], 67), dtype=x.dtype, device=x.device)[..., 3:].copy_(x)

        views = (shifted(x) for x in given[:4])
        assert_equal(core(Operands(*views, *given[4:])), core(given))

    def test_expanded_operands(self):
        """The gradient of a sum: one element seen as a tensor; keys that all samples share."""
        given = self.operands(Setting(17, 65, 64, dtype=self.dtypes[0]))
        one = given.q.new_ones(()).expand(given.q.shape)
        shared = given.k[:1].expand_as(given.k)
        assert_core_agrees(given._replace(grad_out=one, k=shared))

    def test_what_lies_beyond_the_valid_keys_is_not_read(self):
        lengths = (0, 1, 64, 129, 200)
        given = self.operands(Setting(17, 200, 64, lengths, self.dtypes[0]), heads=1)
        for sample, valid in enumerate(lengths):
            given.k[sample, valid:] = 0
            given.v[sample, valid:] = 0
        clean = core(given)
        for sample, valid in enumerate(lengths):
            given.k[sample, valid:] = float("nan")
            given.v[sample, valid:] = float("inf")
        found = core(given)
        assert_equal(found, clean)
        for sample, valid in enumerate(lengths):
            assert not found["dk"][sample, valid:].any()
            assert not found["dv"][sample, valid:].any()

    def test_a_sample_without_keys(self):
        found = core(self.operands(Setting(17, 33, 64, (0, 33), self.dtypes[0])))
        assert (found["lse"][0] == -torch.inf).all()
        for name in ("out", "dq", "dk", "dv"):
            assert not found[name][0].any(), name
            assert found[name][1].any(), name

    def test_one_key(self):
        """All weight is on it: out is v, and q and k have no gradient but for delta's rounding."""
        for dtype in self.dtypes:
            given = self.operands(Setting(3, 1, 64, dtype=dtype))
            found = core(given)
            assert torch.equal(found["out"], given.v.expand_as(given.q))
            rounding = torch.finfo(torch.float32).eps * 64 * given.scale
            largest = [x.abs().max().item() for x in given[:4]]
            for name in ("dq", "dk"):
                assert found[name].abs().max() <= rounding * largest[2] * largest[3] * 8, name

    def test_lengths_are_clamped_and_may_be_a_view(self):
        given = self.operands(Setting(17, 33, 64, (0, 33), self.dtypes[0]))
        wild = torch.tensor([[-5, 1], [1000, 1]], dtype=torch.int32, device=self.device)[:, 0]
        assert_equal(core(given._replace(lengths=wild)), core(given))

    @pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
    def test_any_scale(self, scale: float):
        setting = Setting(17, 33, 64, (20, 33), self.dtypes[0])
        assert_core_agrees(self.operands(setting, scale=scale))

    def test_large_scores(self):
        """Exponents far beyond float32's range: the maximum is taken out first."""
        setting = Setting(17, 130, 64, dtype=self.dtypes[0])
        assert_core_agrees(self.operands(setting, scale=50.0))

    def test_every_output_is_written(self):
        with poisoned_memory():
            found = core(self.operands(Setting(33, 130, 80, (0, 1, 129), self.dtypes[0])))
        for name in ("out", "dq", "dk", "dv"):
            assert found[name].isfinite().all(), name
        assert not found["lse"].isnan().any()

    def test_nan_stays_in_its_row(self):
        given = self.operands(Setting(33, 33, 64, dtype=self.dtypes[0]))
        given.q[0, 5, 1, 7] = float("nan")
        out = core(given)["out"]
        assert out[0, 5, 1].isnan().all()
        out[0, 5, 1] = 0
        assert out.isfinite().all()

    def test_repeats_bitwise(self):
        given = self.operands(Setting(130, 257, 64, (257, 100), torch.float16))
        assert_equal(core(given), core(given))

    @pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
    def test_empty(self, sizes: tuple[int, int, int]):
        batch, queries, keys = sizes
        given = self.operands(Setting(queries, keys, 64, dtype=self.dtypes[0]))
        found = core(Operands(*(x[:batch] for x in given[:4]), None, given.scale))
        assert found["out"].shape == (batch, queries, 2, 64)
        assert not any(found[name].any() for name in ("out", "dq", "dk", "dv"))

    def test_head_too_wide(self):
        with pytest.raises(ValueError, match="q: got heads of 257"):
            core(self.operands(Setting(3, 3, 257)))
