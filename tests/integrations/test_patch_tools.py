"""A patched model under other tools: LoRA, checkpointing, compilation, autocast, offloading."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flowkernels
from tests.integrations.models import (
    BUILDERS,
    as_dtype,
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


def test_backward_hooks_of_blocks_run():
    model = sd3()
    flowkernels.patch(model)
    seen = []
    model.transformer_blocks[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    gradients(model)
    assert seen == ["backward"]


def test_a_hook_of_diffusers_around_a_patched_forward():
    """Wrapped after patching: the wrapper stays, and a revert reaches through it."""
    from diffusers.hooks import HookRegistry, ModelHook

    model = sd3()
    before = run_without_grad(model)
    handle = flowkernels.patch(model)
    block = model.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "test")
    assert distance(run_without_grad(model), before) < NEAR
    handle.revert()
    assert torch.equal(run_without_grad(model), before)
    second = flowkernels.patch(model)
    ours = run_without_grad(model)
    assert not torch.equal(ours, before)
    assert distance(ours, before) < NEAR
    second.revert()
    block._diffusers_hook.remove_hook("test")
    assert torch.equal(run_without_grad(model), before)


@pytest.mark.parametrize("patched_first", [False, True])
def test_offloading_by_accelerate(patched_first):
    """Every parameter is on meta until its own module is called: none may be read early."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = sd35()
    before = run_without_grad(model)
    if patched_first:
        flowkernels.patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    handle = flowkernels.patch(model)
    assert model.transformer_blocks[0].attn.norm_q.weight.is_meta
    assert distance(run_without_grad(model), before) < NEAR
    assert not reasons(handle)
    handle.revert()
    assert torch.equal(run_without_grad(model), before)


@pytest.mark.parametrize("patched_first", [False, True])
def test_layerwise_casting(patched_first):
    """Layers that hold float8 between calls: their weights may not be read either."""
    model = sd35().to(torch.bfloat16)
    if patched_first:
        flowkernels.patch(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    inputs = as_dtype(inputs_of(sd35()), torch.bfloat16)
    handle = flowkernels.patch(model)
    ours = run_without_grad(model, inputs)
    assert not reasons(handle)
    handle.revert()
    assert distance(ours, run_without_grad(model, inputs)) < 0.02


@pytest.mark.parametrize("patched_first", [False, True])
def test_a_cache_of_diffusers(patched_first):
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    model = flux()
    before = run_without_grad(model)
    if patched_first:
        handle = flowkernels.patch(model)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e-4))
    if not patched_first:
        handle = flowkernels.patch(model)
        assert "its forward is wrapped on the instance" in str(handle.report())
    with model.cache_context("cond"):
        assert distance(run_without_grad(model), before) < NEAR
    assert not reasons(handle)


@pytest.mark.parametrize("kind", BUILDERS)
def test_gradient_checkpointing(kind):
    model = BUILDERS[kind]()
    out, grads = gradients(model)
    model.enable_gradient_checkpointing()
    with flowkernels.patch(model) as handle:
        found, found_grads = gradients(model)
        assert not reasons(handle)
        model.disable_gradient_checkpointing()
        plain, plain_grads = gradients(model)
    assert torch.equal(found, plain)
    assert distance(found, out) < NEAR
    for name, grad in grads.items():
        assert torch.equal(found_grads[name], plain_grads[name]), name
        assert distance(found_grads[name], grad) < 10 * NEAR or grad.norm() < 1e-4, name


@pytest.mark.parametrize("kind", BUILDERS)
def test_autocast(kind):
    """float32 weights, bfloat16 products: as near to float32 as eager under autocast is."""
    model = BUILDERS[kind]()
    truth = run_without_grad(model)
    with torch.autocast("cpu", torch.bfloat16):
        eager, eager_grads = gradients(model)
        with flowkernels.patch(model) as handle:
            ours, grads = gradients(model)
            assert not reasons(handle)
        with flowkernels.patch(model, exact=True):
            assert torch.equal(gradients(model)[0], eager)
    assert ours.dtype == eager.dtype
    assert distance(ours, truth) <= 2 * distance(eager, truth)
    for name, grad in eager_grads.items():
        assert (grad is None) == (grads[name] is None), name
        assert grad is None or grad.dtype == grads[name].dtype, name


@pytest.mark.parametrize("kind", BUILDERS)
def test_lora_through_peft(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "net.0.proj", "net.2", "proj_mlp"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    model = BUILDERS[kind]()
    bare = run_without_grad(model)
    handle = flowkernels.patch(model)
    torch.manual_seed(0)
    model.add_adapter(config)
    out, grads = gradients(model)
    assert not reasons(handle)
    handle.revert()
    expected, expected_grads = gradients(model)
    assert distance(out, bare) > 1e-3
    assert distance(out, expected) < NEAR
    lora = [name for name in grads if "lora_" in name]
    assert lora
    for name in lora:
        assert distance(grads[name], expected_grads[name]) < 10 * NEAR, name
    flowkernels.patch(model)
    model.disable_adapters()
    assert distance(run_without_grad(model), bare) < NEAR
    model.enable_adapters()
    assert distance(run_without_grad(model), expected) < NEAR
    model.delete_adapters("default")
    assert distance(run_without_grad(model), bare) < NEAR


@pytest.mark.parametrize("build", [sd35, flux])
def test_compiled_in_one_graph(build):
    model = build()
    inputs = inputs_of(model)
    out, grads = gradients(model)
    handle = flowkernels.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, found_grads = gradients(compiled, inputs)
    assert distance(found, out) < NEAR
    assert not reasons(handle)
    for name, grad in grads.items():
        own = found_grads.get(f"_orig_mod.{name}", found_grads.get(name))
        assert distance(own, grad) < 10 * NEAR or grad.norm() < 1e-4, name
    torch._dynamo.reset()


def test_compiled_calls_that_fall_back_say_so():
    model = sd3()
    before = run_without_grad(model)
    model.enable_forward_chunking(15, dim=1)
    model.transformer_blocks[1].set_chunk_feed_forward(None)
    model.transformer_blocks[0].set_chunk_feed_forward(None)
    handle = flowkernels.patch(model)
    model.transformer_blocks[1].set_chunk_feed_forward(15, dim=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert distance(run_without_grad(compiled, inputs_of(model)), before) < NEAR
    assert reasons(handle) == {"feed-forward chunking"}
    torch._dynamo.reset()


def test_compiled_for_all_sizes():
    model = flux(num_layers=1, num_single_layers=1)
    flowkernels.patch(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for batch, tokens, text in ((2, 15, 7), (3, 20, 9), (5, 33, 4)):
        inputs = inputs_of(model, batch=batch, tokens=tokens, text=text)
        assert distance(run_without_grad(compiled, inputs), run_without_grad(model, inputs)) < NEAR
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_exported():
    model = sd3()
    flowkernels.patch(model)
    inputs = inputs_of(model)
    exported = torch.export.export(model, (), kwargs=inputs, strict=False).module()
    assert distance(exported(**inputs)[0], run_without_grad(model)) < NEAR


def test_compiled_block_by_block():
    model = flux(num_layers=1, num_single_layers=1)
    before = run_without_grad(model)
    handle = flowkernels.patch(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert distance(run_without_grad(model), before) < NEAR
    assert not reasons(handle)
    torch._dynamo.reset()


def test_controlnet_residuals_and_skipped_layers():
    model = sd3(num_layers=3)
    inputs = inputs_of(model)
    tokens = 15
    residuals = [torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(4))]
    for extra in ({"block_controlnet_hidden_states": residuals}, {"skip_layers": [1]}):
        before = run_without_grad(model, inputs, **extra)
        with flowkernels.patch(model):
            assert distance(run_without_grad(model, inputs, **extra), before) < NEAR


def test_dropout_draws_the_same_numbers():
    model = sd3()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    torch.manual_seed(5)
    before = run(model)
    with flowkernels.patch(model):
        torch.manual_seed(5)
        assert distance(run(model), before) < NEAR
