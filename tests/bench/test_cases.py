"""Shapes, cases and the check that precedes every timing."""

from __future__ import annotations

import json

import pytest
import torch

from bench import machine, numerics, shapes, test_modulate
from bench.cases import Context, Random, rotation
from bench.gpu_build import architecture
from bench.measure import measure, peak_memory

TINY = Context(level="tiny", compile_backend="eager", seconds=0.0)


def test_models_have_their_widths():
    assert [model.width for model in shapes.MODELS] == [1536, 1536, 2432, 3072]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_targets_name_comes_first(device: str):
    listed = dict(shapes.token_shapes("default", device))
    assert listed[4, 1024, 1536] == 0
    assert dict(shapes.latent_shapes("default"))[16, 16, 128, 128] == 0
    assert dict(shapes.latent_shapes("default"))[32, 4, 32, 32] == 0


def test_a_full_run_has_every_model_batch_and_length():
    found = [shape for shape, _ in shapes.token_shapes("full", "cpu")]
    assert len(found) == len(set(found))
    for width in (1536, 2432, 3072):
        for batch in shapes.BATCHES:
            for tokens in shapes.IMAGE_TOKENS:
                assert (batch, tokens, width) in found


def test_a_block_has_36_squares_of_its_width():
    count = sum(torch.Size(shape).numel() for shape in shapes.block_parameters(1536))
    assert 36 * 1536**2 <= count < 1.001 * 36 * 1536**2


def test_inputs_rotate_until_the_cache_is_full():
    context = Context()
    cache = machine.cache_bytes("cpu")
    assert rotation(cache // 4, context) >= 12
    assert rotation(100 * cache, context) == 2
    assert rotation(1, context) <= 64


def test_inputs_are_random_and_repeatable():
    made = [Random(3, torch.float32, torch.device("cpu")).normal(64) for _ in range(2)]
    assert torch.equal(*made)
    assert made[0].std() > 0.5


def case(name: str):
    return next(c for c in test_modulate.cases(TINY) if c.id == name)


def test_modulation_operands_are_strided_leaves():
    prepared = case("modulated_norm-2x8x48-float32-forward+backward").build(TINY)
    assert set(prepared.variants) == {"ours", "eager", "compile", "copy"}
    gradients = prepared.variants["ours"](0)
    assert [tuple(g.shape) for g in gradients] == [(2, 8, 48), (2, 48), (2, 48)]


def test_bytes_are_counted_once_a_pass():
    prepared = case("modulated_norm-2x8x48-float32-forward+backward").build(TINY)
    x, operand = 2 * 8 * 48 * 4, 2 * 48 * 4
    forward = x + 2 * operand + x
    backward = x + (x + operand) + (x + 2 * operand)  # grad; x and scale; three gradients
    assert prepared.bytes_moved == forward + backward


def test_a_measured_case_gives_a_row_that_json_takes():
    found = measure(case("modulated_norm-2x8x48-float32-forward"), TINY)
    row = json.loads(json.dumps(found.row))
    assert set(row["ratio"]) == {"eager", "compile"}
    assert row["bandwidth_fraction"] > 0
    assert set(found.samples) == {"ours", "eager", "compile", "copy"}
    assert row["relative_error"]["ours"] < 1e-5


def test_a_variant_that_computes_something_else_is_not_timed():
    truth = [torch.randn(100).double()]
    eager = [truth[0].float()]
    names = ["output 0"]
    numerics.verify({"eager": eager, "ours": eager}, truth, torch.float32, names)
    with pytest.raises(AssertionError, match=r"ours, output 0: error"):
        numerics.verify({"eager": eager, "ours": [eager[0] + 0.01]}, truth, torch.float32, names)
    with pytest.raises(AssertionError, match=r"eager, output 0: relative error"):
        numerics.verify({"eager": [eager[0] * 2]}, truth, torch.float32, names)
    poisoned = eager[0].clone()
    poisoned[7] = float("nan")
    with pytest.raises(AssertionError, match=r"ours, output 0"):
        numerics.verify({"eager": eager, "ours": [poisoned]}, truth, torch.float32, names)


def test_peak_memory_counts_what_a_call_allocates():
    found = peak_memory(lambda index: torch.empty(1 << 20), "cpu")
    assert found is None or found >= 4 << 20


@pytest.mark.parametrize(("chip", "name"), [((8, 0), "8.0"), ((9, 0), "9.0a"), ((10, 0), "10.0a")])
def test_architecture_names(chip: tuple[int, int], name: str):
    assert architecture(chip) == name
