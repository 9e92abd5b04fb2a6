"""flow_matching, straightening, fgm: the checks that every op passes, and what is their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowkernels
from flowkernels.losses import fgm, flow_matching, straightening
from flowkernels.ops import _library
from tests.checks import OpChecks
from tests.checks.cases import losses as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
# The interpreter's process is there for the kernels: the reference has been checked beside C++.
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)


class TestFlowMatching(OpChecks):
    case = cases.FLOW_MATCHING


class TestStraightening(OpChecks):
    case = cases.STRAIGHTENING


def _with_normaliser_as_weight(shape, dtype, device, variant):
    inputs = cases.FGM.make_inputs(shape, dtype, device, variant)
    if inputs.pop("normalize") is not None:
        inputs["weight"] = normaliser(**inputs) * (
            1 if inputs["weight"] is None else inputs["weight"]
        )
    return inputs


class TestFGM(OpChecks):
    case = cases.FGM

    @pytest.mark.unforced
    def test_gradcheck(self, variant):
        """Finite differences see the normaliser change, which is a constant in the gradient: it is
        a weight here, and a test below says that the two have one gradient.
        """
        self.case = dataclasses.replace(self.case, make_inputs=_with_normaliser_as_weight)
        super().test_gradcheck(variant)


def normaliser(u, x0, noise, t, u_uncond=None, guidance=1.0, **_):
    """The SiD normaliser [B] of u after guidance."""
    if u_uncond is not None:
        u = u_uncond + guidance * (u - u_uncond)
    size = (u - (noise - x0)).abs().reshape(len(u), -1).mean(1)
    return t / (2 * size.clamp_min(1e-5))


# 3·WIDTH elements: more than a chunk of C++, and than a tile of Triton.
WIDTH = 1001 if _library.INTERPRETED else 3001


@pytest.fixture
def operands():
    """u, v, x0, noise: four samples each."""
    torch.manual_seed(0)
    return [torch.randn(4, 3, WIDTH) for _ in range(4)]


@pytest.fixture
def t():
    return torch.tensor([0.1, 0.4, 0.7, 0.9])


def gradients(loss_of, operands, grad_output=None):
    leaves = [x.clone().requires_grad_() for x in operands]
    loss = loss_of(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad_output)


STEPS = torch.tensor([-0.1, -0.4, -0.7, 0.5])

LOSSES = pytest.mark.parametrize(
    "loss_of",
    [
        lambda u, v, x0, noise: flow_matching(v, x0, noise) + 0 * u.sum(),
        lambda u, v, x0, noise: straightening(v, x0, noise, STEPS) + 0 * u.sum(),
        lambda u, v, x0, noise: fgm(u, v, x0, noise, torch.full((4,), 0.5), normalize="sid"),
    ],
    ids=["flow_matching", "straightening", "fgm"],
)
FUNCTIONS = pytest.mark.parametrize("loss", [flow_matching, straightening, fgm])


def arguments_of(loss, operands, t):
    """What each loss takes of u, v, x0, noise and t; straightening's dt is -t."""
    if loss is fgm:
        return (*operands, t)
    return tuple(operands[1:]) if loss is flow_matching else (*operands[1:], -t)


@interpretable
@BACKENDS
@LOSSES
def test_float16_gradients_survive_a_grad_scaler(backend, loss_of, operands):
    """2·(v - w)/(n·B) is near 1e-8 for a large image: below float16's least number, 6e-8."""
    half = [(0.01 * x).half() for x in operands]
    with flowkernels.backend(backend):
        _, *found = gradients(loss_of, half, torch.tensor(65536.0))
        _, *exact = gradients(loss_of, [x.float() for x in half], torch.tensor(65536.0))
    for ours, truth in zip(found[1:], exact[1:], strict=True):
        assert ours.dtype == torch.float16
        # Half of float16's spacing, relative, and of its subnormals' at the zeros.
        torch.testing.assert_close(ours.float(), truth, rtol=2**-10, atol=2**-24)


@interpretable
@BACKENDS
@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_backward_leaves_the_first_gradients_alone(backend, loss_of, dtype, operands):
    leaves = [x.to(dtype).requires_grad_() for x in operands]
    with flowkernels.backend(backend):
        loss = loss_of(*leaves)
        first = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(loss, leaves, torch.tensor(-2.0), retain_graph=True)
        again = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    for gradient, before, other, repeated in zip(first, kept, second, again, strict=True):
        assert torch.equal(gradient, before)
        assert torch.equal(repeated, before)
        assert torch.equal(gradient, before)
        # One rounding each, so relative to the largest value the ratio holds to two of them.
        error = (other.float() * -1.5 - gradient.float()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * gradient.float().abs().max()


@interpretable
@BACKENDS
@LOSSES
def test_backward_for_some_of_the_leaves(backend, loss_of, operands):
    """``torch.autograd.grad`` for one leaf of those that ask, then for another."""
    leaves = [x.clone().requires_grad_() for x in operands]
    with flowkernels.backend(backend):
        _, *expected = gradients(loss_of, operands)
        loss = loss_of(*leaves)
        for leaf, gradient in reversed(list(zip(leaves, expected, strict=True))):
            (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
            torch.testing.assert_close(found, gradient)


@interpretable
@BACKENDS
@LOSSES
def test_gradients_accumulate_into_grad(backend, loss_of, operands):
    """Two losses back-propagated one after the other, scaled: ``.grad`` is the sum."""
    leaves = [x.clone().requires_grad_() for x in operands]
    with flowkernels.backend(backend):
        (0.5 * loss_of(*leaves)).backward()
        (0.25 * loss_of(*leaves)).backward()
        _, *expected = gradients(loss_of, operands)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 0.75 * gradient)


@interpretable
@BACKENDS
@FUNCTIONS
def test_reductions_belong_together(backend, loss, operands, t):
    """sum = Σ elements, mean = Σ_b weight_b·ℓ_b / B: never over the sum of the weights."""
    operands = arguments_of(loss, operands, t)
    weight = torch.tensor([0.5, 0.0, 2.0, 3.0])
    elements = operands[0][0].numel()
    with flowkernels.backend(backend):
        each = loss(*operands, weight=weight, reduction="none")
        plain = loss(*operands, reduction="none")
        mean = loss(*operands, weight=weight)
        total = loss(*operands, weight=weight, reduction="sum")
    torch.testing.assert_close(each, weight * plain)
    torch.testing.assert_close(mean, each.sum() / 4)
    torch.testing.assert_close(total, each.sum() * elements)


@interpretable
@BACKENDS
@FUNCTIONS
def test_result_is_at_least_float32(backend, loss, operands, t):
    operands = arguments_of(loss, operands, t)
    with flowkernels.backend(backend):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = loss(*(x.to(dtype) for x in operands[:-1]), operands[-1])
            assert found.dtype == torch.float32
        assert loss(*(x.double() for x in operands)).dtype == torch.float64


@interpretable
@BACKENDS
@FUNCTIONS
def test_empty_batch(backend, loss, operands, t):
    """A sum of nothing is 0, a mean of nothing NaN (as in PyTorch), and no gradient an error."""
    operands = arguments_of(loss, operands, t)
    with flowkernels.backend(backend):
        leaves = [x[:0].clone().requires_grad_() for x in operands]
        assert loss(*leaves, reduction="sum").item() == 0
        assert loss(*leaves, reduction="none").shape == (0,)
        mean = loss(*leaves)
        assert mean.isnan()
        mean.backward()
    assert leaves[0].grad.shape == (0, 3, WIDTH)


@interpretable
@BACKENDS
@FUNCTIONS
def test_weight_may_ask_for_a_gradient(backend, loss, operands, t):
    operands = arguments_of(loss, operands, t)
    weight = torch.rand(4, requires_grad=True)
    with flowkernels.backend(backend):
        loss(*operands, weight=weight, reduction="none").sum().backward()
        expected = loss(*operands, reduction="none")
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 1 << 21), (3, 2_900_001)], ids=["lines", "unaligned"])
def test_gradients_that_pass_by_the_caches(dtype, shape):
    """Large ones are written otherwise; both of these are, in either dtype."""
    if _library.why_off("fgm", "native", "cpu") is not None:
        pytest.skip("needs the native library")
    torch.manual_seed(0)
    u, v, x0, noise, u_uncond = torch.randn(5, *shape).to(dtype)
    t = torch.rand(shape[0])

    def run(backend):
        leaves = [each.clone().requires_grad_() for each in (u, v, x0, noise, u_uncond)]
        with flowkernels.backend(backend):
            guided = {"u_uncond": leaves[4], "guidance": 3.0, "lam": -0.4}
            total = fgm(*leaves[:4], t, reduction="sum", **guided)
            total = total + flow_matching(*leaves[1:4], reduction="sum")
            return [total.detach(), *torch.autograd.grad(total, leaves)]

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, expected in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@interpretable
@BACKENDS
def test_fgm_is_the_difference_of_squares(backend, operands, t):
    """lam = 1: ‖u - w‖² - ‖v - w‖². lam = 0: less ‖u - v‖² than that. lam = -0.4: linear in lam."""
    u, v, x0, noise = operands
    w = noise - x0
    difference = ((u - w) ** 2 - (v - w) ** 2).mean((1, 2))
    distance = ((u - v) ** 2).mean((1, 2))
    with flowkernels.backend(backend):
        for lam in (1.0, 0.0, -0.4):
            found = fgm(u, v, x0, noise, t, lam=lam, reduction="none")
            expected = difference + (lam - 1) * distance
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@interpretable
@BACKENDS
@pytest.mark.parametrize("lam", [0.0, 1.0, -0.4])
def test_fgm_gradients_are_those_of_the_paper(backend, lam, operands, t):
    """∂u = ω(2e + 2λd), ∂v = ω(2(1-λ)d - 2e), ∂x0 = 2ωd, over n·B."""
    u, v, x0, noise = operands
    d, e = u - v, v - (noise - x0)
    weight = torch.rand(4)
    with flowkernels.backend(backend):
        _, *found = gradients(lambda *x: fgm(*x, t, lam=lam, weight=weight), operands)
    omega = weight[:, None, None] / u.numel()
    expected = (
        omega * (2 * e + 2 * lam * d),
        omega * (2 * (1 - lam) * d - 2 * e),
        omega * 2 * d,
        omega * -2 * d,
    )
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-9)


@interpretable
@BACKENDS
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_sid_normaliser_is_a_constant_in_the_gradient(backend, guidance, operands, t):
    """Loss and gradients are those of the same number given as a weight."""
    options = (
        {} if guidance is None else {"u_uncond": torch.randn(4, 3, WIDTH), "guidance": guidance}
    )
    u, _, x0, noise = operands
    weight = normaliser(u, x0, noise, t, **options)
    with flowkernels.backend(backend):
        found = gradients(lambda *x: fgm(*x, t, normalize="sid", **options), operands)
        expected = gradients(lambda *x: fgm(*x, t, weight=weight, **options), operands)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-9)


@interpretable
@BACKENDS
def test_sid_normaliser_has_a_floor(backend, t):
    """u = w: the mean is 0, the floor 1e-5, and the loss what that gives."""
    x0, noise = torch.zeros(4, 6), torch.ones(4, 6)
    v = torch.full((4, 6), 1.5)
    with flowkernels.backend(backend):
        found = fgm(noise - x0, v, x0, noise, t, normalize="sid", reduction="none")
    torch.testing.assert_close(found, -0.5 * t / 2e-5)


POISONS = {
    "nan in u": (0, float("nan")),
    "nan in v": (1, float("nan")),
    "inf in v": (1, float("inf")),
    "-inf in x0": (2, -float("inf")),
    "nan in noise": (3, float("nan")),
    "nan in t": (4, float("nan")),
    "inf in weight": (5, float("inf")),
}


@interpretable
@BACKENDS
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("options", [{}, {"normalize": "sid", "lam": -0.4}], ids=["plain", "sid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_sample_that_is_not_finite_contributes_zero(backend, poison, options, dtype, operands, t):
    """Zero loss and zero gradients for it, counted; the others as if it had a loss of zero."""
    index, value = POISONS[poison]
    bad = [x.to(dtype) for x in operands] + [t.clone(), torch.ones(4)]
    bad[index] = bad[index].clone()
    bad[index][2].view(-1)[-1] = value
    nonfinite = torch.full((), 5, dtype=torch.int32)
    leaves = [x.requires_grad_() for x in bad[:4]]
    scale = torch.tensor(1024.0)
    with flowkernels.backend(backend):
        loss = fgm(*leaves, bad[4], weight=bad[5], nonfinite=nonfinite, **options)
        found = torch.autograd.grad(loss, leaves, scale, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, scale)
        with torch.no_grad():
            each = fgm(*leaves, bad[4], weight=bad[5], reduction="none", **options)
        kept = torch.tensor([0, 1, 3])
        rest = [x.detach()[kept] for x in bad]
        expected = gradients(
            lambda *x: fgm(*x, rest[4], weight=rest[5], **options), rest[:4], scale
        )
    assert nonfinite.item() == 6
    assert each[2].item() == 0
    # The divisor is still 4.
    torch.testing.assert_close(loss, expected[0] * 3 / 4, rtol=1e-5, atol=1e-6)
    rounding = 1e-2 if dtype == torch.bfloat16 else 2e-3  # once here, once in the others' gradient
    for gradient, repeated, other in zip(found, again, expected[1:], strict=True):
        assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))
        assert torch.equal(repeated, gradient)
        torch.testing.assert_close(
            gradient[kept].float(), other.float() * 3 / 4, rtol=rounding, atol=1e-6
        )


@interpretable
@BACKENDS
def test_nonfinite_counts_every_call_and_every_sample(backend, operands, t):
    u, v, x0, noise = operands
    u = u.clone()
    u[1:] = float("nan")
    counter = torch.zeros(1, dtype=torch.int32)
    with flowkernels.backend(backend):
        fgm(u, v, x0, noise, t, nonfinite=counter)
        fgm(u, v, x0, noise, t, nonfinite=counter, reduction="sum")
        everything = fgm(u[1:], v[1:], x0[1:], noise[1:], t[1:], nonfinite=counter)
    assert everything.item() == 0
    assert counter.tolist() == [9]


def test_nonfinite_is_counted_in_a_compiled_graph(operands, t):
    u, v, x0, noise = operands
    u = u.clone()
    u[2] = float("inf")
    counter = torch.zeros((), dtype=torch.int32)
    torch._dynamo.reset()  # other tests compile the same function, for other arguments
    compiled = torch.compile(fgm, fullgraph=True, dynamic=True, backend="aot_eager")
    v = v.clone().requires_grad_()
    for calls in (1, 2):
        compiled(u, v, x0, noise, t, nonfinite=counter).backward()
        assert counter.item() == calls
    assert torch.equal(v.grad[2], torch.zeros_like(v.grad[2]))


@interpretable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_accumulate_a_difference_near_zero(dtype):
    """lam = 0 near the solution: terms of size 1 that cancel to 1e-3 keep three digits."""
    torch.manual_seed(0)
    v, x0, noise = torch.randn(3, 2, 40_000).to(dtype).unbind()
    d = 1e-3 * torch.randn(2, 40_000)
    u = v.float() + d
    exact = (2 * (u.double() - v) * (v.double() - (noise.double() - x0))).mean()
    with flowkernels.backend(KERNELS):
        found = fgm(u, v, x0, noise, torch.rand(2))
    assert abs(found - exact) < 1e-3 * exact.abs() + 1e-9


def test_a_gradient_of_one_costs_no_operator_and_another_does():
    """On CPU: the stored gradients are handed out, or computed again for what came."""
    v, x0, noise = torch.randn(3, 2, 5).unbind()
    calls = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    found = []
    for factor in (1.0, 3.0):
        leaf = v.clone().requires_grad_()
        loss = flow_matching(leaf, x0, noise)
        calls.clear()
        with Names():
            found += torch.autograd.grad(loss, leaf, torch.tensor(factor))
        assert ("flowkernels::flow_matching_rescale_" in calls) is (factor != 1.0)
    torch.testing.assert_close(found[1], 3 * found[0])
