"""AdamWEMA and EMA on a GPU: against float64 on the host, skipped steps, graphs, determinism."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from flowkernels.ops import _native
from flowkernels.optim import EMA, AdamWEMA
from tests.gpu import DEVICE, needs_cuda
from tests.optim.helpers import (
    NoHostSync,
    assert_no_worse,
    assert_same_bits,
    clone_params,
    make_params,
    run,
    set_grads,
    snapshot,
)

pytestmark = pytest.mark.gpu

# Beside the usual ones: more than one chunk, more tensors than a table holds, unaligned views.
LARGE = ((70001,), (333, 257), (4096, 130), *[(5,)] * 300)
SETTINGS = {"weight_decay": 0.1, "ema_decays": (0.9, 0.99, 0.999, 0.3, 0.5), "max_grad_norm": 0.5}


def on_gpu(dtype=torch.float32, shapes=None):
    return make_params(dtype, shapes or (*make_shapes(), *LARGE), device=DEVICE)


def make_shapes():
    return tuple(tuple(p.shape) for p in make_params())


def unaligned(params):
    """The same values one element past an aligned address."""
    moved = []
    for param in params:
        memory = torch.empty(param.numel() + 1, dtype=param.dtype, device=param.device)
        view = memory[1:].view(param.shape)
        moved.append(view.copy_(param.detach()).requires_grad_())
    return moved


@needs_cuda
def test_the_native_backend_serves():
    assert _native.OFF["cuda"] is None, _native.OFF["cuda"]


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("views", ["aligned", "unaligned"])
def test_equals_float64_adamw(views, beta1):
    ours = on_gpu() if views == "aligned" else unaligned(on_gpu())
    theirs = clone_params(ours)
    truth = [p.detach().cpu().double().requires_grad_() for p in ours]
    optimizer = AdamWEMA(ours, 1e-2, betas=(beta1, 0.99), **SETTINGS)
    others = [
        torch.optim.AdamW(params, 1e-2, betas=(beta1, 0.99), weight_decay=0.1)
        for params in (theirs, truth)
    ]
    for step in range(4):
        set_grads(step, ours, theirs, truth)
        for params in (theirs, truth):
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        for each in (optimizer, *others):
            each.step()
    assert_no_worse([p.cpu() for p in ours], [p.cpu() for p in theirs], truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_equals_reference(dtype, copy_dtype):
    results = []
    for backend in ("native", "reference"):
        params = on_gpu(dtype)
        copies = [torch.zeros_like(p, dtype=copy_dtype) for p in params]
        with flowkernels.backend(backend):
            optimizer = AdamWEMA(
                params, torch.tensor(1e-2, device=DEVICE), **SETTINGS,
                grad_scale=torch.tensor(2.0, device=DEVICE), low_precision_copies=copies,
            )  # fmt: skip
            run(params, optimizer, range(3))
        results.append(snapshot(params, copies, list(optimizer.state.values())))
    for a, b in zip(*results, strict=True):
        eps = max(torch.finfo(a.dtype).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=max(1e-6, eps / 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_changes_no_bit(bad):
    params = on_gpu()
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    optimizer = AdamWEMA(params, 1e-2, **SETTINGS, low_precision_copies=copies)
    run(params, optimizer, range(2))
    before = snapshot(params, list(optimizer.state.values()), copies)
    set_grads(2, params)
    params[-1].grad[-1] = bad
    with NoHostSync(DEVICE):
        optimizer.step()
    assert_same_bits([params, list(optimizer.state.values()), copies], before)
    assert int(optimizer.skipped) == 1


def test_runs_are_bitwise_equal():
    found = []
    for _ in range(2):
        params = on_gpu()
        optimizer = AdamWEMA(params, 1e-2, **SETTINGS)
        run(params, optimizer, range(3))
        found.append(snapshot(params, list(optimizer.state.values()), optimizer.grad_norm))
    assert_same_bits(found[1], found[0])


@needs_cuda
def test_a_step_is_captured_and_replayed():
    """A replay sees new gradients, a new learning rate and a bad step, all on the device."""
    params, plain = on_gpu(), on_gpu()
    rate = torch.tensor(1e-2, device=DEVICE)
    optimizer, other = AdamWEMA(params, rate, **SETTINGS), AdamWEMA(plain, 1e-2, **SETTINGS)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        set_grads(0, params, plain)
        optimizer.step()  # makes the state, outside the graph
    torch.cuda.current_stream().wait_stream(side)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step, lr in ((1, 1e-2), (2, 5e-3), (3, 2e-3)):
        set_grads(step, plain)
        if step == 2:
            plain[0].grad[0, 0] = float("nan")
        for param, twin in zip(params, plain, strict=True):
            param.grad.copy_(twin.grad)
        rate.fill_(lr)
        other.param_groups[0]["lr"] = float(torch.tensor(lr))
        graph.replay()
        other.step()
    torch.cuda.synchronize()
    assert int(optimizer.skipped) == int(other.skipped) == 1
    assert_same_bits([params, list(optimizer.state.values())], [plain, list(other.state.values())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ema_alone(dtype):
    params = on_gpu(dtype)
    ema = EMA(params, (0.9, 0.999, 0.99, 0.5, 0.3))
    expected = [[p.detach().float().clone() for p in params] for _ in ema.decays]
    for _ in range(3):
        with torch.no_grad():
            torch._foreach_add_(params, 0.1)
        ema.update()
        for decay, averages in zip(ema.decays, expected, strict=True):
            torch._foreach_lerp_(averages, [p.detach().float() for p in params], 1 - decay)
    for shadows, averages in zip(ema.shadows, expected, strict=True):
        for shadow, average in zip(shadows.values(), averages, strict=True):
            torch.testing.assert_close(shadow, average, rtol=1e-6, atol=1e-6)


def test_state_moves_between_devices():
    params = on_gpu(shapes=make_shapes())
    optimizer = AdamWEMA(params, 1e-2, **SETTINGS)
    run(params, optimizer, range(2))
    host = [p.detach().cpu().requires_grad_() for p in params]
    other = AdamWEMA(host, 1e-2, **SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(host, params, strict=True):
        assert all(value.device.type == "cpu" for value in other.state[a].values())
        assert_same_bits(other.state[a]["exp_avg"], optimizer.state[b]["exp_avg"].cpu())
