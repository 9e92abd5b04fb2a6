"""Calls of losses with operands as most are, which C++ checks, beside those that Python checks."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import flowkernels
from flowkernels import losses
from flowkernels.ops import _native
from flowkernels.ops import losses as checks
from flowkernels.ops.losses._autograd import FGM, FLOW_MATCHING

pytestmark = pytest.mark.skipif(_native.NODES is None, reason=f"nodes are {_native.NODES_OFF}")

BATCH = 4
T = torch.tensor([0.1, 0.3, 0.6, 0.9])
MEAN = 1  # the code of a reduction

CALLS = {
    "flow_matching": lambda a, b, c, d: losses.flow_matching(a, b, c),
    "weights, each sample": lambda a, b, c, d: losses.flow_matching(
        a, b, c, weight=T, reduction="none"
    ),
    "straightening": lambda a, b, c, d: losses.straightening(a, b, c, -T, reduction="sum"),
    "fgm": lambda a, b, c, d: losses.fgm(a, b, c, d, T),
    "fgm, an int": lambda a, b, c, d: losses.fgm(a, b, c, d, T, lam=1),
    "fgm, guided": lambda a, b, c, d: losses.fgm(
        a, b, c, d, T, normalize="sid", u_uncond=b, guidance=2, weight=T.bfloat16()
    ),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def operands(dtype=torch.float32, needed=True):
    made = torch.randn(4, BATCH, 3, 11, generator=torch.Generator().manual_seed(3)).to(dtype)
    return [x.clone().requires_grad_(needed) for x in made]


def flow_matching(v, x0, noise, dt=None, weight=None, reduction=MEAN):
    return FLOW_MATCHING.plain("flow_matching", v, x0, noise, dt, weight, reduction)


def fgm(u, v, x0, noise, t=T, weight=None, lam=0.0, guidance=1.0, sid=False, u_uncond=None):
    return FGM.plain("fgm", u, v, x0, noise, u_uncond, t, weight, lam, guidance, sid, MEAN)


@pytest.mark.parametrize("needed", [True, False])
@dtypes
@calls
def test_the_checks_in_python_are_passed_by(call, dtype, needed, monkeypatch):
    def refuse(*_):
        raise AssertionError("checked in Python")

    monkeypatch.setattr(checks, "check_samples", refuse)
    assert call(*operands(dtype, needed)).requires_grad == needed


@dtypes
@calls
def test_the_bits_are_those_of_checked_calls(call, dtype, monkeypatch):
    inputs = operands(dtype)
    loss = call(*inputs)
    found = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    for way in (FLOW_MATCHING, FGM):
        monkeypatch.setattr(way, "_record_plain", None)
    checked = call(*inputs)
    assert torch.equal(loss, checked)
    assert torch.equal(loss, call(*operands(dtype, needed=False)))
    for ours, other in zip(
        found, torch.autograd.grad(checked.sum(), inputs, allow_unused=True), strict=True
    ):
        assert ours is other is None or torch.equal(ours, other)


def test_samples_left_out_are_counted():
    u, v, x0, noise = operands()
    v = v.detach().index_fill(0, torch.tensor([1, 2]), torch.nan)
    count = torch.ones((), dtype=torch.int32)
    losses.fgm(u, v, x0, noise, T, nonfinite=count).backward()
    assert count.item() == 3
    assert (u.grad[1:3] == 0).all()
    with pytest.raises(TypeError, match="nonfinite: got"):
        losses.fgm(u, v, x0, noise, T, nonfinite=torch.ones(()))


OTHERS = {
    "a number": lambda a: (3.0, a, a),
    "None": lambda a: (a, None, a),
    "float64": lambda a: (a.double(),) * 3,
    "another dtype": lambda a: (a, a.bfloat16(), a),
    "another shape": lambda a: (a, a, a[:, :1]),
    "a transposed one": lambda a: (a, a.mT.contiguous().mT, a),
    "samples apart": lambda a: (torch.cat([a, a], 1)[:, :3], a, a),
    "no dimension": lambda a: (torch.ones(()),) * 3,
    "another device": lambda a: (a, a.to("meta"), a),
    "all on a device without kernels": lambda a: (a.to("meta"),) * 3,
    "sparse": lambda a: (a.to_sparse(),) * 3,
    "negated when it is read": lambda a: (a, torch._neg_view(a), a),
    "zeros without memory": lambda a: (a, torch._efficientzerotensor(tuple(a.shape)), a),
    "a subclass": lambda a: (a.as_subclass(type("Other", (torch.Tensor,), {})), a, a),
    "a weight of one shape more": lambda a: (a, a, a, None, T[None]),
    "a weight for other samples": lambda a: (a, a, a, None, T[1:]),
    "a weight apart": lambda a: (a, a, a, None, torch.ones(8)[::2]),
    "a weight that asks for a gradient": lambda a: (a, a, a, None, T.clone().requires_grad_()),
    "float64 times": lambda a: (a, a, a, T.double()),
    "no reduction": lambda a: (a, a, a, None, None, None),
    "a reduction by its name": lambda a: (a, a, a, None, None, "mean"),
}


@pytest.mark.parametrize("made", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_not_plain_is_left_to_python(made):
    a = torch.randn(BATCH, 3, 11)
    assert flow_matching(a, a, a) is not None
    assert flow_matching(*made(a)) is None


@pytest.mark.parametrize(
    "setting",
    [{"lam": True}, {"lam": "1"}, {"lam": torch.tensor(1.0)}, {"guidance": None}, {"sid": None},
     {"sid": 1}, {"t": None}, {"u_uncond": T}],
    ids=str,
)  # fmt: skip
def test_settings_of_another_type_are_left_to_python(setting):
    inputs = operands()
    assert fgm(*inputs, lam=1) is not None
    assert fgm(*inputs, **setting) is None


def test_ints_of_any_size():
    inputs = operands()
    assert torch.equal(losses.fgm(*inputs, T, lam=2**63), losses.fgm(*inputs, T, lam=2.0**63))
    with pytest.raises(TypeError, match="x0: got int"):
        losses.flow_matching(inputs[0], 10**20, inputs[2])


@pytest.mark.parametrize("name", flowkernels.ops._library.BACKENDS)
def test_a_forced_backend_is_left_to_python(name):
    with flowkernels.backend(name):
        assert flow_matching(*operands()[:3]) is None


def test_modes_and_traces_are_left_to_python():
    inputs = operands()[:3]
    with torch.device("cpu"):
        assert flow_matching(*inputs) is None
    seen = []
    torch.jit.trace(
        lambda *x: seen.append(flow_matching(*x)) or x[0] * 1, inputs, check_trace=False
    )
    assert seen == [None]


def test_an_error_keeps_its_type():
    class Lost(Exception):
        pass

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise Lost(str(function))

    for needed in (True, False):
        inputs = operands(needed=needed)
        with Mode(), pytest.raises(Lost, match="flow_matching_forward"):
            losses.flow_matching(*inputs[:3])


@pytest.mark.parametrize("place", [0, 1])
def test_tangents_and_transforms_are_refused(place):
    inputs = operands(needed=False)
    with forward_ad.dual_level():
        dual = list(inputs)
        dual[place] = forward_ad.make_dual(inputs[place], inputs[place])
        with pytest.raises(RuntimeError, match="reverse-mode"):
            losses.flow_matching(*dual[:3])
        with pytest.raises(RuntimeError, match="reverse-mode"):
            losses.fgm(*inputs, forward_ad.make_dual(T, T))
    with forward_ad.dual_level():
        base = torch.zeros(BATCH, 3, 11)
        view = base[:]  # has its tangent when somebody asks
        base.copy_(forward_ad.make_dual(inputs[0], inputs[0]))
        with pytest.raises(RuntimeError, match="reverse-mode"):
            losses.flow_matching(view, *inputs[1:3])
    for transform in (torch.func.grad, torch.func.vmap):
        # Of another argument: the operands themselves are no wrapped ones.
        with pytest.raises(RuntimeError, match="reverse-mode"):
            transform(lambda x: losses.flow_matching(*inputs[:3]) * x.sum())(torch.ones(2))


def test_no_graph_where_none_is_asked_for():
    inputs = operands()[:3]
    with torch.no_grad():
        assert not losses.flow_matching(*inputs).requires_grad
    with torch.inference_mode():
        assert losses.flow_matching(*inputs).is_inference()
    parameter = torch.nn.Parameter(inputs[0].detach())
    losses.flow_matching(parameter, *(x.detach() for x in inputs[1:])).backward()
    assert parameter.grad is not None


def test_empty_batches():
    empty = torch.empty(0, 3)
    assert flow_matching(empty, empty, empty).isnan()
    assert flow_matching(empty, empty, empty, reduction=0).shape == (0,)
