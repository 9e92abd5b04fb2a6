"""self_corrected, self_reflow, pseudo_huber: the checks of every op, and what is their own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import flowkernels
from flowkernels.losses import pseudo_huber, self_corrected, self_reflow
from flowkernels.ops import _library
from flowkernels.ops.correction import reference
from tests.checks import OpChecks
from tests.checks.cases import correction as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
# The interpreter's process is there for the kernels: the reference has been checked beside C++.
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
# More than a chunk of C++, and than a tile of Triton.
WIDTH = 2100 if _library.INTERPRETED else 8300
TAU = 0.4


class TestSelfCorrected(OpChecks):
    case = cases.SELF_CORRECTED


class TestSelfReflow(OpChecks):
    case = cases.SELF_REFLOW


class TestPseudoHuber(OpChecks):
    case = cases.PSEUDO_HUBER


# (t, t_post, t_prev) of each sample.
TIMES = {
    "inside": [(0.7, 0.65, 0.78), (0.45, 0.35, 0.5), (0.2, 0.12, 0.25)],
    "t_post at trunc": [(0.45, TAU, 0.5), (0.5, TAU, 0.5), (TAU, TAU, TAU)],
    "t near 0": [(0.0, 0.0, 0.05), (1e-7, 0.0, 0.1), (1e-3, 5e-4, 1e-3)],
    "t = 1": [(1.0, 0.9, 1.0), (1.0, 1.0, 1.0), (1.0, 0.95, 1.0)],
    "one sample": [(0.5, 0.45, 0.6)],
    "one truncated sample": [(0.3, 0.25, 0.31)],
}
BY_TIMES = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)


def operands(times, dtype=torch.float32, width=WIDTH, spread=1.0):
    """Arguments of self_corrected whose differences are of size ``spread``."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, len(times), width).to(dtype)
    near = [noise - x0 + spread * torch.randn(x0.shape).to(dtype) for _ in range(4)]
    v, v_teacher, v_post, v_prev = near
    t, t_post, t_prev = torch.tensor(times, dtype=torch.promote_types(dtype, torch.float32)).T
    return [v, t, v_teacher, v_post, t_post, v_prev, t_prev, x0, noise]


def evaluate(function, inputs, *options, **named):
    """The three results, and the gradient of the first to v, summed over samples."""
    v = inputs[0].detach().clone().requires_grad_()
    results = function(v, *inputs[1:], *options, **named)
    (gradient,) = torch.autograd.grad(results[0].sum(), v)
    return *(result.detach() for result in results), gradient


def literal(inputs, c=0.01, lam_bi=0.1, reduction="mean"):
    """What the states themselves give, in float64."""
    return evaluate(
        reference.self_corrected_literal,
        [x.double() for x in inputs],
        *(TAU, c, lam_bi, reduction),
    )


@BY_TIMES
@REDUCTIONS
def test_velocity_form_is_the_literal_form(times, reduction):
    """x_t, x_t' and x_t'' cancel: values and gradients agree to 1e-6, and in fact to rounding."""
    inputs = operands(times, torch.float64)
    found = evaluate(self_corrected, inputs, trunc=TAU, reduction=reduction)
    for ours, truth in zip(found, literal(inputs, reduction=reduction), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)


@interpretable
@BY_TIMES
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-6])
def test_float32_kernels_are_near_the_literal_form(times, spread):
    """2e-5 in value, 2e-4 in gradient, also where differences are the size of v's rounding."""
    inputs = operands(times, spread=spread)
    truth = literal(inputs)
    with flowkernels.backend(KERNELS):
        found = evaluate(self_corrected, inputs, trunc=TAU)
    for ours, exact in zip(found[:3], truth[:3], strict=True):
        # The floor is the truth's own: float64 states cancel to 1e-16.
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-25)
    assert (found[3] - truth[3]).abs().max() <= 2e-4 * truth[3].abs().max()


@interpretable
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_t_post_at_trunc_is_not_truncated(backend, dtype):
    """Strictly below only, whatever the dtype of the times; the other target is not even read."""
    inputs = operands([(0.75, 0.5, 0.8)] * 2)
    inputs[1::3] = [time.to(dtype) for time in inputs[1::3]]
    t_post = inputs[4].to(dtype)
    below = torch.nextafter(t_post.float(), torch.zeros(2)).to(torch.float64)
    poisoned = torch.full_like(inputs[0], float("nan"))
    with flowkernels.backend(backend):
        at = evaluate(self_corrected, [*inputs[:7], poisoned, poisoned], trunc=0.5)
        assert all(result.isfinite().all() for result in at)
        inputs[3], inputs[4] = poisoned, below
        under = evaluate(self_corrected, inputs, trunc=0.5)
        assert all(result.isfinite().all() for result in under)
    assert under[1] != at[1]


@interpretable
@BACKENDS
@pytest.mark.parametrize("trunc", [0.1, 0.4, 0.7])
def test_a_tensor_filled_with_trunc_is_not_below_it(backend, trunc):
    """0.7 as float32 is below 0.7 as float64, and 0.1 above: neither may decide."""
    inputs = operands([(0.9, 0.5, 0.95)] * 2)
    inputs[4] = torch.full((2,), trunc)
    inputs[7] = torch.full_like(inputs[7], float("nan"))
    with flowkernels.backend(backend):
        assert self_corrected(*inputs, trunc=trunc)[0].isfinite()


@interpretable
@BACKENDS
def test_only_total_carries_a_gradient_and_to_v_alone(backend):
    inputs = [x.requires_grad_() for x in operands(TIMES["inside"])]
    with flowkernels.backend(backend):
        total, consistency, bidirectional = self_corrected(*inputs, trunc=TAU)
        assert total.requires_grad
        assert not consistency.requires_grad
        assert not bidirectional.requires_grad
        total.backward()
        assert inputs[0].grad is not None
        assert all(x.grad is None for x in inputs[1:])
        fixed = self_corrected(inputs[0].detach(), *inputs[1:], trunc=TAU)
        assert not any(result.requires_grad for result in fixed)
        v_r, v_1, _ = leaves = [x.detach().requires_grad_() for x in inputs[2:5]]
        t = inputs[1].detach().requires_grad_()
        self_reflow(v_r, v_1, t).backward()
        assert [x.grad is None for x in (*leaves, t)] == [False, True, True, True]
        assert not self_reflow(v_r.detach(), v_1, t).requires_grad


@BACKENDS
def test_backward_does_not_walk_what_made_the_targets(backend):
    """Targets made under a graph (a student's velocity at t = 1 is) are constants."""
    weight = torch.ones(2, requires_grad=True)
    walked = []

    def made(x):
        x = x * weight[0]
        x.register_hook(walked.append)
        return x

    inputs = operands(TIMES["inside"])
    for index in (2, 3, 5, 7, 8):
        inputs[index] = made(inputs[index])
    v = inputs[0].requires_grad_()
    with flowkernels.backend(backend):
        self_corrected(*inputs, trunc=TAU)[0].backward()
        self_reflow(v, made(v.detach()), inputs[1]).backward()
    assert not walked
    assert weight.grad is None


@pytest.mark.parametrize("index", range(1, 9))
def test_forward_mode_over_a_constant_is_refused_not_lost(index):
    inputs = operands(TIMES["inside"])
    with forward_ad.dual_level():
        inputs[index] = forward_ad.make_dual(inputs[index], torch.ones_like(inputs[index]))
        with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
            self_corrected(*inputs, trunc=TAU)
        if inputs[index].dim() == 1:
            with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
                self_reflow(inputs[0], inputs[0], inputs[index])


@interpretable
@BACKENDS
@REDUCTIONS
def test_parts_and_reductions_belong_together(backend, reduction):
    """total = consistency + lam_bi·bidirectional; mean = Σ_b ℓ_b / B; sum = Σ elements."""
    inputs = operands(TIMES["inside"])
    with flowkernels.backend(backend):
        total, consistency, bidirectional = self_corrected(
            *inputs, trunc=TAU, lam_bi=0.3, reduction=reduction
        )
        each = self_corrected(*inputs, trunc=TAU, reduction="none")[1]
        alone = evaluate(self_corrected, inputs, trunc=TAU, lam_bi=0.0, reduction=reduction)
        other = [*inputs[:5], inputs[5] + 1, *inputs[6:]]
        unlike = evaluate(self_corrected, other, trunc=TAU, lam_bi=0.0, reduction=reduction)
    torch.testing.assert_close(total, consistency + 0.3 * bidirectional)
    expected = {"mean": each.sum() / 3, "none": each, "sum": each.sum() * WIDTH}[reduction]
    torch.testing.assert_close(consistency, expected)
    # Without its weight the bidirectional term is reported, and moves nothing.
    torch.testing.assert_close(alone[0], consistency)
    torch.testing.assert_close(alone[2], bidirectional)
    assert not torch.equal(alone[2], unlike[2])
    assert torch.equal(alone[3], unlike[3])


@interpretable
@BACKENDS
def test_a_straight_flow_has_no_loss_and_no_gradient(backend):
    """Every velocity is noise - x0: every neighbour has the same endpoint, exactly."""
    inputs = operands([*TIMES["inside"], *TIMES["t = 1"]])
    x0, noise = inputs[7].bfloat16().float(), inputs[8].bfloat16().float()
    straight = (noise - x0).half().float()
    x0 = noise - straight
    inputs = [straight if i in (0, 2, 3, 5) else x for i, x in enumerate(inputs)]
    inputs[7:] = [x0, noise]
    with flowkernels.backend(backend):
        *results, gradient = evaluate(self_corrected, inputs, trunc=TAU)
    # x0 is rounded once more, which is all that is left.
    assert all(result.abs() <= 1e-12 for result in results)
    assert gradient.abs().max() <= 1e-4 / gradient.numel()


@REDUCTIONS
@pytest.mark.parametrize("t", [[0.3, 0.8], [0.0, 1.0], [1e-7, 0.5]])
def test_self_reflow_is_the_literal_form(reduction, t):
    torch.manual_seed(0)
    v_r, v_1, noise = torch.randn(3, 2, 50, dtype=torch.float64)
    t = torch.tensor(t, dtype=torch.float64)
    a, b = v_r.clone().requires_grad_(), v_r.clone().requires_grad_()
    ours = self_reflow(a, v_1, t, reduction=reduction)
    truth = reference.self_reflow_literal(b, v_1, t, noise, reduction)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-13)
    ours.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


@interpretable
@BACKENDS
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e-2, 1.0, 1e6])
@pytest.mark.parametrize("c", [1e-3, 0.01, 10.0])
def test_pseudo_huber_keeps_its_digits(backend, size, c):
    """√(d² + c²) - c in float32 is 0 for d below 1e-4·c; value and slope are right to rounding."""
    torch.manual_seed(0)
    d = (size * torch.randn(2, 300)).requires_grad_()
    with flowkernels.backend(backend):
        loss = pseudo_huber(d, torch.zeros(2, 300), c=c)
        (gradient,) = torch.autograd.grad(loss, d)
    exact = d.detach().double()
    root = torch.hypot(exact, torch.tensor(c, dtype=torch.float64))
    torch.testing.assert_close(loss.double(), (exact**2 / (root + c)).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact / root / 600, rtol=1e-6, atol=0)


@interpretable
@BACKENDS
@pytest.mark.parametrize("c", [1e-18, 1e18])
def test_pseudo_huber_at_the_ends_of_c(backend, c):
    x = torch.tensor([[0.0, c, -3 * c]], requires_grad=True)
    with flowkernels.backend(backend):
        loss = pseudo_huber(x, torch.zeros(1, 3), c=c, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss / c, torch.tensor(2**0.5 + 10**0.5 - 2), rtol=1e-5, atol=0)
    expected = torch.tensor([[0.0, 0.5**0.5, -3 / 10**0.5]])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


LOSSES = {
    "self_corrected": lambda v, inputs: self_corrected(v, *inputs[1:], trunc=TAU)[0],
    "self_reflow": lambda v, inputs: self_reflow(v, inputs[2], inputs[1]),
    "pseudo_huber": lambda v, inputs: pseudo_huber(v, inputs[2]),
}
BY_LOSS = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


@interpretable
@BACKENDS
@BY_LOSS
def test_float16_gradients_survive_a_grad_scaler(backend, loss_of):
    """t/(n·B) is below float16's least number, 6e-8, for a large image."""
    inputs = [0.01 * x.half() if x.dim() == 2 else x for x in operands(TIMES["inside"])]
    exact = [x.float() for x in inputs]
    found = []
    with flowkernels.backend(backend):
        for given in (inputs, exact):
            v = given[0].clone().requires_grad_()
            found += torch.autograd.grad(loss_of(v, given), v, torch.tensor(65536.0))
    assert found[0].dtype == torch.float16
    # Half of float16's spacing, relative, and of its subnormals' at the zeros.
    torch.testing.assert_close(found[0].float(), found[1], rtol=2**-10, atol=2**-24)


@interpretable
@BACKENDS
@BY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_backward_leaves_the_first_gradient_alone(backend, loss_of, dtype):
    inputs = operands(TIMES["inside"], dtype)
    v = inputs[0].requires_grad_()
    with flowkernels.backend(backend):
        loss = loss_of(v, inputs)
        (first,) = torch.autograd.grad(loss, v, torch.tensor(3.0), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, v, torch.tensor(-2.0), retain_graph=True)
        (again,) = torch.autograd.grad(loss, v, torch.tensor(3.0))
    assert torch.equal(first, kept)
    assert torch.equal(again, kept)
    # One rounding each to dtype, and a handful in float32 before it.
    error = (second.float() * -1.5 - first.float()).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * first.float().abs().max()


@interpretable
@BACKENDS
@BY_LOSS
def test_empty_batch(backend, loss_of):
    inputs = [x[:0] for x in operands(TIMES["inside"])]
    v = inputs[0].requires_grad_()
    with flowkernels.backend(backend):
        loss = loss_of(v, inputs)
        assert loss.isnan()
        loss.backward()
    assert v.grad.shape == (0, WIDTH)
