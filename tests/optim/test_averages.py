"""Averages as a model's weights: AdamWEMA's, and EMA alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flowkernels
from flowkernels.optim import EMA, AdamWEMA
from tests.optim.helpers import NoHostSync, assert_same_bits, make_params, same_bits, snapshot


class Model(nn.Module):
    """A tied weight, a buffer, a frozen parameter, and one that never gets a gradient."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 6, bias=False)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2))
        self.to(dtype)

    def forward(self, x):
        return self.body(self.embed(x)) + self.head(x)


def train(model, optimizer, steps=3, after=lambda: None):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, dtype=model.unused.dtype)
        model(x).square().mean().backward()
        optimizer.step()
        after()


def trained(dtype=torch.float32, decays=(0.5, 0.9)):
    model = Model(dtype)
    optimizer = AdamWEMA(
        [p for p in model.parameters() if p.requires_grad], 1e-2, ema_decays=decays
    )
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ema_state_dict_has_averages_for_owned_parameters(dtype):
    model, optimizer = trained(dtype)
    for i in (0, 1):
        state = optimizer.ema_state_dict(model, i)
        assert list(state) == list(model.state_dict())
        for name, value in model.state_dict(keep_vars=True).items():
            found = state[name]
            assert found.dtype == value.dtype
            assert not found.requires_grad
            average = optimizer.state.get(value, {}).get(f"ema_{i}")
            assert_same_bits(found, value if average is None else average.to(dtype))
        assert not same_bits(state["embed.weight"], model.embed.weight)
        assert state["embed.weight"] is state["head.weight"]  # tied stays tied
        Model(dtype).load_state_dict(state)


def test_ema_state_dict_is_a_copy():
    model, optimizer = trained()
    state = optimizer.ema_state_dict(model, 0)
    before = state["embed.weight"].clone()
    train(model, optimizer, 1)
    assert_same_bits(state["embed.weight"], before)


def test_ema_state_dict_of_a_model_of_copies():
    """The model runs in bfloat16; the optimiser has its float32 masters."""
    model = Model().to(torch.bfloat16)
    halves = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().requires_grad_() for p in halves]
    optimizer = AdamWEMA(masters, 1e-2, ema_decays=(0.5,), low_precision_copies=halves)
    train(model, optimizer)
    state = optimizer.ema_state_dict(model, 0)
    master = next(m for m, h in zip(masters, halves, strict=True) if h is model.embed.weight)
    average = optimizer.state[master]["ema_0"]
    assert_same_bits(state["embed.weight"], average.bfloat16())
    before = snapshot(list(model.parameters()), masters)
    with optimizer.swap_ema(0):
        assert_same_bits(model.embed.weight, average.bfloat16())
    assert_same_bits([list(model.parameters()), masters], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_swap_and_back_is_bitwise(dtype):
    model, optimizer = trained(dtype)
    before = snapshot(list(model.parameters()), list(optimizer.state.values()))
    expected = optimizer.ema_state_dict(model, 1)
    with optimizer.swap_ema(1):
        assert_same_bits(dict(model.state_dict()), dict(expected))
        assert_same_bits(dict(optimizer.ema_state_dict(model, 1)), dict(expected))
    assert_same_bits([list(model.parameters()), list(optimizer.state.values())], before)
    optimizer.swap_ema(1)  # at once, without a context
    assert_same_bits(dict(model.state_dict()), dict(expected))
    optimizer.swap_ema(1)
    assert_same_bits([list(model.parameters()), list(optimizer.state.values())], before)


def test_swap_restores_after_an_error():
    model, optimizer = trained()
    before = snapshot(list(model.parameters()))
    with pytest.raises(KeyError), optimizer.swap_ema(0):
        raise KeyError
    assert_same_bits(list(model.parameters()), before)


def test_nothing_else_happens_while_swapped():
    model, optimizer = trained()
    with optimizer.swap_ema(0):
        with pytest.raises(RuntimeError, match="step: average 0 stands in"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="load_state_dict: average 0"):
            optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="before average 1"):
            optimizer.swap_ema(1)
    train(model, optimizer, 1)


@pytest.mark.parametrize("i", [-1, 2, None, True])
def test_index_of_an_average(i):
    model, optimizer = trained()
    for call in (lambda: optimizer.swap_ema(i), lambda: optimizer.ema_state_dict(model, i)):
        with pytest.raises(IndexError, match="need the index of one of 2 averages"):
            call()


# ---- EMA alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ema_follows_the_formula(dtype, backend):
    params = make_params(dtype)
    decays = (0.9, 0.999, 0.3)
    ema = EMA(params, decays)
    compute = torch.promote_types(dtype, torch.float32)
    expected = [[p.detach().to(compute, copy=True) for p in params] for _ in decays]
    for step in range(4):
        with torch.no_grad():
            for param in params:
                param.add_(0.1 * (step + 1))
        with flowkernels.backend(backend):
            ema.update()
        for decay, averages in zip(decays, expected, strict=True):
            for average, param in zip(averages, params, strict=True):
                average.lerp_(param.detach().to(compute), 1 - decay)
    for shadows, averages in zip(ema.shadows, expected, strict=True):
        for shadow, average in zip(shadows.values(), averages, strict=True):
            assert shadow.dtype == compute
            torch.testing.assert_close(shadow, average, rtol=1e-6, atol=1e-6)


def test_ema_of_mixed_dtypes_and_layouts():
    params = [
        *make_params(torch.float32), *make_params(torch.bfloat16), *make_params(torch.float64),
        torch.randn(4, 6).t().requires_grad_(), torch.randn(4, 6)[:, ::2].requires_grad_(),
    ]  # fmt: skip
    ema = EMA(params, 0.5)
    with torch.no_grad():
        torch._foreach_add_(params, 1.0)
    ema.update()
    for param, shadow in zip(params, ema.shadows[0].values(), strict=True):
        expected = param.detach().to(shadow.dtype) - 0.5
        torch.testing.assert_close(shadow, expected, rtol=0, atol=0.02)  # bfloat16's first addition


def test_bfloat16_average_moves_at_a_high_decay():
    param = torch.zeros(8, dtype=torch.bfloat16)
    ema = EMA([param], (0.9999,))
    param.fill_(1.0)
    for _ in range(100):
        ema.update()
    torch.testing.assert_close(ema.shadows[0]["0"], torch.full((8,), 1 - 0.9999**100), rtol=1e-4,
                               atol=0.0)  # fmt: skip


def test_ema_update_waits_for_no_device():
    ema = EMA(make_params(), (0.9, 0.99))
    with NoHostSync():
        ema.update()


def test_ema_agrees_with_adamw_ema():
    model, twin = Model(), Model()
    first = AdamWEMA(model.parameters(), 1e-2, ema_decays=(0.5, 0.9))
    second = AdamWEMA(twin.parameters(), 1e-2)
    ema = EMA(twin, (0.5, 0.9))
    train(model, first)
    train(twin, second, after=ema.update)
    for i in (0, 1):
        assert_same_bits(dict(ema.state_dict(i)), dict(first.ema_state_dict(model, i)))


def test_ema_state_dict_and_swap_of_a_model():
    model = Model(torch.bfloat16)
    ema = EMA(model, (0.5,))
    train(model, AdamWEMA(model.parameters(), 1e-2), after=ema.update)
    state = ema.state_dict(0)
    assert list(state) == list(model.state_dict())
    assert state["embed.weight"].dtype == torch.bfloat16
    assert state["embed.weight"] is state["head.weight"]
    assert_same_bits(state["body.1.running_mean"], model.body[1].running_mean)
    before = snapshot(list(model.parameters()), ema.shadows)
    with ema.swap(0):
        assert_same_bits(dict(model.state_dict()), dict(state))
        with pytest.raises(RuntimeError, match="update: average 0 stands in"):
            ema.update()
    assert_same_bits([list(model.parameters()), ema.shadows], before)


def test_ema_state_round_trip_is_bitwise():
    model = Model(torch.bfloat16)
    ema = EMA(model, (0.5, 0.9))
    train(model, AdamWEMA(model.parameters(), 1e-2), after=ema.update)
    other = EMA(copy.deepcopy(model), (0.5, 0.9))
    other.load_state_dict(ema.state_dict())
    assert_same_bits(other.shadows, ema.shadows)
    ema.update()
    other.update()
    assert_same_bits(other.shadows, ema.shadows)
    third = EMA(Model(torch.bfloat16), (0.5, 0.9))
    third.load_state_dict(ema.state_dict(1), 1)  # a model's state_dict, into one average
    assert_same_bits(dict(third.state_dict(1)), {**ema.state_dict(1), **{
        name: value for name, value in third.state_dict(1).items() if "running" in name
        or "tracked" in name}})  # fmt: skip


def test_bad_calls_of_ema_are_named():
    with pytest.raises(ValueError, match=r"decays: got 1\.0"):
        EMA(make_params(), (0.9, 1.0))
    ema = EMA(make_params(), (0.9, 0.99))
    with pytest.raises(IndexError, match="one of 2 averages"):
        ema.state_dict(2)
    with pytest.raises(ValueError, match="i: got None, need which of 2"):
        ema.load_state_dict(ema.state_dict(0))
    with pytest.raises(ValueError, match="got 1 averages, this EMA keeps 2"):
        ema.load_state_dict(EMA(make_params(), 0.9).state_dict())
    with pytest.raises(ValueError, match="got no '0'"):
        ema.load_state_dict({}, 0)
    with pytest.raises(ValueError, match=r"got shape \(1,\) for '0', need \(3, 5\)"):
        ema.load_state_dict({str(i): torch.zeros(1) for i in range(7)}, 0)
