"""What patching promises about the model: nothing changes but the forwards, and they come back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import flowkernels
from flowkernels.integrations import Handle, NotPatchedError
from tests.integrations.models import (
    BUILDERS,
    SD3_SIZES,
    diffusers,
    distance,
    flux,
    gradients,
    inputs_of,
    randomise,
    run_without_grad,
    sd3,
    sd35,
)


@pytest.mark.parametrize("kind", BUILDERS)
def test_revert_is_the_original_to_the_bit(kind):
    model = BUILDERS[kind]()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    out, grads = gradients(model)
    handle = flowkernels.patch(model)
    gradients(model)
    handle.revert()
    handle.revert()
    again, again_grads = gradients(model)
    assert torch.equal(again, out)
    assert all(torch.equal(again_grads[name], grad) for name, grad in grads.items())
    for name, module in model.named_modules():
        assert module.__dict__.keys() == attributes[name].keys()


def test_nothing_that_is_saved_changes():
    model = sd35()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    config = dict(model.config)
    flowkernels.patch(model)
    run_without_grad(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [name for name, _ in model.named_modules()] == names
    assert dict(model.config) == config


def test_classes_and_other_instances_are_left_alone():
    model, other = sd3(), sd3()
    forward = type(model.transformer_blocks[0]).forward
    flowkernels.patch(model)
    assert type(model.transformer_blocks[0]).forward is forward
    assert all("forward" not in module.__dict__ for module in other.modules())


def test_patching_twice_wraps_once():
    model = sd35()
    first = flowkernels.patch(model)
    bound = [block.forward for block in model.transformer_blocks]
    assert flowkernels.patch(model) is first
    assert [block.forward for block in model.transformer_blocks] == bound
    out = run_without_grad(model)
    first.revert()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert distance(out, run_without_grad(model)) < 1e-5


def test_patching_again_replaces_the_choice():
    model = sd35().to(torch.bfloat16)
    before = run_without_grad(model)
    handle = flowkernels.patch(model)
    assert flowkernels.patch(model, exact=True) is handle
    assert torch.equal(run_without_grad(model), before)
    assert flowkernels.patch(model, ops=["gelu_tanh"]) is handle
    assert {row.op for row in handle.report().patched} == {"gelu_tanh"}
    assert "forward" not in model.norm_out.__dict__


def test_context_manager():
    model = sd3()
    with flowkernels.patch(model) as handle:
        assert isinstance(handle, Handle)
        with flowkernels.patch(model):
            pass
        assert "forward" in model.transformer_blocks[0].__dict__
    assert "forward" not in model.transformer_blocks[0].__dict__
    with pytest.raises(KeyError), flowkernels.patch(model):
        raise KeyError
    assert "forward" not in model.transformer_blocks[0].__dict__


def test_dry_run_changes_nothing():
    model = sd35()
    handle = flowkernels.patch(model, dry_run=True)
    assert len(handle.report().patched) == 13
    assert "not applied" in str(handle.report())
    assert all("forward" not in module.__dict__ for module in model.modules())
    handle.revert()
    applied = flowkernels.patch(model)
    flowkernels.patch(model, dry_run=True, ops=["gelu_tanh"]).revert()
    assert "forward" in model.transformer_blocks[0].__dict__
    assert flowkernels.patch(model) is applied


def test_the_report_is_a_table_of_every_module_and_operator():
    model = flux()
    handle = flowkernels.patch(model, ops=["modulated_norm", "joint_attention"])
    lines = str(handle.report()).splitlines()
    assert lines[2].split() == ["module", "op", "status", "why"]
    cells = [line.split(maxsplit=3) for line in lines[4:]]
    assert ["transformer_blocks.0", "joint_attention", "patched"] in cells
    assert ["single_transformer_blocks.1", "gelu_tanh", "skipped", "not among ops"] in cells
    assert ["norm_out", "modulated_norm", "patched"] in cells
    assert "12 patched" not in lines[-1]
    assert lines[-1] == "9 patched, 14 skipped"
    assert not handle.report().missing


@pytest.mark.parametrize("ops", ["fast", ["modulated_norm", "swish"], {"attention"}, "gelu_tanh"])
def test_unknown_operators_are_refused(ops):
    model = sd3()
    with pytest.raises(ValueError, match=r"^ops: got "):
        flowkernels.patch(model, ops=ops)
    assert "forward" not in model.transformer_blocks[0].__dict__


@pytest.mark.parametrize("model", [None, "model", torch.zeros(1)])
def test_only_modules_are_patched(model):
    with pytest.raises(TypeError, match=r"^model: got "):
        flowkernels.patch(model)


def test_strict():
    model = sd3()
    assert flowkernels.patch(model, strict=True).report().skipped == ()
    model = sd3()
    assert flowkernels.patch(model, ops=["gelu_tanh"], strict=True).report().patched
    model = sd3()
    with pytest.raises(NotPatchedError, match=r"transformer_blocks\.0, modulated_norm: not exact"):
        flowkernels.patch(model, exact=True, strict=True)
    with pytest.raises(NotPatchedError, match="no chain for Linear"):
        flowkernels.patch(torch.nn.Linear(2, 2), strict=True)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_models_without_a_chain_are_reported():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    report = flowkernels.patch(model).report()
    assert [row.status for row in report.rows] == ["skipped"]
    assert "not served" in str(report)


def test_another_diffusers_is_compared_with_the_one_known(monkeypatch):
    from flowkernels.integrations import _sources

    monkeypatch.setattr(diffusers, "__version__", "99.0")
    assert flowkernels.patch(sd35(), strict=True).report().skipped == ()
    assert flowkernels.patch(flux(), strict=True).report().skipped == ()
    name = "JointAttnProcessor2_0.__call__"
    monkeypatch.setitem(_sources.FINGERPRINTS, name, "another")
    report = flowkernels.patch(sd35()).report()
    assert {row.module for row in report.patched} == {"norm_out"}
    assert report.skipped[0].why == f"not served: diffusers 99.0 has another {name}"


def test_fingerprints_are_of_every_function_stood_in_for():
    from flowkernels.integrations._registry import ABSENT, CHAINS
    from flowkernels.integrations._sources import FINGERPRINTS, WRITTEN_AFTER, fingerprint

    if diffusers.__version__ != WRITTEN_AFTER:
        pytest.skip(f"the table is of diffusers {WRITTEN_AFTER}")
    functions = {function for chain in CHAINS.values() for function in chain.sources}
    found = {function.__qualname__: fingerprint(function) for function in functions}
    assert found == FINGERPRINTS
    assert not ABSENT


def test_without_diffusers_only_patch_fails():
    code = """
import sys, torch
sys.modules["diffusers"] = None
import flowkernels
assert "flowkernels.integrations" not in sys.modules
try:
    flowkernels.patch(torch.nn.Linear(1, 1))
except ImportError as error:
    assert "pip install 'flowkernels[diffusers]'" in str(error), error
else:
    raise AssertionError
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_subclasses_are_skipped_with_the_reason():
    class Mine(diffusers.SD3Transformer2DModel):
        pass

    model = randomise(Mine(**SD3_SIZES))
    report = flowkernels.patch(model).report()
    assert not report.patched
    assert report.skipped[0].why == "Mine is a subclass of SD3Transformer2DModel: exact types only"

    class Block(type(model.transformer_blocks[0])):
        pass

    model = sd3()
    model.transformer_blocks[0].__class__ = Block
    before = run_without_grad(model)
    report = flowkernels.patch(model).report()
    assert "Block is a subclass of JointTransformerBlock" in report.skipped[0].why
    assert {row.module for row in report.patched} == {"transformer_blocks.1", "norm_out"}
    assert distance(run_without_grad(model), before) < 1e-5


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_deepcopy_runs_with_its_own_parameters(kind):
    model = BUILDERS[kind]()
    handle = flowkernels.patch(model)
    copied = copy.deepcopy(model)
    before = run_without_grad(model)
    randomise(copied, seed=7)
    expected = run_without_grad(randomise(BUILDERS[kind](), seed=7))
    assert distance(run_without_grad(copied), expected) < 1e-5
    assert torch.equal(run_without_grad(model), before)
    _, grads = gradients(copied)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert grads["norm_out.linear.weight"] is not None

    second = flowkernels.patch(copied)
    assert second is not handle
    assert second.model is copied
    second.revert()
    assert "forward" not in copied.transformer_blocks[0].__dict__
    assert "forward" in model.transformer_blocks[0].__dict__


def test_pickled_models_come_back_unpatched():
    model = sd35()
    before = run_without_grad(model)
    flowkernels.patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(run_without_grad(loaded), before)
    handle = flowkernels.patch(loaded)
    assert handle.report().skipped == ()
    assert distance(run_without_grad(loaded), before) < 1e-5
    handle.revert()
    assert torch.equal(run_without_grad(loaded), before)


@pytest.mark.parametrize("kind", BUILDERS)
def test_save_pretrained_and_from_pretrained(kind, tmp_path):
    model = BUILDERS[kind]()
    before = run_without_grad(model)
    flowkernels.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run_without_grad(loaded), before)
    flowkernels.patch(loaded)
    assert torch.equal(run_without_grad(loaded), run_without_grad(model))


def test_load_state_dict_into_a_patched_model():
    model, other = flux(), randomise(flux(), seed=3)
    flowkernels.patch(model)
    model.load_state_dict(other.state_dict())
    assert distance(run_without_grad(model), run_without_grad(other)) < 1e-5


def test_a_module_that_contains_the_model():
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = sd3()

    wrapper = Wrapper()
    names = {row.module for row in flowkernels.patch(wrapper).report().patched}
    assert "transformer.transformer_blocks.0" in names


def test_a_block_on_its_own_and_a_shared_block():
    model = sd3()
    block = model.transformer_blocks[0]
    report = flowkernels.patch(torch.nn.ModuleList([block, block])).report()
    assert {row.module for row in report.rows} == {"0"}
    assert inputs_of(model)
    assert flowkernels.patch(sd3().transformer_blocks[0]).report().rows[0].module == ""


def _bare(model) -> bool:
    return not any(
        "forward" in module.__dict__ or "_flowkernels_patch" in module.__dict__
        for module in model.modules()
    )


def test_handles_of_a_model_and_of_a_part_of_it():
    """Whichever is reverted first, the other finishes."""
    model = sd3()
    whole = flowkernels.patch(model)
    flowkernels.patch(model.transformer_blocks[0]).revert()
    assert "modules reverted by another handle" in str(whole.report())
    whole.revert()
    assert _bare(model)
    with flowkernels.patch(model), flowkernels.patch(torch.nn.Sequential(model)):
        pass
    assert _bare(model)


def test_an_error_inside_the_block_is_the_users():
    model = sd3()

    def use():
        with flowkernels.patch(model):
            flowkernels.patch(model.transformer_blocks[0]).revert()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        use()
    assert _bare(model)


def test_patching_again_once_a_wrapper_is_gone():
    model = sd3()
    block = model.transformer_blocks[0]
    flowkernels.patch(model)
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    flowkernels.patch(model).revert()  # the wrapper stays, and with it what it wraps
    del block.forward
    handle = flowkernels.patch(model)
    assert "forward" in block.__dict__
    handle.revert()
    assert _bare(model)
