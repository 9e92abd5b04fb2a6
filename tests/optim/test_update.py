"""One step of AdamWEMA: against torch's AdamW, clipping and EMAs, in every way it can be asked."""

from __future__ import annotations

import pytest
import torch

from flowkernels.optim import AdamWEMA
from tests.optim.helpers import (
    assert_no_worse,
    assert_same_bits,
    clone_params,
    make_params,
    run,
    set_grads,
    snapshot,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_equals_torch_adamw_in_float32(beta1, weight_decay):
    ours = make_params()
    theirs, truth = clone_params(ours), clone_params(ours, torch.float64)
    settings = {"lr": 1e-2, "betas": (beta1, 0.99), "weight_decay": weight_decay}
    optimizer = AdamWEMA(ours, **settings)
    others = [torch.optim.AdamW(params, **settings) for params in (theirs, truth)]
    for step in range(7):
        set_grads(step, ours, theirs, truth)
        for each in (optimizer, *others):
            each.step()
    assert_no_worse(ours, theirs, truth)
    for moment in ("exp_avg", "exp_avg_sq")[beta1 == 0 :]:
        found = [
            [each.state[p][moment] for p in params]
            for each, params in zip((optimizer, *others), (ours, theirs, truth), strict=True)
        ]
        assert_no_worse(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_state(dtype):
    """Against AdamW on float32 masters that are rounded to the parameter's dtype in each step."""
    ours = make_params(dtype)
    masters = clone_params(ours, torch.float32)
    optimizer = AdamWEMA(ours, 1e-2, weight_decay=0.1, ema_decays=(0.9,))
    other = torch.optim.AdamW(masters, 1e-2, weight_decay=0.1)
    for step in range(5):
        set_grads(step, ours, masters)
        optimizer.step()
        other.step()
        with torch.no_grad():
            for param, master in zip(ours, masters, strict=True):
                # A float32 difference may tip a rounding: at most one unit in the last place.
                torch.testing.assert_close(
                    param.float(), master, rtol=torch.finfo(dtype).eps, atol=1e-7
                )
                master.copy_(param)
    for param in ours:
        state = optimizer.state[param]
        assert {state[key].dtype for key in state} == {torch.float32}


def test_float64_parameters_have_float64_state():
    ours = make_params(torch.float64)
    theirs = clone_params(ours)
    optimizer = AdamWEMA(ours, 1e-2, weight_decay=0.1, ema_decays=(0.9,), max_grad_norm=0.5)
    other = torch.optim.AdamW(theirs, 1e-2, weight_decay=0.1)
    for step in range(5):
        set_grads(step, ours, theirs)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)  # orders of rounding differ
        assert optimizer.state[a]["exp_avg_sq"].dtype == torch.float64
        assert optimizer.state[a]["ema_0"].dtype == torch.float64


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clips_like_clip_grad_norm(max_norm):
    ours = make_params()
    theirs, truth = clone_params(ours), clone_params(ours, torch.float64)
    optimizer = AdamWEMA(ours, 1e-2, max_grad_norm=max_norm)
    others = [torch.optim.AdamW(params, 1e-2, weight_decay=0.0) for params in (theirs, truth)]
    for step in range(5):
        set_grads(step, ours, theirs, truth)
        norms = [torch.nn.utils.clip_grad_norm_(params, max_norm) for params in (theirs, truth)]
        for each in (optimizer, *others):
            each.step()
        assert optimizer.grad_norm.shape == ()
        assert optimizer.grad_norm.dtype == torch.float32
        assert_no_worse([optimizer.grad_norm], [norms[0]], [norms[1]])
    assert_no_worse(ours, theirs, truth)


def test_averages_follow_the_formula():
    params = make_params()
    decays = (0.9, 0.999, 0.3, 0.0)
    optimizer = AdamWEMA(params, 1e-2, ema_decays=decays)
    expected = [[p.detach().clone() for p in params] for _ in decays]

    def follow():
        for decay, averages in zip(decays, expected, strict=True):
            torch._foreach_lerp_(averages, [p.detach() for p in params], 1 - decay)

    run(params, optimizer, range(6), after=follow)
    for k, averages in enumerate(expected):
        for param, average in zip(params, averages, strict=True):
            found = optimizer.state[param][f"ema_{k}"]
            # One fused multiply-add against two roundings, six times.
            torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-6)
    assert_same_bits([optimizer.state[p]["ema_3"] for p in params], params)


def test_beta1_zero_keeps_no_first_moment():
    params = make_params()
    optimizer = AdamWEMA(params, 1e-2, betas=(0.0, 0.999))
    run(params, optimizer, range(2))
    assert all("exp_avg" not in optimizer.state[p] for p in params)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)  # a moment appears when it is needed,
    run(params, optimizer, range(1))
    assert all("exp_avg" in optimizer.state[p] for p in params)
    optimizer.param_groups[0]["betas"] = (0.0, 0.999)  # and goes when it is not
    run(params, optimizer, range(1))
    assert all("exp_avg" not in optimizer.state[p] for p in params)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nonfinite_gradient_changes_no_bit(dtype, bad):
    params = make_params(dtype)
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    optimizer = AdamWEMA(
        [{"params": params[:3]}, {"params": params[3:]}], 1e-2, ema_decays=(0.9,),
        max_grad_norm=1.0, low_precision_copies=copies,
    )  # fmt: skip
    run(params, optimizer, range(2))
    before = snapshot(params, list(optimizer.state.values()), copies)
    set_grads(2, params)
    params[4].grad[-1, -1] = bad
    optimizer.step()
    assert_same_bits([params, list(optimizer.state.values()), copies], before)
    assert int(optimizer.skipped) == 1
    assert not torch.isfinite(optimizer.grad_norm)
    assert all(float(optimizer.state[p]["step"]) == 2.0 for p in params)
    run(params, optimizer, [3])  # and goes on as if nothing had happened
    assert all(float(optimizer.state[p]["step"]) == 3.0 for p in params)
    assert int(optimizer.skipped) == 1


def test_large_finite_gradient_is_not_skipped():
    params = make_params()
    optimizer = AdamWEMA(params, 1e-2, max_grad_norm=1.0)
    set_grads(0, params, scale=1e30)  # its square overflows float32
    optimizer.step()
    assert int(optimizer.skipped) == 0
    assert torch.isfinite(optimizer.grad_norm)
    assert all(torch.isfinite(p).all() for p in params)


def test_without_norm_a_nan_spoils_its_own_place_only():
    params = make_params()
    optimizer = AdamWEMA(params, 1e-2, skip_nonfinite=False)
    set_grads(0, params)
    params[4].grad[5, 2] = float("nan")
    optimizer.step()
    assert optimizer.grad_norm.isnan()  # not computed
    wrong = [p.isnan() for p in params]
    assert sum(int(w.sum()) for w in wrong) == 1
    assert wrong[4][5, 2]


def test_norm_pass_is_left_out_where_nobody_asks(monkeypatch):
    from flowkernels.ops import multi_tensor

    monkeypatch.setattr(multi_tensor, "grad_norm", lambda *a, **k: pytest.fail("norm computed"))
    params = make_params()
    run(params, AdamWEMA(params, 1e-2, skip_nonfinite=False, ema_decays=(0.9,)), range(2))


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_grad_scale_divides_gradients_before_everything(kind):
    scale = 1024.0  # a power of two: exact
    plain, scaled = make_params(), make_params()
    settings = {"lr": 1e-2, "max_grad_norm": 0.5, "ema_decays": (0.9,)}
    first = AdamWEMA(plain, **settings)
    given = scale if kind == "float" else torch.tensor(scale)
    second = AdamWEMA(scaled, **settings, grad_scale=given)
    for step in range(3):
        set_grads(step, plain)
        set_grads(step, scaled, scale=scale)
        first.step()
        second.step()
        assert_same_bits(second.grad_norm, first.grad_norm)
    assert_same_bits([scaled, list(second.state.values())], [plain, list(first.state.values())])
    second.grad_scale = None  # may change between steps
    set_grads(3, plain, scaled)
    first.step()
    second.step()
    assert_same_bits(scaled, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_learning_rate_tensor_is_read_in_each_step(dtype):
    rates = [0.5, 0.25, 0.125]  # exact in every dtype
    plain, tensor = make_params(), make_params()
    first = AdamWEMA(plain, 1.0, weight_decay=0.1)
    second = AdamWEMA(tensor, torch.tensor(1.0, dtype=dtype), weight_decay=0.1)
    for step, rate in enumerate(rates):
        first.param_groups[0]["lr"] = rate
        second.param_groups[0]["lr"].fill_(rate)
        set_grads(step, plain, tensor)
        first.step()
        second.step()
    assert_same_bits(tensor, plain)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_learning_rate_schedulers_work(lr):
    params, other = make_params(), make_params()
    optimizer = AdamWEMA(params, lr, ema_decays=(0.9,))
    reference = torch.optim.AdamW(other, 0.1, weight_decay=0.0)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, 10) for each in (optimizer, reference)
    ]
    for step in range(5):
        set_grads(step, params, other)
        for each, schedule in zip((optimizer, reference), schedules, strict=True):
            each.step()
            schedule.step()
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # rate in float32 against float64


@pytest.mark.parametrize("copy_dtype", DTYPES)
def test_low_precision_copies_are_the_rounded_masters(copy_dtype):
    masters = make_params()
    copies = [p.detach().to(copy_dtype, copy=True).requires_grad_() for p in masters]
    optimizer = AdamWEMA(masters, 1e-2, low_precision_copies=copies)
    run(masters, optimizer, range(3))
    assert_same_bits(copies, [p.detach().to(copy_dtype) for p in masters])


def test_masters_take_the_gradients_of_their_copies():
    masters, plain = make_params(), make_params()
    copies = [p.detach().bfloat16().requires_grad_() for p in masters]
    copies[1] = None
    optimizer = AdamWEMA(masters, 1e-2, low_precision_copies=copies, max_grad_norm=1.0)
    other = AdamWEMA(plain, 1e-2, max_grad_norm=1.0)
    for step in range(3):
        set_grads(step, masters, plain)
        for master, copy, twin in zip(masters, copies, plain, strict=True):
            if copy is not None:
                copy.grad, master.grad = master.grad.bfloat16(), None
                twin.grad = copy.grad.float()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        assert all(copy is None or copy.grad is None for copy in copies)
    assert_same_bits(masters, plain)


def test_parameters_without_gradient_are_left_alone_but_averaged():
    params = make_params()
    optimizer = AdamWEMA(params, 1e-2, ema_decays=(0.5,), weight_decay=0.1)
    run(params, optimizer, range(2))
    set_grads(2, params)
    params[0].grad = None
    before = snapshot(params[0], optimizer.state[params[0]])
    average = optimizer.state[params[0]]["ema_0"].clone()
    optimizer.step()
    assert_same_bits(params[0], before[0])
    assert float(optimizer.state[params[0]]["step"]) == 2.0
    assert float(optimizer.state[params[1]]["step"]) == 3.0
    expected = torch.lerp(average, params[0].detach(), 0.5)
    torch.testing.assert_close(optimizer.state[params[0]]["ema_0"], expected)
    params[1].grad[3] = float("nan")  # a skipped step leaves idle averages too
    before = snapshot(optimizer.state[params[0]])
    optimizer.step()
    assert_same_bits(optimizer.state[params[0]], before)


def test_never_a_gradient_never_a_state():
    params = make_params()
    optimizer = AdamWEMA(params, 1e-2, ema_decays=(0.5,))
    assert optimizer.step() is None
    assert len(optimizer.state) == 0


def test_closure():
    params = make_params(shapes=((4,),))
    optimizer = AdamWEMA(params, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_groups_have_their_own_settings_and_one_norm():
    ours = make_params()
    theirs = clone_params(ours)

    def groups(params):
        return [
            {"params": params[:2], "lr": 1e-2, "betas": (0.5, 0.9)},
            {"params": params[2:], "weight_decay": 0.1, "eps": 1e-6},
        ]

    optimizer = AdamWEMA(groups(ours), 1e-3, max_grad_norm=0.5)
    other = torch.optim.AdamW(groups(theirs), 1e-3, weight_decay=0.0)
    for step in range(4):
        set_grads(step, ours, theirs)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_add_param_group_during_training():
    params = make_params()
    optimizer = AdamWEMA(params[:3], 1e-2, ema_decays=(0.9,))
    run(params[:3], optimizer, range(2))
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params[3:]]
    optimizer.add_param_group(
        {"params": params[3:], "lr": 1e-3, "low_precision_copies": copies}
    )  # fmt: skip
    run(params, optimizer, range(2, 4))
    assert float(optimizer.state[params[0]]["step"]) == 4.0
    assert float(optimizer.state[params[4]]["step"]) == 2.0
    assert_same_bits(copies, [p.detach().bfloat16() for p in params[3:]])
    alone = clone_params(make_params()[3:])
    other = torch.optim.AdamW(alone, 1e-3, weight_decay=0.0)
    for step in range(2, 4):
        set_grads(step, params)
        for a, b in zip(alone, params[3:], strict=True):
            a.grad = b.grad
        other.step()
    for a, b in zip(params[3:], alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
