"""Calls of a patched model: what is served however it is called, what falls back and says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flowkernels
from tests.integrations.models import (
    BUILDERS,
    as_dtype,
    blocks_of,
    distance,
    flux,
    gradients,
    inputs_of,
    run,
    run_without_grad,
    sd3,
    sd35,
)

NEAR = 1e-5


def reasons(handle: flowkernels.integrations.Handle) -> set[str]:
    return {fallback.why for fallback in handle.report().fallbacks}


def assert_falls_back(model: nn.Module, why: str, inputs=None, **extra) -> None:
    """The patched model gives the original's very bits, and the report names the reason."""
    before = run_without_grad(model, inputs, **copy.deepcopy(extra))
    handle = flowkernels.patch(blocks_of(model))
    assert torch.equal(run_without_grad(model, inputs, **copy.deepcopy(extra)), before)
    assert any(why in found for found in reasons(handle)), reasons(handle)
    assert why in str(handle.report())


def assert_skipped(model: nn.Module, why: str, **extra) -> None:
    """Known before any call: the report's rows say it."""
    before = run_without_grad(model, **copy.deepcopy(extra))
    handle = flowkernels.patch(blocks_of(model))
    assert not any(row.module == "0" for row in handle.report().patched)
    if all(row.status == "skipped" for row in handle.report().rows):
        assert torch.equal(run_without_grad(model, **copy.deepcopy(extra)), before)
    assert distance(run_without_grad(model, **copy.deepcopy(extra)), before) < NEAR
    assert any(why in row.why for row in handle.report().skipped), str(handle.report())


def test_float64_falls_back():
    model = sd35().double()
    assert_falls_back(model, "float64 is not served", as_dtype(inputs_of(model), torch.float64))


@pytest.mark.parametrize("build", [sd35, flux])
def test_joint_attention_kwargs_fall_back(build):
    kwargs = {"attention_mask": None} if build is flux else {"anything": 1}
    assert_falls_back(build(), "joint_attention_kwargs: ", joint_attention_kwargs=kwargs)


def test_a_lora_scale_alone_is_served():
    model = flux()
    with flowkernels.patch(model) as handle:
        run_without_grad(model, joint_attention_kwargs={"scale": 1.0})
        assert not reasons(handle)


def test_feed_forward_chunking():
    model = sd3()
    model.enable_forward_chunking(1, dim=1)
    assert_skipped(model, "feed-forward chunking")
    model = sd3()
    handle = flowkernels.patch(model)
    model.enable_forward_chunking(1, dim=1)
    chunked = run_without_grad(model)
    assert "feed-forward chunking" in reasons(handle)
    handle.revert()
    assert distance(chunked, run_without_grad(model)) < NEAR


def test_custom_attention_processors():
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    class Mine(JointAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    model = sd3()
    model.set_attn_processor(Mine())
    assert_skipped(model, "attention processor Mine")
    model = sd3()
    handle = flowkernels.patch(model)
    model.set_attn_processor(Mine())
    run_without_grad(model)
    assert reasons(handle) == {"attn: attention processor Mine"}
    model.set_attn_processor(JointAttnProcessor2_0())
    run_without_grad(model)  # served again
    assert sum(item.calls for item in handle.report().fallbacks) == 2


def test_flux_ip_adapter():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = flux()
    processors = {
        name: processor
        if name.startswith("single")
        else FluxIPAdapterAttnProcessor(hidden_size=64, cross_attention_dim=24)
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    image = [torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(3))]
    extra = {"joint_attention_kwargs": {"ip_hidden_states": image}}
    assert_skipped(model, "attention processor FluxIPAdapterAttnProcessor", **extra)


def test_sd3_ip_adapter():
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    model = sd3()
    model.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(64, 64, 32, timesteps_emb_dim=8)
            for name in model.attn_processors
        }
    )
    draw = torch.Generator().manual_seed(3)
    extra = {
        "joint_attention_kwargs": {
            "ip_hidden_states": torch.randn(2, 4, 64, generator=draw),
            "temb": torch.randn(2, 8, generator=draw),
        }
    }
    assert_skipped(model, "attention processor SD3IPAdapterJointAttnProcessor2_0", **extra)


@pytest.mark.parametrize(
    "path",
    ["norm1", "norm1.norm", "norm2", "attn", "norm2_context", "norm1_context.norm"],
)
def test_hooks_on_modules_that_the_chain_leaves_out(path):
    model = sd3()
    module = model.transformer_blocks[0].get_submodule(path)
    handle = flowkernels.patch(model)
    calls = []
    hook = module.register_forward_hook(lambda *_: calls.append(path))
    run_without_grad(model)
    assert calls == [path]
    assert any(path.split(".")[0] in why for why in reasons(handle))
    hook.remove()
    run_without_grad(model)
    assert calls == [path]


def test_hooks_on_modules_that_the_chain_calls_or_reads():
    """Layers are called; norms of q and k and the feed-forward are then called too, not read."""
    model = sd35()
    before = run_without_grad(model)
    handle = flowkernels.patch(model)
    block = model.transformer_blocks[0]
    calls = []
    paths = ["attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "ff", ""]
    paths += ["attn.norm_q", "attn.add_k_proj", "attn2.to_v"]
    watched = {path: block.get_submodule(path) for path in paths}
    for path, module in watched.items():
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
    assert distance(run_without_grad(model), before) < NEAR
    assert sorted(calls) == sorted(watched)
    assert not reasons(handle)


def test_a_forward_wrapped_before_patching_is_left_alone():
    model = sd3()
    block = model.transformer_blocks[0]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    assert_skipped(model, "its forward is wrapped on the instance")


def test_torch_func_falls_back():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = sd3()
    inputs = inputs_of(model)
    x = inputs["hidden_states"]

    def of(x):
        # The only kernel of SDPA that has a forward mode.
        with sdpa_kernel(SDPBackend.MATH):
            return run(model, {**inputs, "hidden_states": x})

    _, expected = torch.func.jvp(of, (x,), (torch.ones_like(x),))
    handle = flowkernels.patch(model)
    _, tangent = torch.func.jvp(of, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, expected)
    assert reasons(handle) == {"torch.func or forward-mode differentiation"}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_the_users_attention_backend(kind, name, monkeypatch):
    """Counted at diffusers' own functions: what we have no core for goes through them."""
    from diffusers.models import attention_dispatch as dispatch

    model = BUILDERS[kind]()
    before = run_without_grad(model)
    backend = dispatch.AttentionBackendName(name)
    registry = dispatch._AttentionBackendRegistry
    original, calls = registry._backends[backend], []

    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setitem(registry._backends, backend, counted)
    expected = 0 if name == "native" else len(model.attn_processors)
    with flowkernels.patch(model) as handle:
        with dispatch.attention_backend(name):
            assert distance(run_without_grad(model), before) < NEAR
        assert len(calls) == expected
        previous = registry._active_backend
        try:
            model.set_attention_backend(name)
            assert distance(run_without_grad(model), before) < NEAR
        finally:
            model.reset_attention_backend()
            registry.set_active_backend(previous)
        assert len(calls) == 2 * expected
        assert not reasons(handle)


def test_exact_sd3_keeps_diffusers_own_choice_of_sdpa():
    from diffusers.models.attention_dispatch import attention_backend

    model = sd35().to(torch.bfloat16)
    before = run_without_grad(model)
    with flowkernels.patch(model, exact=True), attention_backend("_native_math"):
        assert torch.equal(run_without_grad(model), before)


def test_exact_under_sdpas_own_choice():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for build in BUILDERS.values():
        model = build().to(torch.bfloat16)
        with sdpa_kernel(SDPBackend.MATH):
            before = run_without_grad(model)
            with flowkernels.patch(model, exact=True):
                assert torch.equal(run_without_grad(model), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fluxs_single_blocks_join_the_streams_once(monkeypatch, checkpointing):
    model = flux(num_layers=1, num_single_layers=3)
    out, grads = gradients(model)
    flowkernels.patch(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    joins, original = [], torch.cat

    def counted(tensors, dim=0):
        # [text, image] of the residual stream, not heads nor the places of tokens.
        if tensors[0].dim() == 3 and dim == 1:
            joins.append(dim)
        return original(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", counted)
    run_without_grad(model)
    assert len(joins) == 1
    joins.clear()
    found, found_grads = gradients(model)
    assert len(joins) <= (4 if checkpointing else 1)
    assert distance(found, out) < NEAR
    for name, grad in grads.items():
        assert distance(found_grads[name], grad) < 10 * NEAR or grad.norm() < 1e-4, name


def test_a_stream_between_single_blocks_may_be_changed_or_watched():
    """In place, replaced by a hook, or waiting for its gradient: as in the original."""
    changes = {
        "in place": lambda module, args, out: (out[0], out[1].mul_(0.5)),
        "replaced": lambda module, args, out: (out[0] + 1, out[1]),
        "swapped": lambda module, args, out: (out[0].flip(1), out[1].flip(1)),
    }
    for change in changes.values():
        model = flux(num_layers=1)
        model.single_transformer_blocks[0].register_forward_hook(change)
        before = run_without_grad(model)
        flowkernels.patch(model)
        assert distance(run_without_grad(model), before) < NEAR

    seen: list[torch.Tensor] = []
    for patched in (False, True):
        model = flux(num_layers=1)
        if patched:
            flowkernels.patch(model)
        kept = []
        model.single_transformer_blocks[0].register_forward_hook(
            lambda module, args, out, kept=kept: kept.append(out[1].retain_grad() or out[1])
        )
        gradients(model)
        seen.append(kept[0].grad)
    assert distance(seen[1], seen[0]) < 10 * NEAR


def test_flux_with_a_rope_of_another_kind_falls_back():
    model = flux(num_layers=1, num_single_layers=1)
    forward = type(model.pos_embed).forward
    model.pos_embed.forward = lambda ids: tuple(
        table.double() for table in forward(model.pos_embed, ids)
    )
    assert_falls_back(model, "image_rotary_emb is not (cos, sin)")


def test_flux_without_a_rope():
    block = flux().transformer_blocks[0]
    draw = torch.Generator().manual_seed(6)
    shapes = ((2, 15, 64), (2, 7, 64), (2, 64))
    inputs = [torch.randn(shape, generator=draw) for shape in shapes]
    with torch.no_grad():
        before = block(*inputs)
        with flowkernels.patch(block) as handle:
            after = block(*inputs)
            assert not reasons(handle)
    assert all(distance(ours, theirs) < NEAR for ours, theirs in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_core_that_does_not_take_the_heads(kind, monkeypatch):
    """The user's backend is a core of ours in name, but not for these heads: diffusers' then."""
    from diffusers.models import attention_dispatch as dispatch

    from flowkernels.integrations import _attention

    def refuses(*args, **kwargs):
        raise ValueError("core: does not serve the call")

    model = BUILDERS[kind]()
    before = run_without_grad(model)
    monkeypatch.setattr(_attention, "select", refuses)
    named = _attention.Backend(dispatch.AttentionBackendName.NATIVE, "cudnn", kind != "flux")
    for module in ("sd3", "flux"):
        monkeypatch.setattr(f"flowkernels.integrations.{module}.backend_of", lambda *_, **__: named)
    with flowkernels.patch(model):
        assert distance(run_without_grad(model), before) < NEAR
        assert distance(gradients(model)[0], before) < NEAR
