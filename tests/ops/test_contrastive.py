"""contrastive_flow_matching: the checks of every op, and what is its own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import flowkernels
from flowkernels.losses import contrastive_flow_matching, flow_matching
from flowkernels.ops import _library
from flowkernels.ops.contrastive import _operators
from tests.checks import OpChecks
from tests.checks.cases import contrastive as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


class TestContrastiveFlowMatching(OpChecks):
    case = cases.CONTRASTIVE


# 3·WIDTH elements: more than a chunk of C++, and than a tile of Triton.
WIDTH = 1001 if _library.INTERPRETED else 3001
NEGATIVES = torch.tensor([2, 0, 3, 0])  # 0 is a negative twice, 1 never


@pytest.fixture
def operands():
    """v, x0, noise: four samples each."""
    torch.manual_seed(0)
    return [torch.randn(4, 3, WIDTH) for _ in range(3)]


def with_gradient(loss_of, v):
    v = v.clone().requires_grad_()
    loss = loss_of(v)
    return loss.detach(), torch.autograd.grad(loss.sum(), v)[0]


@interpretable
@BACKENDS
@REDUCTIONS
@pytest.mark.parametrize("lam", [0.0, 0.05, 0.9])
def test_is_flow_matching_to_a_shifted_target(backend, reduction, lam, operands):
    """(1 - λ)·‖v - (u - λũ)/(1 - λ)‖² - λ/(1 - λ)·‖u - ũ‖²; so the gradients are equal."""
    v, x0, noise = operands
    u = noise - x0
    target = (u - lam * u[NEGATIVES]) / (1 - lam)
    options = {"weight": torch.tensor([0.5, 0.0, 2.0, 3.0]), "reduction": reduction}

    def contrastive(v):
        return contrastive_flow_matching(v, x0, noise, NEGATIVES, lam=lam, **options)

    def shifted(v):
        return (1 - lam) * flow_matching(v, torch.zeros_like(v), target, **options)

    with flowkernels.backend(backend):
        (first, gradient), (second, other) = (with_gradient(f, v) for f in (contrastive, shifted))
        constant = -lam / (1 - lam) * flow_matching(u, 0 * u, u[NEGATIVES], **options)
    # At λ = 0.9 the target is ten times as large as u, and so are the roundings of its square.
    tolerance = 1e-5 / (1 - lam)
    torch.testing.assert_close(first, second + constant, rtol=tolerance, atol=tolerance)
    scale = gradient.abs().max().item()
    torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 * scale)


@interpretable
@BACKENDS
def test_the_paper_gradient(backend, operands):
    """2[(v - u) - λ(v - ũ)]·weight/(nB)."""
    v, x0, noise = operands
    weight = torch.rand(4)
    u = (noise - x0).double()
    with flowkernels.backend(backend):
        _, found = with_gradient(
            lambda v: contrastive_flow_matching(v, x0, noise, NEGATIVES, weight=weight), v
        )
    expected = 2 * ((v - u) - 0.05 * (v - u[NEGATIVES])) * weight[:, None, None] / v.numel()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-10)


@interpretable
@BACKENDS
def test_without_lam_it_is_flow_matching(backend, operands):
    v, x0, noise = operands
    with flowkernels.backend(backend):
        ours = with_gradient(
            lambda v: contrastive_flow_matching(v, x0, noise, NEGATIVES, lam=0.0), v
        )
        theirs = with_gradient(lambda v: flow_matching(v, x0, noise), v)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@interpretable
@BACKENDS
def test_an_item_may_be_its_own_negative(backend, operands):
    """The indices are the caller's: then the loss is (1 - λ)·‖v - u‖²."""
    v, x0, noise = operands
    with flowkernels.backend(backend):
        found = contrastive_flow_matching(v, x0, noise, torch.arange(4), lam=0.25)
        torch.testing.assert_close(found, 0.75 * flow_matching(v, x0, noise))


@interpretable
@BACKENDS
def test_indices_of_any_integer_dtype_and_stride(backend, operands):
    v, x0, noise = operands
    spread = torch.stack((NEGATIVES, torch.full((4,), 99)), 1)[:, 0]
    with flowkernels.backend(backend):
        expected = with_gradient(lambda v: contrastive_flow_matching(v, x0, noise, NEGATIVES), v)
        for given in (NEGATIVES.int(), NEGATIVES.to(torch.int8), NEGATIVES.to(torch.uint8), spread):
            found = with_gradient(
                lambda v, given=given: contrastive_flow_matching(v, x0, noise, given), v
            )
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@interpretable
@BACKENDS
@pytest.mark.parametrize("name", ["x0", "noise"])
def test_nan_reaches_a_sample_and_those_that_it_is_the_negative_of(backend, name, operands):
    v, x0, noise = (x.clone() for x in operands)
    {"x0": x0, "noise": noise}[name][0, 1, 5] = float("nan")
    with flowkernels.backend(backend):
        losses, gradient = with_gradient(
            lambda v: contrastive_flow_matching(v, x0, noise, NEGATIVES, reduction="none"), v
        )
    assert losses.isnan().tolist() == [True, True, False, True]
    expected = torch.zeros_like(gradient, dtype=torch.bool)
    expected[[0, 1, 3], 1, 5] = True
    assert torch.equal(gradient.isnan(), expected)


@interpretable
@BACKENDS
@pytest.mark.parametrize("index", [-1, 4, 2**40, -(2**62)])
def test_an_index_outside_the_batch_is_nan_where_nobody_looked(backend, index, operands):
    """As on a GPU: no host sync, nothing read that is not there, and it shows."""
    v, x0, noise = operands
    negatives = NEGATIVES.clone()
    negatives[1] = index
    if backend == "reference":
        from flowkernels.ops.contrastive import reference

        def loss_of(v):
            return reference.contrastive_flow_matching(v, x0, noise, negatives, None, 0.05, "none")

        losses, gradient = with_gradient(loss_of, v)
    else:
        losses, gradient = _operators.contrastive_forward(
            backend, v, x0, noise, negatives, None, 0.05, 0, 1
        )
    assert losses.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().flatten(1).all(1).tolist() == [False, True, False, False]
    assert not gradient[[0, 2, 3]].isnan().any()


def test_an_index_outside_the_batch_under_compile(operands):
    """The graph cannot look at the indices: NaN there, for the one sample."""
    v, x0, noise = operands
    torch._dynamo.reset()
    compiled = torch.compile(contrastive_flow_matching, fullgraph=True, backend="aot_eager")
    found = compiled(v, x0, noise, torch.tensor([2, 0, 7, 0]), reduction="none")
    assert found.isnan().tolist() == [False, False, True, False]


@interpretable
@BACKENDS
@REDUCTIONS
def test_gradients_to_the_data_are_collected_from_their_negatives(backend, reduction, operands):
    """x0 and noise: a sample's own term, and one for each sample that it is the negative of."""
    v, x0, noise = (x.clone().requires_grad_() for x in operands)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
    with flowkernels.backend(backend):
        loss = contrastive_flow_matching(
            v, x0, noise, NEGATIVES, lam=0.2, weight=weight, reduction=reduction
        )
        found = torch.autograd.grad(loss.sum(), (v, x0, noise))
    elements = v[0].numel()
    scale = {"none": 1 / elements, "mean": 1 / elements / 4, "sum": 1.0}[reduction]
    factor = 2 * scale * weight.double()[:, None, None]
    velocity, u = v.detach().double(), (noise - x0).detach().double()
    to_u = -factor * (velocity - u)
    to_u.index_add_(0, NEGATIVES, 0.2 * factor * (velocity - u[NEGATIVES]))
    to_v = factor * ((velocity - u) - 0.2 * (velocity - u[NEGATIVES]))
    for ours, truth in zip(found, (to_v, -to_u, to_u), strict=True):
        scale = truth.abs().max().item()
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["x0", "noise", "weight"])
def test_forward_mode_over_constants_is_refused_not_lost(name, operands):
    given = dict(zip(("v", "x0", "noise"), operands, strict=True), weight=torch.ones(4))
    with forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
            contrastive_flow_matching(negatives=NEGATIVES, **given)
        with flowkernels.backend("reference"):
            loss = contrastive_flow_matching(negatives=NEGATIVES, **given)
        assert forward_ad.unpack_dual(loss).tangent is not None


def test_gradcheck_of_every_operand():
    torch.manual_seed(0)
    operands = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def loss(v, x0, noise, weight):
        return contrastive_flow_matching(
            v, x0, noise, NEGATIVES, lam=0.3, weight=weight, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (*operands, weight))
    assert torch.autograd.gradgradcheck(loss, (*operands, weight))


@interpretable
@BACKENDS
def test_reductions_belong_together(backend, operands):
    weight = torch.tensor([0.5, 0.0, 2.0, 3.0])
    with flowkernels.backend(backend):
        each, plain, mean, total = (
            contrastive_flow_matching(*operands, NEGATIVES, **options)
            for options in (
                {"weight": weight, "reduction": "none"},
                {"reduction": "none"},
                {"weight": weight},
                {"weight": weight, "reduction": "sum"},
            )
        )
    torch.testing.assert_close(each, weight * plain)
    torch.testing.assert_close(mean, each.sum() / 4)
    torch.testing.assert_close(total, each.sum() * operands[0][0].numel())


@interpretable
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_backward_leaves_the_first_gradient_alone(backend, dtype, operands):
    v, x0, noise = (x.to(dtype) for x in operands)
    v.requires_grad_()
    with flowkernels.backend(backend):
        loss = contrastive_flow_matching(v, x0, noise, NEGATIVES)
        (first,) = torch.autograd.grad(loss, v, torch.tensor(3.0), retain_graph=True)
        kept = first.clone()
        torch.autograd.grad(loss, v, torch.tensor(-2.0), retain_graph=True)
        (again,) = torch.autograd.grad(loss, v, torch.tensor(3.0))
    assert torch.equal(first, kept)
    assert torch.equal(again, kept)


@interpretable
@BACKENDS
def test_float16_gradients_survive_a_grad_scaler(backend, operands):
    """2(v - u)/(n·B) is near 1e-8 for a large image: below float16's least number, 6e-8."""
    v, x0, noise = ((0.01 * x).half() for x in operands)
    v.requires_grad_()
    exact_v = v.detach().float().requires_grad_()
    with flowkernels.backend(backend):
        loss = contrastive_flow_matching(v, x0, noise, NEGATIVES)
        exact = contrastive_flow_matching(exact_v, x0.float(), noise.float(), NEGATIVES)
        (found,) = torch.autograd.grad(loss, v, torch.tensor(65536.0))
        (truth,) = torch.autograd.grad(exact, exact_v, torch.tensor(65536.0))
    assert found.dtype == torch.float16
    # Half of float16's spacing, relative, and of its subnormals' at the zeros.
    torch.testing.assert_close(found.float(), truth, rtol=2**-10, atol=2**-24)


@interpretable
@BACKENDS
def test_empty_batch(backend):
    leaves = [torch.empty(0, 3, 5, requires_grad=True) for _ in range(3)]
    negatives = torch.empty(0, dtype=torch.int64)
    with flowkernels.backend(backend):
        assert contrastive_flow_matching(*leaves, negatives, reduction="sum").item() == 0
        assert contrastive_flow_matching(*leaves, negatives, reduction="none").shape == (0,)
        mean = contrastive_flow_matching(*leaves, negatives)
        assert mean.isnan()
        mean.backward()
    assert leaves[0].grad.shape == (0, 3, 5)


@interpretable
@BACKENDS
def test_more_samples_than_a_block_of_them(backend):
    """Samples of a few elements, hundreds of them: a tile of Triton holds many."""
    torch.manual_seed(0)
    v, x0, noise = torch.randn(3, 700, 3)
    negatives = torch.randint(0, 700, (700,))
    u = noise - x0
    with flowkernels.backend(backend):
        found = contrastive_flow_matching(v, x0, noise, negatives, reduction="none")
    expected = ((v - u) ** 2 - 0.05 * (v - u[negatives]) ** 2).mean(1)
    torch.testing.assert_close(found, expected)
