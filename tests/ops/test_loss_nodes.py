"""Losses that have their gradients already, recorded both ways: by the node in C++ and by Python's
``autograd.Function``.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flowkernels import losses
from flowkernels.ops import _native
from flowkernels.ops._stored import StoredLoss
from flowkernels.ops.adversarial import _autograd as adversarial
from flowkernels.ops.adversarial import gradient_penalty
from flowkernels.ops.contrastive import _autograd as contrastive
from flowkernels.ops.correction import _autograd as correction
from flowkernels.ops.losses import _autograd as flow

BATCH = 4
T = torch.tensor([0.1, 0.3, 0.6, 0.9])
NEGATIVES = torch.tensor([1, 2, 3, 0])
RECORDED = [
    flow.FLOW_MATCHING, flow.FGM, contrastive.CONTRASTIVE, correction.SELF_CORRECTED,
    correction.PAIR_LOSS, adversarial.GAN, adversarial.GRADIENT_PENALTY,
]  # fmt: skip
LOSSES = {
    "flow_matching": lambda a, b, c, d: losses.flow_matching(a, b, c),
    "straightening": lambda a, b, c, d: losses.straightening(a, b, c, -T, weight=T),
    "fgm": lambda a, b, c, d: losses.fgm(a, b, c, d, T, lam=0.5),
    "fgm, guided": lambda a, b, c, d: losses.fgm(
        a, b, c, d, T, normalize="sid", u_uncond=b, guidance=2.0, reduction="sum"
    ),
    "contrastive": lambda a, b, c, d: losses.contrastive_flow_matching(
        a, b.detach(), c.detach(), NEGATIVES
    ),
    "self_corrected": lambda a, b, c, d: losses.self_corrected(
        a, T, b, c, T / 2, d, T * 1.1, b, c, trunc=0.2
    )[0],
    "self_reflow": lambda a, b, c, d: losses.self_reflow(a, b, T),
    "pseudo_huber": lambda a, b, c, d: losses.pseudo_huber(a, b, c=0.1),
    "gan": lambda a, b, c, d: losses.gan_discriminator(a, b),
    "generator": lambda a, b, c, d: losses.gan_generator(a),
    "gradient_penalty": lambda a, b, c, d: gradient_penalty(a, 3.0),
}
WAYS = ["Python"] + ["C++"] * (_native.NODES is not None)
ways = pytest.mark.parametrize("way", WAYS, indirect=True)
loss_of = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())


def in_python(patch: pytest.MonkeyPatch):
    for loss in RECORDED:
        patch.setattr(loss, "_record", None)
        patch.setattr(loss, "_record_plain", None)


@pytest.fixture
def way(request, monkeypatch):
    if request.param == "Python":
        in_python(monkeypatch)
    return request.param


def operands(dtype=torch.float32, needed=(True, True, True, True)):
    made = torch.randn(4, BATCH, 33, generator=torch.Generator().manual_seed(5)).to(dtype)
    return [x.clone().requires_grad_(need) for x, need in zip(made, needed, strict=True)]


def gradients(loss, inputs, grad_output=None, **options):
    leaves = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(loss, leaves, grad_output, allow_unused=True, **options)


def same(found, expected):
    assert len(found) == len(expected)
    for ours, other in zip(found, expected, strict=True):
        assert (ours is None) == (other is None)
        assert ours is None or (ours.dtype == other.dtype and torch.equal(ours, other))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_loss_is_here():
    alive = [x for x in gc.get_objects() if type(x) is StoredLoss]
    assert {id(x) for x in alive} == {id(x) for x in RECORDED}


def test_the_node_is_built():
    """Where the native library is built, so is the node; the build says why it is not."""
    if _native.OFF["cpu"] is None:
        assert _native.NODES_OFF is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [None, 1.0, 3.0])
@loss_of
def test_both_ways_have_the_same_bits(loss_of, factor, dtype, monkeypatch):
    grad_output = None if factor is None else torch.tensor(factor)
    for needed in ((True,) * 4, (True, False, False, True), (False, True, False, False)):
        inputs = operands(dtype, needed)
        if not (loss := loss_of(*inputs)).requires_grad:
            continue
        found = gradients(loss, inputs, grad_output)
        with monkeypatch.context() as patch:
            in_python(patch)
            other = loss_of(*inputs)
            expected = gradients(other, inputs, grad_output)
        assert torch.equal(loss, other)
        assert loss.grad_fn.name() == other.grad_fn.name()
        same(found, expected)


@ways
@loss_of
def test_a_kept_graph_is_walked_again_and_a_freed_one_is_not(way, loss_of):
    inputs = operands()
    loss = loss_of(*inputs)
    first = gradients(loss, inputs, retain_graph=True)
    copies = [None if x is None else x.clone() for x in first]
    second = gradients(loss, inputs, torch.tensor(3.0))
    same(first, copies)
    for one, three in zip(first, second, strict=True):
        if one is not None:
            torch.testing.assert_close(three, 3 * one)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, inputs)


@ways
@loss_of
def test_what_is_handed_out_is_not_held_on_to(way, loss_of):
    inputs = operands(needed=(True, False, False, False))
    loss = loss_of(*inputs)
    (gradient,) = gradients(loss, inputs, retain_graph=True)
    alive = weakref.ref(gradient)  # a tensor that C++ holds keeps its Python object
    del gradient
    assert alive() is None
    assert loss.grad_fn is not None


@ways
@loss_of
def test_an_operand_written_in_place_is_found_out(way, loss_of):
    inputs = operands()
    leaf, rest = inputs[0], inputs[1:]
    middle = leaf * 2
    loss = loss_of(middle, *rest)
    with torch.no_grad():
        middle.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, torch.tensor(3.0))


@ways
@loss_of
def test_saved_tensors_go_through_hooks(way, loss_of):
    inputs = operands()
    packed, unpacked = [], []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    def unpack(x):
        unpacked.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = loss_of(*inputs)
    found = gradients(loss, inputs, torch.tensor(3.0))
    assert packed
    assert packed == unpacked
    same(found, gradients(loss_of(*inputs), inputs, torch.tensor(3.0)))


@ways
@loss_of
def test_under_activation_checkpointing(way, loss_of):
    inputs = operands()
    loss = checkpoint(loss_of, *inputs, use_reentrant=False)
    same(gradients(loss, inputs), gradients(loss_of(*inputs), inputs))


@ways
@loss_of
def test_second_order(way, loss_of):
    inputs = operands()
    first = gradients(loss_of(*inputs), inputs, create_graph=True)
    total = sum(x.square().sum() for x in first if x is not None)
    found = gradients(total, inputs)
    with torch.no_grad():
        exact = [x.double() for x in inputs]
    exact = [x.requires_grad_() for x in exact]  # float64 takes the reference path
    first = gradients(loss_of(*exact), exact, create_graph=True)
    total = sum(x.square().sum() for x in first if x is not None)
    for ours, truth in zip(found, gradients(total, exact), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)


@ways
@loss_of
def test_under_compiled_autograd(way, loss_of):
    from torch._dynamo import compiled_autograd

    inputs = operands()
    expected = gradients(loss_of(*inputs), inputs)
    for setting in (1.0, 3.0):
        loss = loss_of(*inputs) * setting
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss.backward()
        for x, gradient in zip(inputs, expected, strict=True):
            if gradient is None:
                assert x.grad is None
            else:
                torch.testing.assert_close(x.grad, setting * gradient)
            x.grad = None


@ways
@loss_of
def test_subclasses_and_modes_see_the_operator(way, loss_of):
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    inputs = operands()
    loss_of(inputs[0].as_subclass(Watched), *inputs[1:]).backward()
    assert any("flowkernels" in name and "forward" in name for name in seen)
    with torch.device("cpu"):
        found = gradients(loss_of(*inputs), inputs)
    same(found, gradients(loss_of(*inputs), inputs))


@ways
@loss_of
def test_an_error_in_the_backward_pass_keeps_its_type(way, loss_of):
    class Lost(Exception):
        pass

    def lose(x):
        raise Lost("not there")

    inputs = operands()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lose):
        loss = loss_of(*inputs)
    with pytest.raises(Lost, match="not there"):
        gradients(loss, inputs, torch.tensor(3.0))


@ways
@loss_of
def test_from_many_threads(way, loss_of):
    inputs = operands()
    loss = loss_of(*inputs)
    expected = gradients(loss_of(*inputs), inputs)
    found = []

    def walk():
        for _ in range(20):
            found.append(gradients(loss, inputs, retain_graph=True))
            loss_of(*inputs).backward(inputs=inputs[:1])

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for each in found:
        same(each, expected)


@ways
def test_a_freed_graph_under_compiled_autograd(way):
    from torch._dynamo import compiled_autograd

    loss = losses.flow_matching(*operands()[:3])
    loss.backward()
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="second time"),
    ):
        loss.backward()


@ways
@pytest.mark.parametrize("compiled", [False, True])
def test_no_gradient_comes_back(way, compiled):
    from torch._dynamo import compiled_autograd

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    inputs = operands()
    loss = Drop.apply(losses.flow_matching(*inputs[:3]))
    with compiled_autograd._enable(torch.compile(backend="eager"), compiled):
        loss.backward()
    assert all(x.grad is None for x in inputs)


@ways
def test_a_lazily_negated_one_is_minus_one(way):
    inputs = operands()
    complex_loss = torch.complex(torch.zeros(()), losses.flow_matching(*inputs[:3]))
    total = (complex_loss.conj() * torch.tensor(-1j)).real  # -loss
    expected = gradients(losses.flow_matching(*inputs[:3]), inputs)
    found = gradients(total, inputs)
    same([None if x is None else -x for x in found], expected)


@ways
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The values for attribute")
def test_a_trace_keeps_the_gradients(way):
    v, x0, noise, _ = operands(needed=(True, False, False, False))
    traced = torch.jit.trace(
        lambda v: losses.flow_matching(v * 1, x0, noise), (v,), check_trace=False
    )
    same(
        torch.autograd.grad(traced(v), v),
        torch.autograd.grad(losses.flow_matching(v, x0, noise), v),
    )


@ways
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_anomaly_mode_names_the_loss(way):
    inputs = operands(needed=(True, False, False, False))
    with torch.no_grad():
        inputs[0][0, 0] = float("nan")
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = losses.flow_matching(*inputs[:3])
        with pytest.raises(RuntimeError, match=r"FlowMatchingBackward.*nan"):
            loss.backward()


@ways
def test_hooks_on_the_node(way):
    inputs = operands()
    loss = losses.flow_matching(*inputs[:3])
    seen = []
    loss.grad_fn.register_hook(lambda results, grads: seen.append((len(results), grads[0].item())))
    loss.backward()
    assert seen[0][1] == 1.0


def test_a_node_built_for_another_torch_is_left_alone(monkeypatch):
    monkeypatch.setattr(_native, "_build_report", lambda: {"nodes": "built for torch 2.0.0"})
    nodes, reason = _native._load_nodes()
    assert nodes is None
    assert "2.0.0" in reason
    monkeypatch.setattr(_native, "_build_report", dict)
    assert _native._load_nodes() == (None, "in Python (not built)")
