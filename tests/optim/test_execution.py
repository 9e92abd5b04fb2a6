"""How a step runs: layouts, mixed dtypes, backends, threads, no wait for the device."""

from __future__ import annotations

import itertools

import pytest
import torch

import flowkernels
from flowkernels.optim import AdamWEMA
from tests.optim.helpers import (
    NoHostSync,
    assert_same_bits,
    clone_params,
    make_params,
    run,
    set_grads,
    snapshot,
    tensors_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps", "expanded_grad"])
def test_any_layout_gives_the_contiguous_result(layout):
    shape = (4, 6, 3, 3)
    base = torch.randn(shape)
    if layout == "transposed":
        value = base.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    elif layout == "channels_last":
        value = base.to(memory_format=torch.channels_last)
    elif layout == "gaps":
        value = torch.zeros(4, 6, 3, 7)[..., ::2][..., :3].copy_(base)
    else:
        value = base.clone()
    param, plain = torch.nn.Parameter(value), torch.nn.Parameter(base.clone())
    assert param.is_contiguous() == (layout == "expanded_grad")
    neighbours = make_params()
    optimizer = AdamWEMA([param, *neighbours], 1e-2, ema_decays=(0.9,), max_grad_norm=0.1)
    other = AdamWEMA([plain, *make_params()], 1e-2, ema_decays=(0.9,), max_grad_norm=0.1)
    for step in range(3):
        set_grads(step, optimizer.param_groups[0]["params"], other.param_groups[0]["params"])
        grad = plain.grad if layout != "expanded_grad" else plain.grad[:1].expand(shape)
        plain.grad = grad.contiguous()
        param.grad = grad if step % 2 else torch.empty_like(param).copy_(grad)
        optimizer.step()
        other.step()
    # The strided parameter goes through the reference: another order of rounding.
    # Elsewhere the norm's chunks hold other elements, so its last bit may differ.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if layout == "gaps" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(param, plain, **tolerance)
    for key in ("exp_avg", "exp_avg_sq", "ema_0"):
        torch.testing.assert_close(
            optimizer.state[param][key], other.state[plain][key], **tolerance
        )
    if layout != "gaps":
        assert optimizer.state[param]["exp_avg"].stride() == param.stride()


def test_mixed_dtypes_and_copies_in_one_group():
    params = [
        *make_params(torch.float32), *make_params(torch.bfloat16, seed=1),
        *make_params(torch.float16, seed=2), *make_params(torch.float64, seed=3),
    ]  # fmt: skip
    copies = [p.detach().bfloat16() if i % 2 else None for i, p in enumerate(params)]
    apart = [clone_params([p]) for p in params]
    optimizer = AdamWEMA(params, 1e-2, ema_decays=(0.9,), low_precision_copies=copies)
    others = [AdamWEMA(each, 1e-2, ema_decays=(0.9,)) for each in apart]
    for step in range(3):
        set_grads(step, params, [each[0] for each in apart])
        optimizer.step()
        for other in others:
            other.step()
    assert_same_bits(params, apart)
    found = [c for c in copies if c is not None]
    assert_same_bits(found, [p.detach().bfloat16() for p in params[1::2]])
    assert optimizer.grad_norm.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("beta1", "clip"), list(itertools.product([0.0, 0.9], [None, 0.5])))
def test_native_equals_reference(dtype, beta1, clip):
    results = []
    for backend in ("native", "reference"):
        params = make_params(dtype)
        copies = [torch.zeros_like(p, dtype=torch.float16) for p in params]
        with flowkernels.backend(backend):
            optimizer = AdamWEMA(
                params, 1e-2, betas=(beta1, 0.99), weight_decay=0.1, ema_decays=(0.9, 0.99),
                max_grad_norm=clip, grad_scale=2.0, low_precision_copies=copies,
            )  # fmt: skip
            run(params, optimizer, range(3))
        results.append((tensors_of([params, list(optimizer.state.values()), copies]), optimizer))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        # Two units in the last place of the coarsest dtype that the value went through; values are
        # of order 1, where they cross 0 float32's own error remains.
        eps = max(torch.finfo(a.dtype).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=max(1e-6, eps / 4))
    assert_same_bits(results[0][1].grad_norm, results[1][1].grad_norm)


def test_results_do_not_depend_on_the_number_of_threads():
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = make_params(shapes=((333, 257), (70001,), (5,), (128, 128)))
            optimizer = AdamWEMA(params, 1e-2, ema_decays=(0.9,), max_grad_norm=0.5)
            run(params, optimizer, range(2))
            found.append(snapshot(params, list(optimizer.state.values()), optimizer.grad_norm))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_waits_for_no_device(backend, dtype):
    params = make_params(dtype)
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    optimizer = AdamWEMA(
        params, torch.tensor(1e-2), ema_decays=(0.9,), max_grad_norm=0.5,
        grad_scale=torch.tensor(2.0), low_precision_copies=copies,
    )  # fmt: skip
    for step in range(3):
        set_grads(step, params)
        if step == 1:
            params[0].grad = None
        if step == 2:
            params[1].grad[0] = float("inf")
        with flowkernels.backend(backend), NoHostSync():
            optimizer.step()
            optimizer.zero_grad()
    assert int(optimizer.skipped) == 1


def test_replaced_state_tensors_are_used():
    """Whoever offloads state replaces its tensors: the next step must not write to the old ones."""
    params, plain = make_params(), make_params()
    optimizer, other = AdamWEMA(params, 1e-2), AdamWEMA(plain, 1e-2)
    for step in range(3):
        set_grads(step, params, plain)
        optimizer.step()
        other.step()
        for state in optimizer.state.values():
            for key in state:
                state[key] = state[key].clone()
    assert_same_bits([params, list(optimizer.state.values())], [plain, list(other.state.values())])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autograd_is_told_that_parameters_were_written(backend):
    """A graph that saved a parameter fails after the step, as it does with torch's optimisers."""
    param = torch.nn.Parameter(torch.ones(3))
    loss = param.square().sum()
    param.grad = torch.ones(3)
    with flowkernels.backend(backend):
        AdamWEMA([param], 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
