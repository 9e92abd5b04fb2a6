"""rk_combine and rk_error beyond what every op passes: stages, weights, tolerances, norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import flowkernels
from flowkernels.ode import rk_combine, rk_error
from flowkernels.ops import _library
from flowkernels.ops.step import direct
from tests.checks.compare import assert_close
from tests.checks.contexts import poisoned_memory, recorded_operators, threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Nothing, one element, an odd one, a block and a little, several chunks of 8192 in a sample.
SHAPES = ((), (1,), (5,), (3, 85), (2, 1025), (2, 3, 3001), (3, 20011), (0, 4), (4, 0))
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])
DOPRI5 = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, -1 / 60)


def tensors(shape, dtype, count, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def steps(shape):
    """A number, 0-d tensors of two dtypes, and where there is a batch, a vector."""
    yield -0.25
    yield torch.tensor(-0.25)
    yield torch.tensor(0.125, dtype=torch.float64)
    if shape:
        yield torch.rand(shape[:1]) - 0.5


def column(dt, like):
    vector = isinstance(dt, torch.Tensor) and dt.dim() == 1
    return dt.double().reshape(-1, *(1,) * (like.dim() - 1)) if vector else dt


def exact_sum(ks, weights, dt, like):
    total = sum(w * k.double() for w, k in zip(weights, ks, strict=True))
    return column(dt, like) * total


def exact_error(ks, weights, dt, y0, y1, rtol, atol):
    """(error, norm) in float64, from the definition."""
    error = exact_sum(ks, weights, dt, y0)
    scale = atol + rtol * torch.maximum(y0.double().abs(), y1.double().abs())
    square = (error / scale) ** 2
    if isinstance(dt, torch.Tensor) and dt.dim() == 1:
        return error, torch.stack([row.mean() for row in square]).sqrt() if len(dt) else dt.double()
    return error, square.mean().sqrt()


def assert_as_good(name, ours, theirs, truth):
    """The rule of the house, and for float64 agreement to rounding."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape == truth.shape
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-14, equal_nan=True)
    else:
        assert_close(name, ours, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combination_of_any_number_of_stages(shape, dtype):
    """1 to 14 stages (dopri8 has 14), as a list and stacked, whatever form dt has."""
    for count in (1, 2, 4, 5, 8, 9, 14):
        y, *ks = tensors(shape, dtype, count + 1)
        weights = torch.randn(count).tolist()
        for dt in steps(shape):
            truth = y.double() + exact_sum(ks, weights, dt, y)
            with flowkernels.backend("reference"):
                theirs = rk_combine(y, ks, weights, dt)
            with flowkernels.backend("native"):
                ours = rk_combine(y, ks, weights, dt)
                assert_as_good("state", ours, theirs, truth)
                for given in (weights, torch.tensor(weights, dtype=torch.float64)):
                    stacked = rk_combine(y, torch.stack(ks), given, dt)
                    assert torch.equal(stacked.isnan(), ours.isnan())
                    assert torch.equal(stacked.nan_to_num(), ours.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_and_norm(shape, dtype):
    for count in (1, 4, 7, 14):
        y0, y1, *ks = tensors(shape, dtype, count + 2)
        weights = torch.randn(count).tolist()
        for dt in steps(shape):
            arguments = (ks, weights, dt, y0, y1, 1e-2, 1e-3)
            with flowkernels.backend("reference"):
                theirs = rk_error(*arguments)
            with flowkernels.backend("native"):
                ours = rk_error(*arguments)
            truth = exact_error(*arguments)
            for name, *three in zip(("error", "norm"), ours, theirs, truth, strict=True):
                assert_as_good(name, *three)
            assert ours[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerances_may_be_tensors(backend, dtype):
    """One an element (the kernels read it), one a sample, one of all; torchdiffeq has them all."""
    y0, y1, *ks = tensors((3, 700), dtype, 5)
    weights = [0.5, -0.25, 1.0]
    full = torch.rand(3, 700, dtype=dtype) + 0.1
    for rtol in (full, full[:, :1], full[0], torch.tensor(0.25, dtype=dtype), 0.25):
        for atol in (full.flip(0), 1e-3):
            for dt in (0.1, torch.tensor([0.1, 0.2, 0.3])):
                with flowkernels.backend(backend):
                    error, norm = rk_error(ks, weights, dt, y0, y1, rtol, atol)
                _, expected = exact_error(ks, weights, dt, y0, y1, rtol, atol)
                assert norm.dtype == dtype
                assert error.dtype == dtype
                torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)


def test_a_stage_of_weight_zero_is_not_read():
    """dopri8's rows are half zeros; and its unread stages may hold anything."""
    y, first, _, third = tensors((3, 85), torch.float32, 4)
    garbage = torch.full_like(y, float("nan"))
    for backend in ("native", "reference"):
        with flowkernels.backend(backend):
            found = rk_combine(y, [first, garbage, third], [0.5, 0.0, 2.0], 0.1)
            torch.testing.assert_close(found, rk_combine(y, [first, third], [0.5, 2.0], 0.1))
            assert torch.equal(rk_combine(y, [garbage], [0.0], 0.1), y)
            error, norm = rk_error([garbage, garbage], [0.0, 0.0], 0.1, y, y, 1e-3, 1e-3)
            assert not error.any()
            assert norm == 0


@BACKENDS
def test_a_stage_of_weight_zero_gets_no_gradient(backend):
    y, *ks = (x.requires_grad_() for x in tensors((3, 8), torch.float32, 4))
    with flowkernels.backend(backend):
        found = rk_combine(y, ks, [0.5, 0.0, 2.0], 0.5)
    gradients = torch.autograd.grad(found.sum(), [y, *ks], allow_unused=True)
    assert gradients[2] is None
    for gradient, value in zip((*gradients[:2], gradients[3]), (1.0, 0.25, 1.0), strict=True):
        assert torch.equal(gradient, torch.full((3, 8), value))


@BACKENDS
def test_stacked_stages_get_a_stacked_gradient(backend):
    y = torch.randn(3, 8)
    ks = torch.randn(3, 3, 8, requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 2.0])
    dt = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with flowkernels.backend(backend):
        rk_combine(y, ks, weights, dt).sum().backward()
    expected = weights[:, None, None] * dt.detach()[None, :, None].expand(3, 3, 8)
    torch.testing.assert_close(ks.grad, expected)
    summed = (weights[:, None, None] * ks.detach()).sum((0, 2))
    torch.testing.assert_close(dt.grad, summed, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_weights_may_ask_for_a_gradient(backend):
    y, *ks = tensors((3, 8), torch.float32, 4)
    weights = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    with flowkernels.backend(backend):
        rk_combine(y, ks, weights, -0.5).sum().backward()
    expected = torch.stack([-0.5 * k.sum() for k in ks])
    torch.testing.assert_close(weights.grad, expected, rtol=1e-5, atol=1e-5)


def test_error_is_differentiable_any_number_of_times():
    """By the reference formula: gradcheck and gradgradcheck on the public function."""
    y0, y1, *ks = (x.requires_grad_() for x in tensors((2, 3), torch.float64, 5))
    for dt in (torch.tensor([0.1, 0.3]), torch.tensor(0.2)):
        dt = dt.double().requires_grad_()

        def function(dt, y0, y1, *ks):
            return rk_error(list(ks), [0.5, -0.25, 1.0], dt, y0, y1, 0.1, 0.2)

        assert torch.autograd.gradcheck(function, (dt, y0, y1, *ks))
        assert torch.autograd.gradgradcheck(function, (dt, y0, y1, *ks))


def test_combination_in_float64_is_differentiable_any_number_of_times():
    """float64 has kernels of its own: their backward by finite differences too."""
    y, *ks = (x.requires_grad_() for x in tensors((2, 3), torch.float64, 4))
    for dt in (torch.tensor([0.1, 0.3]), torch.tensor(0.2)):
        dt = dt.double().requires_grad_()

        def function(dt, y, *ks):
            return rk_combine(y, list(ks), [0.5, -0.25, 1.0], dt)

        with flowkernels.backend("native"):
            assert torch.autograd.gradcheck(function, (dt, y, *ks))
            assert torch.autograd.gradgradcheck(function, (dt, y, *ks))


def test_complex_states_take_the_reference():
    y0, y1, *ks = (torch.randn(3, 4, dtype=torch.complex128) for _ in range(4))
    weights = [0.5, -2.0]
    for dt in (0.1, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)):
        step = column(dt, y0)
        change = step * (0.5 * ks[0] - 2.0 * ks[1])
        torch.testing.assert_close(rk_combine(y0, ks, weights, dt), y0 + change)
        error, norm = rk_error(ks, weights, dt, y0, y1, 1e-2, 1e-3)
        ratio = change.abs() / (1e-3 + 1e-2 * torch.maximum(y0.abs(), y1.abs()))
        mean = ratio.square().mean(1) if isinstance(dt, torch.Tensor) else ratio.square().mean()
        torch.testing.assert_close(error, change)
        torch.testing.assert_close(norm, mean.sqrt())
        assert norm.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_out_may_be_the_state_or_a_stage(dtype):
    y, *ks = tensors((3, 2500), dtype, 6)
    weights = [0.1, 0.2, 0.3, 0.4, 0.5]
    for dt in (0.1, torch.tensor([0.1, 0.2, 0.3])):
        expected = rk_combine(y, ks, weights, dt)
        for place in range(6):
            operands = [x.clone() for x in (y, *ks)]
            found = rk_combine(operands[0], operands[1:], weights, dt, out=operands[place])
            assert found is operands[place]
            assert torch.equal(found, expected)
        buffer = torch.stack([*ks, y])
        rk_combine(y, buffer[:5], weights, dt, out=buffer[5])
        assert torch.equal(buffer[5], expected)
        with pytest.raises(ValueError, match=r"^out: overlaps an operand in part"):
            rk_combine(y, buffer[:5], weights, dt, out=buffer.view(-1)[7:7507].view(3, 2500))


def test_out_bumps_the_version_that_autograd_checks():
    x = torch.randn(3, 4, requires_grad=True)
    y = x * 1.0
    saved = y * y
    with torch.no_grad():
        rk_combine(y, [torch.ones(3, 4)], [1.0], 0.1, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_of_any_stride_are_read_in_place(dtype):
    """A slice of a larger buffer, NaN around it; other layouts take the reference."""
    plain = tensors((3, 700), dtype, 5)
    views = [torch.full((3, 1401), float("nan"), dtype=dtype)[:, 1:701].copy_(x) for x in plain]
    for dt in (0.1, torch.tensor([0.1, 0.2, 0.3])):
        with flowkernels.backend("native"), recorded_operators() as calls:
            y, y1, *ks = plain
            expected = rk_combine(y, ks, [1.0, -2.0, 0.5], dt)
            error, norm = rk_error(ks, [1.0, -2.0, 0.5], dt, y, y1, 0.1, 0.1)
            y, y1, *ks = views
            assert torch.equal(rk_combine(y, ks, [1.0, -2.0, 0.5], dt), expected)
            again, norm_again = rk_error(ks, [1.0, -2.0, 0.5], dt, y, y1, 0.1, 0.1)
            assert torch.equal(again, error)
            torch.testing.assert_close(norm_again, norm, rtol=1e-6, atol=0.0)
            assert len(calls) == 4
        transposed = [x.t().contiguous().t() for x in plain]
        y, y1, *ks = transposed
        found = rk_combine(y, ks, [1.0, -2.0, 0.5], dt)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_mixed_dtypes_promote():
    y, *ks = tensors((3, 700), torch.float32, 4)
    y, ks[0], ks[1] = y.bfloat16(), ks[0].half(), ks[1].bfloat16()
    found = rk_combine(y, ks, [0.5, 1.0, -1.0], 0.1)
    assert found.dtype == torch.float32
    truth = y.double() + exact_sum(ks, [0.5, 1.0, -1.0], 0.1, y)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)
    error, norm = rk_error(ks[1:2], [1.0], 0.1, y, y, 0.1, 0.1)
    assert (error.dtype, norm.dtype) == (torch.bfloat16, torch.float32)
    wide = rk_combine(y.double(), ks, [0.5, 1.0, -1.0], 0.1)  # by the reference
    torch.testing.assert_close(wide, truth)


def test_norm_sees_what_is_not_finite():
    y0, y1, k = tensors((2, 5000), torch.float32, 3)
    dt = torch.tensor([0.1, 0.2])
    for place in range(3):
        for bad in (float("nan"), float("inf")):
            operands = [y0.clone(), y1.clone(), k.clone()]
            operands[place][1, 4000] = bad
            for backend in ("native", "reference"):
                with flowkernels.backend(backend):
                    _, norms = rk_error([operands[2]], [1.0], dt, *operands[:2], 0.1, 0.1)
                    _, norm = rk_error([operands[2]], [1.0], 0.1, *operands[:2], 0.1, 0.1)
                assert norms[0].isfinite()
                # An infinite state has an infinite tolerance: its element counts for nothing.
                counts = place == 2 or bad != bad
                assert bool(norm.isfinite()) == bool(norms[1].isfinite()) == (not counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_runs(dtype):
    y0, y1, *ks = tensors((3, 70001), dtype, 9)
    for dt in (0.1, torch.tensor([0.1, 0.2, 0.3])):
        found = []
        for count in (1, 2, 3, 1):
            with threads(count):
                found.append(
                    (
                        rk_combine(y0, ks, DOPRI5, dt),
                        *rk_error(ks, DOPRI5, dt, y0, y1, 1e-3, 1e-3),
                    )
                )
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_every_element_is_written():
    y0, y1, *ks = tensors((3, 2500), torch.bfloat16, 9)
    with poisoned_memory():
        found = rk_error(ks, DOPRI5, torch.tensor([0.1, 0.2, 0.3]), y0, y1, 0.1, 0.1)
    assert not any(each.isnan().any() for each in found)


@pytest.mark.parametrize("stacked", [False, True])
def test_opcheck(stacked):
    y0, y1, *ks = tensors((3, 85), torch.float32, 5)
    ks = [torch.stack(ks)] if stacked else ks
    tolerance = torch.rand(3, 85) + 0.1
    ops = torch.ops.flowkernels
    for weights, vector in (([1.0, 2.0, 0.5], None), ([], torch.tensor([1.0, 2.0, 0.5]))):
        for dt in (None, torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3])):
            common = (weights, vector, dt, 0.25)
            torch.library.opcheck(ops.rk_combine_forward.default, (y0, ks, *common))
            torch.library.opcheck(ops.rk_combine_out.default, (y0, ks, *common, y1.clone()))
            for write in (True, False):
                tolerances = (tolerance, None, 0.0, 0.1, write)
                torch.library.opcheck(ops.rk_error.default, (ks, *common, y0, y1, *tolerances))


@pytest.mark.parametrize("vector", [False, True])
def test_error_compiles_to_one_graph(vector):
    def function(ks, dt, y0, y1):
        return rk_error(ks, DOPRI5, dt, y0, y1, 1e-2, 1e-3)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 16), (4, 48), (3, 112)):
            y0, y1, *ks = tensors(shape, torch.float32, 9)
            dt = torch.rand(shape[:1]) if vector else torch.rand(())
            ours, expected = compiled(ks, dt, y0, y1), function(ks, dt, y0, y1)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_error_in_torch_func_names_the_way_out():
    y0, y1, k = tensors((3, 4), torch.float32, 3)

    def norm(k):
        return rk_error([k], [1.0], 0.1, y0, y1, 0.1, 0.1)[1]

    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        torch.func.jvp(norm, (k,), (torch.ones_like(k),))
    with flowkernels.backend("reference"):
        assert torch.func.grad(norm)(k).shape == k.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y0": 1.0}, TypeError, r"^y0: got float, need a torch.Tensor"),
        ({"y1": torch.ones(3, 4)}, ValueError, r"^y1: got shape \(3, 4\), need \(3, 5\)"),
        ({"ks": [torch.ones(5)]}, ValueError, r"^ks\[0\]: got shape \(5,\), need \(3, 5\)"),
        ({"ks": {}}, TypeError, r"^ks: got dict, need a sequence of tensors"),
        ({"ks": []}, ValueError, r"^ks: got no stage, need at least one"),
        ({"weights": (1.0, 2.0)}, ValueError, r"^weights: got 2, need one for each of 1 stages"),
        ({"dt": torch.ones(4)}, ValueError, r"^dt: got shape \(4,\), need \[B\] with B = 3"),
        ({"dt": None}, TypeError, r"^dt: got NoneType, need a number or a tensor"),
        ({"rtol": "small"}, TypeError, r"^rtol: got str, need a number"),
        ({"atol": torch.ones(4)}, ValueError, r"^atol: got shape \(4,\), need one that broadcasts"),
        ({"atol": torch.ones(2, 3, 5)}, ValueError, r"^atol: got shape \(2, 3, 5\)"),
        ({"rtol": torch.tensor(1)}, TypeError, r"^rtol: got dtype torch.int64"),
    ],
)
def test_error_names_the_argument_of_a_bad_input(change, error, message):
    arguments = {
        "ks": [torch.ones(3, 5)],
        "weights": [1.0],
        "dt": 0.1,
        "y0": torch.ones(3, 5),
        "y1": torch.ones(3, 5),
        "rtol": 0.1,
        "atol": 0.1,
    }
    with pytest.raises(error, match=message) as caught:
        rk_error(**{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_0d_states():
    y, k = torch.tensor(2.0), torch.tensor(4.0)
    assert rk_combine(y, [k], [0.5], -0.5) == 1
    assert rk_error([k], [0.5], -0.5, y, y, 0.0, 0.5)[1] == 2
    with pytest.raises(ValueError, match=r"^dt: got shape \(1,\), need 0-d for a 0-d state"):
        rk_combine(y, [k], [0.5], torch.ones(1))


@hypothesis_settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    count=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    vector=st.booleans(),
)
def test_any_shape_and_number_of_stages(shape, count, dtype, vector):
    y0, y1, *ks = tensors(tuple(shape), dtype, count + 2)
    weights = torch.linspace(-1, 1, count).tolist()
    dt = torch.linspace(0.1, 0.9, shape[0]) if vector else 0.3
    with flowkernels.backend("native"):
        ours = (rk_combine(y0, ks, weights, dt), *rk_error(ks, weights, dt, y0, y1, 0.1, 0.1))
    with flowkernels.backend("reference"):
        theirs = (rk_combine(y0, ks, weights, dt), *rk_error(ks, weights, dt, y0, y1, 0.1, 0.1))
    rtol = 1e-5 if dtype == torch.float32 else 1e-12  # a sum of 20 terms, and one of 64 thousand
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, equal_nan=True)


def test_direct_calls_give_the_bits_of_public_ones():
    """The solver's path, and a list or buffer of more stages than weights."""
    y, y1, *ks = tensors((3, 85), torch.float32, 9)
    used, weights = ks[:4], [0.5, 0.0, -1.0, 2.0]
    assert direct.serves(y, 64)
    assert not direct.serves(y, 65)
    assert not direct.serves(y.to(torch.complex64), 4)
    with flowkernels.backend("reference"):
        assert not direct.serves(y, 4)
    for dt in (0.1, torch.tensor(0.1), torch.tensor([0.1, 0.2, 0.3])):
        expected = rk_combine(y, used, weights, dt)
        for stages in (ks, [torch.stack(ks)]):
            assert torch.equal(direct.combine(y, stages, weights, dt), expected)
            out = torch.empty_like(y)
            assert direct.combine_out(y, stages, weights, dt, out) is out
            assert torch.equal(out, expected)
            error, norm = rk_error(used, weights, dt, y, y1, 1e-3, 1e-2)
            empty, found = direct.error_norm(stages, weights, dt, y, y1, 1e-3, 1e-2)
            assert empty.numel() == 0
            assert torch.equal(found, norm)
            written, _ = direct.error_norm(stages, weights, dt, y, y1, 1e-3, 1e-2, write_error=True)
            assert torch.equal(written, error)


def test_operators_refuse_what_would_be_read_out_of_bounds():
    """Direct calls are unchecked in Python; shapes and dtypes are checked where memory is read."""
    y, k = torch.ones(3, 4), torch.ones(3, 4)
    for ks, weights in (([k[:2]], [1.0]), ([k.double()], [1.0]), ([k.t()], [1.0])):
        with pytest.raises(RuntimeError, match="ks: need"):
            direct.combine(y, ks, weights, 0.1)
    with pytest.raises(RuntimeError, match="weights: more than there are stages"):
        direct.combine(y, [k], [1.0, 1.0], 0.1)
    with pytest.raises(RuntimeError, match="dt: need"):
        direct.combine(y, [k], [1.0], torch.ones(2))
    with pytest.raises(RuntimeError, match="rtol: need a contiguous tensor"):
        direct.error_norm([k], [1.0], 0.1, y, y, torch.ones(4), 0.1)
    with pytest.raises(RuntimeError, match="y1: need the shape"):
        direct.error_norm([k], [1.0], 0.1, y, y[:2], 0.1, 0.1)


def test_functions_are_listed_with_their_backends():
    rows = {row["op"]: row for row in _library.table()}
    for name in ("rk_combine", "rk_error"):
        row = rows[f"flowkernels.ode.{name}"]
        assert row["native"] == "on"
        assert row["triton"] == "no Triton kernel: CUDA C++ serves it on GPUs"
