"""AdamWEMA's state: saved and loaded bit for bit, exchanged with torch's AdamW, copied, pickled."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from flowkernels.optim import AdamWEMA
from tests.optim.helpers import (
    assert_same_bits,
    clone_params,
    make_params,
    run,
    set_grads,
    snapshot,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "ema_decays": (0.9, 0.99), "max_grad_norm": 0.5}


def trained(dtype=torch.float32, steps=3, **settings):
    params = make_params(dtype)
    optimizer = AdamWEMA(params, **{**SETTINGS, **settings})
    run(params, optimizer, range(steps))
    return params, optimizer


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_round_trip_is_bitwise(dtype, beta1):
    params, optimizer = trained(dtype, betas=(beta1, 0.99))
    params[0].grad[0, 0] = float("nan")
    optimizer.step()  # a skipped step is state too
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = clone_params(params)
    other = AdamWEMA(twins, **{**SETTINGS, "betas": (beta1, 0.99)})
    other.load_state_dict(torch.load(file))
    assert_same_bits(list(other.state.values()), list(optimizer.state.values()))
    assert int(other.skipped) == 1
    run(params, optimizer, range(4, 6))
    run(twins, other, range(4, 6))
    assert_same_bits([twins, list(other.state.values())], [params, list(optimizer.state.values())])


def test_loaded_state_shares_no_memory():
    params, optimizer = trained()
    saved = optimizer.state_dict()
    twins = clone_params(params)
    other = AdamWEMA(twins, **SETTINGS)
    other.load_state_dict(saved)
    before = snapshot(list(optimizer.state.values()), optimizer.skipped)
    run(twins, other, range(3, 5))
    assert_same_bits([list(optimizer.state.values()), optimizer.skipped], before)


def test_learning_rate_tensor_and_scheduler_survive():
    params = make_params()
    optimizer = AdamWEMA(params, torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    run(params, optimizer, range(2), after=schedule.step)
    twins = clone_params(params)
    other = AdamWEMA(twins, torch.tensor(1.0))
    other.load_state_dict(optimizer.state_dict())
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.025)
    assert other.param_groups[0]["lr"] is not optimizer.param_groups[0]["lr"]
    assert other.param_groups[0]["initial_lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_state_goes_to_torch_adamw_and_on(beta1, dtype):
    settings = {"lr": 1e-2, "betas": (beta1, 0.99), "weight_decay": 0.1}
    params = make_params(dtype)
    optimizer = AdamWEMA(params, **settings, ema_decays=(0.9,))
    run(params[:4], optimizer, range(1))  # steps differ from parameter to parameter
    run(params, optimizer, range(1, 3))
    twins = clone_params(params)
    other = torch.optim.AdamW(twins, 0.5)
    other.load_state_dict(optimizer.to_adamw_state_dict())
    assert other.param_groups[0]["lr"] == 1e-2
    assert float(other.state[twins[0]]["step"]) == 3.0
    assert float(other.state[twins[4]]["step"]) == 2.0
    if beta1 == 0.0:
        assert not other.state[twins[0]]["exp_avg"].any()
    before = snapshot(list(optimizer.state.values()))
    for step in range(3, 6):
        set_grads(step, twins)
        other.step()
    assert_same_bits(list(optimizer.state.values()), before)  # all copies
    run(params, optimizer, range(3, 6))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("source", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_state_comes_from_torch_adamw_and_goes_on(beta1, source):
    params = make_params()
    other = source(params, 1e-2, betas=(beta1, 0.99), weight_decay=0.0)
    run(params, other, range(3))
    twins = clone_params(params)
    optimizer = AdamWEMA(twins, 0.5, ema_decays=(0.9,))
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for twin, param in zip(twins, params, strict=True):
        state = optimizer.state[twin]
        assert_same_bits(state["exp_avg_sq"], other.state[param]["exp_avg_sq"])
        assert_same_bits(state["ema_0"], twin)  # averages start from the parameters
        assert ("exp_avg" in state) == (beta1 > 0)
        assert float(state["step"]) == 3.0
    before = snapshot([other.state[p] for p in params])
    run(twins, optimizer, range(3, 6))
    assert_same_bits([other.state[p] for p in params], before)
    run(params, other, range(3, 6))
    for a, b in zip(twins, params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_adamw_state_of_bfloat16_parameters_is_kept_in_float32():
    params, optimizer = trained(torch.bfloat16)
    saved = optimizer.to_adamw_state_dict()
    twins = clone_params(params)
    other = AdamWEMA(twins, 1e-2)
    other.load_state_dict(saved)
    for twin, param in zip(twins, params, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert other.state[twin][key].dtype == torch.float32
            assert_same_bits(other.state[twin][key], optimizer.state[param][key])


def test_state_that_does_not_fit_is_refused():
    params, optimizer = trained()
    twins = clone_params(params)
    fresh = AdamWEMA(twins, 1e-2, ema_decays=(0.9,))
    with pytest.raises(ValueError, match="ema_decays: the state holds ema_1"):
        fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="got 7 parameters in group 0"):
        AdamWEMA(twins[:2], 1e-2).load_state_dict(optimizer.state_dict())
    groups = [{"params": twins[:2]}, {"params": twins[2:]}]
    others = [torch.zeros(5, requires_grad=True), *twins[1:]]
    with pytest.raises(ValueError, match="parameter groups"):
        AdamWEMA(groups, 1e-2).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(3, 5\) for a parameter of shape \(5,\)"):
        AdamWEMA(others, 1e-2, ema_decays=(0.9, 0.9)).load_state_dict(optimizer.state_dict())
    assert len(fresh.state) == 0  # nothing was half loaded


@pytest.mark.parametrize(
    ("option", "message"), [({"amsgrad": True}, "amsgrad"), ({"maximize": True}, "maximize")]
)
def test_adamw_variants_are_refused(option, message):
    params = make_params()
    other = torch.optim.AdamW(params, 1e-2, **option)
    run(params, other, range(1))
    with pytest.raises(ValueError, match=message):
        AdamWEMA(clone_params(params), 1e-2).load_state_dict(other.state_dict())


def test_coupled_weight_decay_and_foreign_state_are_refused():
    params = make_params()
    for other, message in (
        (torch.optim.Adam(params, 1e-2, weight_decay=0.1), "decoupled_weight_decay"),
        (torch.optim.SGD(params, 1e-2, momentum=0.9), "momentum_buffer"),
    ):
        run(params, other, range(1))
        with pytest.raises(ValueError, match=message):
            AdamWEMA(clone_params(params), 1e-2).load_state_dict(other.state_dict())


def test_load_state_dict_hooks_run():
    params, optimizer = trained()
    other = AdamWEMA(clone_params(params), **SETTINGS)
    seen = []
    other.register_load_state_dict_pre_hook(lambda each, state: seen.append("before"))
    other.register_load_state_dict_post_hook(lambda each: seen.append("after"))
    other.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_an_optimiser_are_whole(way):
    masters = make_params()
    halves = [p.detach().bfloat16() for p in masters]
    optimizer = AdamWEMA(masters, **SETTINGS, grad_scale=2.0, low_precision_copies=halves)
    run(masters, optimizer, range(2))
    whole = (masters, halves, optimizer)
    twins, twin_halves, other = (
        copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    )
    before = snapshot(masters, halves, list(optimizer.state.values()))
    run(twins, other, range(2, 4))
    assert_same_bits([masters, halves, list(optimizer.state.values())], before)
    run(masters, optimizer, range(2, 4))
    assert_same_bits(
        [twins, twin_halves, list(other.state.values())],
        [masters, halves, list(optimizer.state.values())],
    )


BAD = [
    ({"lr": -1.0}, ValueError, "lr: got -1"),
    ({"lr": float("nan")}, ValueError, "lr: got nan"),
    ({"lr": "fast"}, TypeError, "lr: got 'fast'"),
    ({"lr": torch.ones(2)}, ValueError, "lr: got a"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr: got -1"),
    ({"betas": (1.0, 0.9)}, ValueError, "betas: got 1.0 at index 0"),
    ({"betas": (0.9, -0.1)}, ValueError, "betas: got -0.1 at index 1"),
    ({"betas": 0.9}, TypeError, "betas: got 0.9"),
    ({"eps": -1e-8}, ValueError, "eps: got"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay: got"),
    ({"ema_decays": (1.0,)}, ValueError, "ema_decays: got 1.0"),
    ({"ema_decays": (0.9, -0.1)}, ValueError, "ema_decays: got -0.1"),
    ({"ema_decays": "often"}, TypeError, "ema_decays: got 'often'"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm: got 0.0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: got -1.0"),
    ({"grad_scale": 0.0}, ValueError, "grad_scale: got 0.0"),
    ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale: got a"),
    ({"low_precision_copies": []}, ValueError, "low_precision_copies: got 0"),
    ({"low_precision_copies": [torch.ones(2)]}, ValueError, "low_precision_copies: got"),
    ({"low_precision_copies": [3]}, TypeError, "low_precision_copies: got int"),
]


@pytest.mark.parametrize(("setting", "error", "message"), BAD, ids=[str(b[2]) for b in BAD])
def test_bad_settings_are_named(setting, error, message):
    with pytest.raises(error, match=message):
        AdamWEMA(make_params(shapes=((3,),)), **{"lr": 1e-3, **setting})


def test_bad_parameters_and_gradients_are_named():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamWEMA([], 1e-3)
    with pytest.raises(TypeError, match=r"params: got dtype torch\.complex64"):
        AdamWEMA([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], 1e-3)
    param = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="appears twice"), pytest.warns(match="duplicate"):
        AdamWEMA([param, param], 1e-3)
    optimizer = AdamWEMA([param], 1e-3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    with pytest.raises(ValueError, match="eps: got -1"):
        optimizer.add_param_group({"params": make_params(), "eps": -1})
    assert len(optimizer.param_groups) == 1
    param.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"grad: got layout torch.sparse_coo, need strided"):
        optimizer.step()


def test_one_norm_needs_one_device():
    params = [torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True, device="meta")]
    for param in params:
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="are on cpu, meta"):
        AdamWEMA(params, 1e-3).step()
