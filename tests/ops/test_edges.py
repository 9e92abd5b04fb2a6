"""What callers do that is easy to get wrong, over all functions: empty gradients, forward mode,
repeated operands, changing numbers under torch.compile.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import flowkernels
from flowkernels.losses import fgm, flow_matching, interpolate
from flowkernels.ode import bellman_cost, euler_step, odeint, odeint_dense, sample, uniform
from flowkernels.ops import (
    gated_residual,
    gated_residual_norm,
    gelu_tanh,
    joint_attention,
    modulated_norm,
    swiglu,
)
from flowkernels.optim import AdamWEMA

ROWWISE = {
    "modulated_norm": lambda x: modulated_norm(x, x[:, 0], x[:, 0]),
    "gated_residual": lambda x: gated_residual(x, x, x[:, 0]),
    "gated_residual_norm": lambda x: gated_residual_norm(x, x, x[:, 0])[1],
    "gelu_tanh": gelu_tanh,
    "swiglu": swiglu,
}


@pytest.mark.parametrize("function", ROWWISE.values(), ids=ROWWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_an_empty_batch_has_a_gradient(function, dtype):
    """``sum()`` hands out a gradient of stride 0, which `contiguous()` leaves be when empty."""
    x = torch.empty(0, 3, 8, dtype=dtype, requires_grad=True)
    function(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("function", [gated_residual, gated_residual_norm])
def test_empty_sequence_gives_zero_gradients_to_the_modulation(function):
    x = torch.empty(2, 0, 8, requires_grad=True)
    gate = torch.ones(2, 8, requires_grad=True)
    out = function(x, x, gate)
    (out if isinstance(out, torch.Tensor) else sum(out)).sum().backward()
    assert torch.equal(gate.grad, torch.zeros(2, 8))


def _operands():
    torch.manual_seed(0)
    return [torch.randn(3, 8) for _ in range(4)], torch.rand(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: interpolate(x[0], t, x[1])[0],
        lambda x, t: interpolate(x[0], t, seed=1)[0],
        lambda x, t: flow_matching(*x[:3], weight=t),
        lambda x, t: fgm(*x, t, normalize="sid"),
        lambda x, t: fgm(*x, torch.ones(3), weight=t),
        lambda x, t: euler_step(x[0], x[1], t),
    ],
    ids=["interpolate", "seeded", "flow_matching", "fgm_t", "fgm_weight", "euler_step"],
)
def test_forward_mode_over_times_and_weights_is_refused_not_lost(function):
    x, t = _operands()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
            function(x, dual)
        with flowkernels.backend("reference"):
            function(x, dual)


def test_euler_step_works_under_transforms_on_the_reference():
    (x, v, *_), _ = _operands()
    with flowkernels.backend("reference"):
        _, tangent = torch.func.jvp(lambda v: euler_step(x, v, -0.5), (v,), (torch.ones_like(v),))
        batched = torch.func.vmap(lambda v: euler_step(x, v, -0.5))(torch.stack([v, x]))
    assert torch.equal(tangent, torch.full_like(v, -0.5))
    assert torch.equal(batched[1], x - 0.5 * x)


def _compiled(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


def test_compile_takes_one_tensor_for_two_operands():
    compiled, _ = _compiled(lambda x, m: gated_residual_norm(x, x, m, m, m))
    x, m = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    expected = gated_residual_norm(x, x, m, m, m)
    found = compiled(x, m)
    wanted = torch.autograd.grad(sum(out.sum() for out in expected), (x, m))
    grads = torch.autograd.grad(sum(out.sum() for out in found), (x, m))
    for ours, theirs in zip((*found, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compile_makes_one_graph_for_every_dt_and_seed():
    """A sampler's steps and a training loop's seeds change at each call."""
    step, steps = _compiled(lambda x, v, dt: euler_step(x, v, dt))
    x, v = torch.randn(2, 3, 8).unbind(0)
    for dt in (-0.5, -0.25, -0.125, -0.1):
        torch.testing.assert_close(step(x, v, dt), euler_step(x, v, dt))
    assert steps.frame_count == 1
    noised, seeds = _compiled(interpolate)
    t = torch.rand(3)
    for seed, offset in ((3, 4), (5, 6), (2**40, 7)):
        ours, theirs = (f(x, t, seed=seed, offset=offset) for f in (noised, interpolate))
        assert torch.equal(ours[1], theirs[1])
    assert seeds.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_seeded_noise_is_the_same_for_every_layout(dtype):
    x0, t = torch.randn(2, 3, 4, 5, dtype=dtype), torch.rand(2)
    _, expected = interpolate(x0.float() if dtype == torch.float64 else x0, t, seed=9, offset=2)
    last = x0.contiguous(memory_format=torch.channels_last)
    x_t, noise = interpolate(last, t, seed=9, offset=2)
    assert noise.dtype == dtype
    assert torch.equal(noise, expected.to(dtype))
    assert torch.equal(x_t, interpolate(last, t, noise)[0])


def test_euler_step_refuses_an_out_that_overlaps_in_part():
    memory, v = torch.randn(13), torch.randn(3, 4)
    x, out = memory[:-1].view(3, 4), memory[1:].view(3, 4)
    with pytest.raises(ValueError, match=r"^out: overlaps"):
        euler_step(x, v, -0.5, out=out)


def test_euler_step_tells_autograd_that_out_was_written():
    x, v = torch.ones(2, 3), torch.ones(2, 3)
    w = torch.ones(2, 3, requires_grad=True)
    product = (w * x).sum()
    euler_step(x, v, -0.5, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("value", [None, "a", [1.0], torch.ones(2)], ids=str)
def test_numbers_are_named_where_they_are_none(value):
    x, t = _operands()
    rows = torch.randn(1, 3, 8)
    for name, call in {
        "eps": lambda: modulated_norm(rows, eps=value),
        "lam": lambda: fgm(*x, t, lam=value),
        "guidance": lambda: euler_step(x[0], x[1], -0.5, v_uncond=x[2], guidance=value),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: got .*need a number$"):
            call()


@pytest.mark.parametrize("value", [-1e30, -60.0, 60.0, 1e30])
def test_activation_gradients_in_the_far_tails(value: float):
    """Where the gate is 0 or 1 to every digit, so is its share of the gradient: no 0·∞, no loss."""
    x = torch.tensor([[value, 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(swiglu(x).sum(), x)
    expected = [0.0, 0.0] if value < 0 else [2.0, value]
    torch.testing.assert_close(gradient, torch.tensor([expected]), rtol=1e-6, atol=1e-20)
    u = torch.tensor([value], requires_grad=True)
    (gradient,) = torch.autograd.grad(gelu_tanh(u).sum(), u)
    torch.testing.assert_close(gradient, torch.tensor([float(value > 0)]), rtol=0, atol=0)


# ---- what the process or the caller has set ------------------------------------------------------


def test_autocast_does_not_reach_second_order_gradients():
    q, k, v = torch.randn(3, 2, 7, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    q = q.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = joint_attention((q, k, v)).square().sum()
        (first,) = torch.autograd.grad(out, q, retain_graph=True)
        (graphed,) = torch.autograd.grad(out, q, create_graph=True)
    torch.testing.assert_close(graphed, first, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_reach_products_of_solvers():
    velocities = torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    dense = (lambda t, y: -y, torch.ones(2), torch.tensor(0.0), torch.tensor(1.0))
    at = torch.tensor(0.37)
    cost, state = bellman_cost(velocities, uniform(6)), odeint_dense(*dense)(at)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bellman_cost(velocities, uniform(6)), cost)
        torch.testing.assert_close(odeint_dense(*dense)(at), state, rtol=1e-6, atol=1e-7)


def test_seeded_noise_under_another_default_dtype():
    x0, t = torch.zeros(2, 3, 4).transpose(1, 2), torch.rand(2)
    _, noise = interpolate(x0, t, seed=1, return_noise=True)
    torch.set_default_dtype(torch.float64)
    try:
        again = interpolate(x0, t, seed=1, return_noise=True)[1]
        interpolate(torch.zeros(2, 3), t, seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, noise)


def test_another_default_device():
    x, lin, velocities = torch.randn(3, 2), torch.linspace(0, 1, 3), torch.randn(4, 3, 2)
    decay = lambda t, y: -y  # noqa: E731
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.grad = torch.ones(3)
    optimizer = AdamWEMA([parameter], 1e-2)
    optimizer.step()
    torch.set_default_device("meta")
    try:
        schedule = uniform(4)
        made = [
            sample(lambda x, t: x * t[:, None], x, schedule),
            odeint(decay, x, lin, options={"per_sample": True}),
            odeint(decay, x, lin, method="scipy_solver"),
            odeint_dense(decay, x, lin[0], lin[1])(lin[1]),
            bellman_cost(velocities, schedule),
        ]
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_device(None)
    assert {each.device.type for each in made} == {"cpu"}
    assert optimizer.state[parameter]["step"].device.type == "cpu"


def test_attention_on_meta_tensors():
    q = torch.empty(2, 3, 2, 4, device="meta")
    assert joint_attention((q, q, q)).shape == (2, 3, 8)


def test_large_scores_are_no_nan():
    """A score's product and the largest one's subtraction are one rounding, its maximum two."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 2, 8, generator=draw).unbind(0)
    for scale in (1e5, 1e12, 1e30):
        ours = joint_attention((q * 1e3, k, v), scale=scale).unflatten(-1, (2, 8))
        heads = [(x * 1e3 if x is q else x).transpose(1, 2) for x in (q, k, v)]
        theirs = F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_scales_of_fgm_are_finite(value):
    v, rest = torch.randn(4, 3, requires_grad=True), torch.randn(3, 4, 3).unbind(0)
    with pytest.raises(ValueError, match="lam: got"):
        fgm(v, *rest, torch.rand(4), lam=value)
    with pytest.raises(ValueError, match="guidance: got"):
        fgm(v, *rest, torch.rand(4), u_uncond=rest[0], guidance=value)


def test_numbers_that_want_a_gradient_are_refused_not_lost():
    learned = torch.tensor(0.5, requires_grad=True)
    x, q = torch.randn(2, 3), torch.randn(1, 3, 1, 4)
    for name, call in {
        "scale": lambda s: joint_attention((q, q, q), scale=s),
        "guidance": lambda s: euler_step(x, x, 0.1, v_uncond=x, guidance=s),
        "lam": lambda s: fgm(x, x, x, x, torch.rand(2), lam=s),
        "eps": lambda s: modulated_norm(x[None], eps=s),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: got a tensor that requires a gradient"):
            call(learned)
        with torch.no_grad():
            call(learned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_short_times_are_the_same_under_create_graph(dtype):
    x = torch.randn(2, 3, requires_grad=True)
    t = torch.tensor([0.001, 0.3], dtype=dtype)
    dt = torch.tensor(-0.02, dtype=dtype)
    for out in (
        interpolate(x, t, torch.zeros(2, 3))[0].sum(),
        euler_step(torch.zeros(2, 3), x, dt, v_uncond=torch.zeros(2, 3), guidance=7.3).sum(),
    ):
        plain, graphed = (
            torch.autograd.grad(out, x, retain_graph=True, create_graph=graph)[0]
            for graph in (False, True)
        )
        torch.testing.assert_close(graphed, plain, rtol=1e-6, atol=0)
