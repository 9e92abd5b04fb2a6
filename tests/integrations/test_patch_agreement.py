"""Patched and original models agree: output and every gradient, in each dtype, at many shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import flowkernels
from flowkernels.integrations._state import OPS
from tests.integrations.models import (
    BUILDERS,
    as_double,
    as_dtype,
    blocks_of,
    distance,
    flux,
    gradients,
    inputs_of,
    run_without_grad,
    sd3,
)

# As the design has it: float32 within this of the original, in the norm of each tensor.
FLOAT32 = 1e-5
# bfloat16: at most this times eager's own distance from float64. Distances are norms over a
# tensor; below FLOOR, a thousandth of bfloat16's epsilon times the tensor, both are rounding noise.
TWICE, FLOOR = 2.0, 1e-5

SHAPES = {
    "sd3": [{}, {"batch": 1, "text": 1}, {"batch": 5, "height": 2, "width": 2, "text": 3}],
    "sd35": [{}, {"batch": 1, "text": 1}, {"batch": 5, "height": 10, "width": 14, "text": 13}],
    "flux": [{}, {"batch": 1, "tokens": 1, "text": 1}, {"batch": 5, "tokens": 33, "text": 13}],
}
CASES = [(kind, sizes) for kind, all_sizes in SHAPES.items() for sizes in all_sizes]


def _same_everywhere(model: nn.Module, inputs: dict[str, Any]) -> None:
    """float32: every tensor within FLOAT32 of eager's, and the same gradients are None.

    Where rounding alone is as large (biases of keys, whose gradients nearly cancel): within FLOAT32
    of float64, or at most twice as far from it as eager's own.
    """
    out, grads = gradients(model, inputs)
    with flowkernels.patch(model) as handle:
        patched_out, patched_grads = gradients(model, inputs)
        assert not handle.report().fallbacks
    assert distance(patched_out, out) <= FLOAT32
    far = []
    for name, grad in grads.items():
        found = patched_grads[name]
        assert (found is None) == (grad is None), name
        if grad is not None and (found - grad).norm() > FLOAT32 * grad.norm():
            far.append(name)
    if far:
        _, truths = gradients(as_double(model), as_dtype(inputs, torch.float64))
    for name in far:
        allowed = max(FLOAT32, TWICE * distance(grads[name], truths[name]))
        assert distance(patched_grads[name], truths[name]) <= allowed, name


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_float32_output_and_gradients(kind, sizes):
    model = BUILDERS[kind]()
    _same_everywhere(model, inputs_of(model, **sizes))


@pytest.mark.parametrize("kind", BUILDERS)
def test_bfloat16_stays_within_twice_of_eagers_error(kind):
    model = BUILDERS[kind]().to(torch.bfloat16)
    inputs = inputs_of(model)
    truth = gradients(as_double(model), as_dtype(inputs, torch.float64))
    eager = gradients(model, inputs)
    with flowkernels.patch(model):
        ours = gradients(model, inputs)
    assert distance(ours[0], truth[0]) <= TWICE * distance(eager[0], truth[0]) + FLOOR
    for name, true in truth[1].items():
        if true is None or true.norm() < 1e-9:
            continue
        allowed = TWICE * distance(eager[1][name], true) + FLOOR
        assert distance(ours[1][name], true) <= allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_exact_is_equal_to_the_bit(kind, sizes, dtype, monkeypatch):
    """As where the GELU is exact (here it need not be), so that every block runs as a chain."""
    from flowkernels.integrations import _chain

    monkeypatch.setattr(_chain, "check_gelu", lambda device, dtype: True)
    model = BUILDERS[kind]().to(dtype)
    inputs = inputs_of(model, **sizes)
    before = run_without_grad(model, inputs)
    with flowkernels.patch(model, exact=True) as handle:
        assert all("forward" in block.__dict__ for block in blocks_of(model))
        assert torch.equal(run_without_grad(model, inputs), before)
        with torch.enable_grad():
            out, _ = gradients(model, inputs)
        assert torch.equal(out, before)
        assert not handle.report().fallbacks


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_as_it_is_here(kind, dtype):
    model = BUILDERS[kind]().to(dtype)
    before = run_without_grad(model)
    with flowkernels.patch(model, exact=True):
        assert torch.equal(run_without_grad(model), before)


def test_the_exact_gelu_is_taken_where_every_value_was_tried(monkeypatch):
    """A GELU that is torch's own passes the trial and runs; one that is not is left out."""
    from flowkernels.integrations import _chain

    monkeypatch.setattr(_chain, "_EXACT_GELU", {})
    calls = []

    def torchs(x, bias=None):
        calls.append(x.dtype)
        return torch.nn.functional.gelu(x, approximate="tanh")

    monkeypatch.setattr(_chain, "gelu_tanh", torchs)
    model = sd3().to(torch.bfloat16)
    before = run_without_grad(model)
    with flowkernels.patch(model, exact=True) as handle:
        assert {row.op for row in handle.report().patched} == {"gelu_tanh"}
        calls.clear()
        assert torch.equal(run_without_grad(model), before)
        assert len(calls) == 3  # two blocks; the last has no feed-forward for the text

    monkeypatch.setattr(_chain, "_EXACT_GELU", {})
    monkeypatch.setattr(_chain, "gelu_tanh", lambda x, bias=None: torchs(x) * 1.01)
    assert not flowkernels.patch(model, exact=True).report().patched


def test_exact_names_what_is_not():
    report = flowkernels.patch(BUILDERS["sd35"](), exact=True, dry_run=True).report()
    reasons = {row.op: row.why for row in report.rows if row.module == "transformer_blocks.0"}
    for op in ("modulated_norm", "gated_residual", "gated_residual_norm", "qk_norm_rope"):
        assert reasons[op].startswith("not exact: ")
    assert {row.op for row in report.patched} <= {"gelu_tanh"}
    report = flowkernels.patch(flux(), exact=True, dry_run=True).report()
    served = {(row.module, row.op) for row in report.patched if row.op != "gelu_tanh"}
    assert served == {(f"transformer_blocks.{index}", "joint_attention") for index in range(2)}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("op", OPS)
def test_each_operator_alone(kind, op):
    model = BUILDERS[kind]()
    before = run_without_grad(model)
    with flowkernels.patch(model, ops=[op]) as handle:
        assert {row.op for row in handle.report().patched} <= {op}
        assert distance(run_without_grad(model), before) <= FLOAT32


@pytest.mark.parametrize("ops", ["auto", ["joint_attention"]])
def test_no_gradient_and_inference_mode_agree(ops):
    """Side by side streams of FLUX's single blocks are read without a copy there."""
    for build in BUILDERS.values():
        model = build()
        before = run_without_grad(model)
        with flowkernels.patch(model, ops=ops):
            assert distance(run_without_grad(model), before) <= FLOAT32
            with torch.inference_mode():
                assert distance(run_without_grad(model), before) <= FLOAT32


def test_fused_projections():
    for build in BUILDERS.values():
        model = build(**({"dual_attention_layers": ()} if build is BUILDERS["sd35"] else {}))
        model.fuse_qkv_projections()
        before = run_without_grad(model)
        with flowkernels.patch(model) as handle:
            assert distance(run_without_grad(model), before) <= FLOAT32
            assert not handle.report().fallbacks


# Real widths: one or two blocks, few tokens.
REAL = {
    "SD3-medium": lambda: sd3(num_attention_heads=24, attention_head_dim=64, **_wide(1536)),
    "SD3.5-medium": lambda: sd3(
        num_attention_heads=24,
        attention_head_dim=64,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
        **_wide(1536),
    ),
    "SD3.5-large": lambda: sd3(
        num_attention_heads=38, attention_head_dim=64, qk_norm="rms_norm", **_wide(2432)
    ),
    "FLUX.1-dev": lambda: flux(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=24,
        attention_head_dim=128,
        axes_dims_rope=(16, 56, 56),
    ),
}


def _wide(width: int) -> dict[str, int]:
    return {"caption_projection_dim": width, "joint_attention_dim": 32}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_widths(name, monkeypatch):
    from flowkernels.integrations import _chain

    model = REAL[name]()
    inputs = inputs_of(model, batch=1, text=5)
    _same_everywhere(model, inputs)
    model.zero_grad(set_to_none=True)
    model = model.to(torch.bfloat16)
    inputs = as_dtype(inputs, torch.bfloat16)
    eager = run_without_grad(model, inputs)
    monkeypatch.setattr(_chain, "check_gelu", lambda device, dtype: True)
    with flowkernels.patch(model, exact=True):
        assert torch.equal(run_without_grad(model, inputs), eager)
    with flowkernels.patch(model):
        ours = run_without_grad(model, inputs)
    truth = run_without_grad(model.double(), as_dtype(inputs, torch.float64))
    assert distance(ours, truth) <= TWICE * distance(eager, truth) + FLOOR
