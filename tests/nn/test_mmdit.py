"""MMDiT against a plain float64 re-implementation, and what surrounds it."""

import copy
import json

import pytest
import torch

from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.nn import block as block_module
from flowkernels.nn import single_block as single_block_module
from tests.nn.plain import (
    CLASS_CONFIG,
    CONFIGS,
    DUAL_CONFIG,
    FLUX_CONFIG,
    TEXT_CONFIG,
    build,
    inputs,
    run,
)

EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def changed(config, **options):
    return MMDiTConfig.from_dict({**config.to_dict(), **options})


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_output_and_gradients_equal_plain_pytorch_in_float64(config, checkpointing):
    config = changed(config, gradient_checkpointing=checkpointing)
    for mine, expected in zip(*run(config, torch.float64), strict=True):
        # float64 rounding through a few layers, of the largest entry
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-11 * scale)


@EVERY
def test_float32_is_as_near_to_float64_as_plain_pytorch(config):
    """At most twice as far from the truth as the plain network in float32, plus a rounding.

    The worst entry over the output and all gradients, each relative to its tensor's largest: one
    tensor's own worst entry is chance.
    """
    _, truth = run(config, torch.float64)

    def error(results):
        return max(
            (result.double() - exact).abs().max() / exact.abs().max()
            for result, exact in zip(results, truth, strict=True)
        )

    mine, other = run(config, torch.float32)
    assert error(mine) <= 2 * error(other) + 2**-23


@EVERY
def test_checkpointing_changes_nothing(config):
    results = []
    for checkpointing in (False, True):
        model = build(changed(config, gradient_checkpointing=checkpointing))
        x, t, conditions = inputs(config)
        out = model(x, t, **conditions)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    assert all(map(torch.equal, *results))


def test_modulation_reaches_the_operators_as_strided_views(monkeypatch):
    """Chunks of one matrix go to the operators as they are: no copy, the matrix's row stride."""
    seen = []
    original = block_module.gated_residual_norm

    def spy(residual, x, gate, shift, scale, **options):
        seen.append((gate, shift, scale))
        return original(residual, x, gate, shift, scale, **options)

    monkeypatch.setattr(block_module, "gated_residual_norm", spy)
    model = build(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG)
    model(x, t, **conditions)
    # two per image stream and block; the context has none in the last block
    assert len(seen) == 2 * 3 + 2 * 2
    D = CLASS_CONFIG.dim
    strides = {v.stride() for views in seen for v in views}
    assert strides == {(12 * D, 1), (8 * D, 1), (2 * D, 1)}
    assert all(v.shape == (3, D) and v._is_view() for views in seen for v in views)


def test_norms_of_single_blocks_are_fused_across_their_borders(monkeypatch):
    """Each takes the norm of the block before it: none is a pass of its own after the first."""
    calls = []
    for module, name in ((block_module, "joint"), (single_block_module, "single")):
        original = module.gated_residual_norm

        def spy(residual, x, gate, shift, scale, _original=original, _name=name, **options):
            calls.append((_name, tuple(residual.shape), shift.stride()))
            return _original(residual, x, gate, shift, scale, **options)

        monkeypatch.setattr(module, "gated_residual_norm", spy)
    model = build(FLUX_CONFIG)
    x, t, conditions = inputs(FLUX_CONFIG)
    model(x, t, **conditions)
    D = FLUX_CONFIG.dim
    joint = [call for call in calls if call[0] == "joint"]
    # The last joint block norms both streams by the first single block's chunks of 3 D.
    assert [call[2] for call in joint[-4:]] == [(12 * D, 1), (3 * D, 1)] * 2
    # 6 image tokens and 5 of text, joined; the last norm is the final layer's.
    assert calls[len(joint) :] == [
        ("single", (3, 11, D), (3 * D, 1)),
        ("single", (3, 11, D), (2 * D, 1)),
    ]


@EVERY
def test_starts_as_the_zero_velocity_and_learns_from_the_first_step(config):
    model = MMDiT(config)
    x, t, conditions = inputs(config)
    out = model(x, t, **conditions)
    assert torch.equal(out, torch.zeros_like(out))
    (out - x).square().sum().backward()
    assert model.final.weight.grad.abs().sum() > 0


def test_labels_matter_and_leaving_them_out_is_no_class():
    model = build(CLASS_CONFIG)
    x, t, _ = inputs(CLASS_CONFIG)
    by_class = [model(x, t, labels=torch.full((3,), k)) for k in range(6)]
    assert all(not torch.allclose(a, by_class[5]) for a in by_class[:5])
    assert torch.equal(model(x, t), by_class[5])
    nothing = model.null_conditions({"labels": torch.tensor([0, 1, 2])})
    assert torch.equal(model(x, t, **nothing), by_class[5])


@EVERY
def test_every_parameter_gets_a_gradient(config):
    model = build(config)
    x, t, conditions = inputs(config)
    model(x, t, **conditions).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("config", [TEXT_CONFIG, DUAL_CONFIG, FLUX_CONFIG])
def test_padded_text_is_as_if_it_were_not_there(config):
    model = build(config).double()
    x, t, conditions = inputs(config, dtype=torch.float64, lengths=False)
    lengths = torch.tensor([5, 2, 0])
    whole = model(x, t, text_lengths=lengths, **conditions)
    for row, length in enumerate(lengths):
        one = {name: value[row : row + 1] for name, value in conditions.items()}
        one["text"] = one["text"][:, :length]
        alone = model(x[row : row + 1], t[row : row + 1], **one)
        # float64 sums over other numbers of keys
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=0, atol=1e-12)
    # And what stands in the padding is read by nobody.
    conditions["text"][1, 2:] = 1e3
    assert torch.equal(model(x, t, text_lengths=lengths, **conditions), whole)


@EVERY
def test_null_conditions_say_nothing(config):
    _, _, conditions = inputs(config)
    model = build(config)
    nothing = model.null_conditions(conditions)
    assert {n: v.shape for n, v in nothing.items()} == {n: v.shape for n, v in conditions.items()}
    for name in ("text", "pooled"):
        assert not nothing.get(name, torch.zeros(1)).any()
    for name in ("guidance", "text_lengths"):
        assert nothing.get(name) is conditions.get(name)
    x, t, _ = inputs(config)
    assert model(x, t, **nothing).isfinite().all()


def test_guidance_matters():
    model = build(FLUX_CONFIG)
    x, t, conditions = inputs(FLUX_CONFIG)
    out = model(x, t, **conditions)
    assert not torch.allclose(model(x, t, **{**conditions, "guidance": torch.ones(3)}), out)


@pytest.mark.parametrize("config", [DUAL_CONFIG, FLUX_CONFIG])
def test_other_image_sizes(config):
    """A table is cropped, rotations are computed: no size but the table's is a limit."""
    model = build(config)
    _, t, conditions = inputs(config)
    for height, width in ((2, 2), (10, 4)):
        x = torch.randn(3, config.in_channels, height, width)
        assert model(x, t, **conditions).shape == x.shape


def test_unconditional_model_and_single_block():
    config = MMDiTConfig(image_size=4, in_channels=1, dim=8, depth=1, heads=1)
    out = build(config)(torch.randn(2, 1, 4, 4), torch.rand(2))
    assert out.shape == (2, 1, 4, 4)
    out.sum().backward()


@EVERY
def test_each_sample_is_independent_and_batches_may_be_empty(config):
    model = build(config)
    x, t, conditions = inputs(config)
    whole = model(x, t, **conditions)
    one = model(x[2:3], t[2:3], **{name: value[2:3] for name, value in conditions.items()})
    scale = whole.abs().max().item()
    # float32 through products of other shapes
    torch.testing.assert_close(whole[2:3], one, rtol=0, atol=1e-5 * scale)
    none = model(x[:0], t[:0], **{name: value[:0] for name, value in conditions.items()})
    assert none.shape == (0, *x.shape[1:])


@EVERY
def test_bfloat16_weights_and_autocast(config):
    model = build(config, scale=0.05)
    x, t, conditions = inputs(config)
    exact = model(x, t, **conditions)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(x, t, **conditions)
    under_autocast.float().sum().backward()
    in_bfloat16 = copy.deepcopy(model).bfloat16()(x, t, **conditions)
    for out in (under_autocast, in_bfloat16):
        assert out.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits; a dozen layers of it
        assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max() + 1e-4


@pytest.mark.slow
@EVERY
def test_torch_compile_takes_the_whole_graph(config):
    torch._dynamo.reset()
    model = build(config)
    x, t, conditions = inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, t, **conditions), model(x, t, **conditions)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = list(model.parameters())
    mine = torch.autograd.grad(out.square().sum(), weights)
    plain_gradients = torch.autograd.grad(expected.square().sum(), weights)
    scale = max(g.abs().max() for g in plain_gradients)
    for a, b in zip(mine, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(scale))


@pytest.mark.slow
@EVERY
def test_one_graph_serves_every_batch_and_text(config):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = build(config).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    # Sizes that no fixed dimension has: dynamo takes equal numbers for the same number.
    for rows, tokens in ((11, 5), (2, 4), (8, 2)):
        x, t, conditions = inputs(config, rows)
        if "text" in conditions:
            conditions["text"] = conditions["text"][:, :tokens].clone()
        out = compiled(x, t, **conditions)
        torch.testing.assert_close(out, model(x, t, **conditions), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@EVERY
def test_state_dict_holds_weights_only_and_round_trips(config):
    model, other = build(config, seed=0), build(config, seed=1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict())
    x, t, conditions = inputs(config)
    assert torch.equal(model(x, t, **conditions), other(x, t, **conditions))


def test_kept_queries_and_a_stored_table_are_buffers():
    """What nobody trains travels with the weights all the same."""
    options = {"positions": "cropped", "context_queries": True}
    state = build(changed(DUAL_CONFIG, **options)).state_dict()
    extra = set(state) - set(dict(build(DUAL_CONFIG).named_parameters()))
    name = "blocks.2.context.unused_q_"
    assert extra == {name + "weight", name + "bias", name + "norm"}
    assert state["patch_embedding.positions"].shape == (25, 16)
    assert "patch_embedding.positions" not in dict(
        MMDiT(changed(DUAL_CONFIG, **options)).named_parameters()
    )


def test_config_round_trips_through_json():
    for config in CONFIGS.values():
        assert MMDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # A dictionary from before there were variants means what it meant.
    old = {"image_size": [4, 6], "in_channels": 3, "dim": 24, "depth": 3, "heads": 2}
    assert MMDiTConfig.from_dict({**old, "num_classes": 5, "class_tokens": 2}) == CLASS_CONFIG
    assert CLASS_CONFIG.grid == (2, 3)
    assert CLASS_CONFIG.patch_dim == 12
    with pytest.raises(ValueError, match="unknown MMDiTConfig key width"):
        MMDiTConfig.from_dict({"width": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 7}, "image_size is 7"),
        ({"image_size": (4, 4, 4)}, "image_size is"),
        ({"image_size": 0}, "image_size is 0"),
        ({"dim": 10, "heads": 4}, "dim is 10; it must be a multiple of heads=4"),
        ({"dim": 6, "heads": 2}, "dim is 6; it must be a multiple of 4"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 2.0}, "heads is 2.0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"class_tokens": 0}, "class_tokens is 0"),
        ({"text_dim": 0}, "text_dim is 0"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0"),
        ({"frequency_dim": 3}, "frequency_dim is 3"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"positions": "none"}, "positions is 'none'; it must be one of sincos"),
        ({"positions": "cropped", "position_side": 15}, "position_side is 15; .* at least 16"),
        ({"position_side": 0}, "position_side is 0"),
        ({"positions": "rope"}, r"rope_axes is \(16, 56, 56\); .* add up to dim / heads = 64"),
        ({"positions": "rope", "rope_axes": (32, 32)}, r"rope_axes is \(32, 32\)"),
        ({"positions": "rope", "rope_axes": (31, 31, 2)}, "rope_axes is"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"single_depth": -1}, "single_depth is -1"),
        ({"dual_attention": (6,)}, r"dual_attention is \(6,\); .* from 0 to 5"),
        ({"dual_attention": [1, 1]}, r"dual_attention is \(1, 1\)"),
        ({"dual_attention": 2}, "dual_attention is 2"),
        ({"context_queries": True, "single_depth": 1}, "context_queries is True"),
    ],
)
def test_bad_configuration_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MMDiTConfig(**options)


def test_bad_inputs_are_named():
    model, x, t = build(CLASS_CONFIG), torch.randn(2, 3, 4, 6), torch.rand(2)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="x has shape"):
        model(x[:, :2], t, labels=labels)
    with pytest.raises(ValueError, match=r"t has shape \(\); it needs \(2,\)"):
        model(x, t[0], labels=labels)
    with pytest.raises(ValueError, match="labels has shape"):
        model(x, t, labels=labels[:1])
    with pytest.raises(ValueError, match="labels has dtype"):
        model(x, t, labels=labels.float())
    none = CLASS_CONFIG.num_classes
    with pytest.raises(ValueError, match=rf"labels has ids from 0 to {none + 1}; .* 0 to {none}$"):
        model(x, t, labels=torch.tensor([0, none + 1]))
    with pytest.raises(ValueError, match="text is given"):
        model(x, t, text=torch.randn(2, 3, 7))
    model, x = build(TEXT_CONFIG), torch.randn(2, 2, 4, 4)
    text, pooled = torch.randn(2, 3, 7), torch.randn(2, 9)
    with pytest.raises(ValueError, match="text is missing"):
        model(x, t, pooled=pooled)
    with pytest.raises(ValueError, match="pooled has shape"):
        model(x, t, text=text, pooled=pooled[:, :3])
    with pytest.raises(ValueError, match="num_classes=0"):
        model(x, t, text=text, pooled=pooled, labels=labels)
    with pytest.raises(ValueError, match=r"guidance is given: .* guidance_embed=False"):
        model(x, t, text=text, pooled=pooled, guidance=t)
    for lengths, message in (
        (torch.tensor([1]), r"text_lengths has shape \(1,\); it needs \(2,\)"),
        (torch.tensor([1.0, 2.0]), "text_lengths has dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, t, text=text, pooled=pooled, text_lengths=lengths)
    with pytest.raises(ValueError, match="text_lengths is given"):
        build(CLASS_CONFIG)(torch.randn(2, 3, 4, 6), t, text_lengths=labels)


def test_bad_inputs_of_the_variants_are_named():
    x, t, conditions = inputs(FLUX_CONFIG)
    model, guidance = build(FLUX_CONFIG), conditions.pop("guidance")
    with pytest.raises(ValueError, match="guidance is missing"):
        model(x, t, **conditions)
    with pytest.raises(ValueError, match=r"guidance has shape \(\); it needs \(3,\)"):
        model(x, t, guidance=guidance[0], **conditions)
    for shape in ((3, 2, 5, 4), (3, 2, 0, 4), (3, 3, 4, 4), (2, 4, 4)):
        with pytest.raises(ValueError, match=r"x has shape .* multiples of patch_size=2"):
            model(torch.randn(shape), t, guidance=guidance, **conditions)
    x, t, conditions = inputs(DUAL_CONFIG)
    with pytest.raises(ValueError, match="its sides may be at most 10"):
        build(DUAL_CONFIG)(torch.randn(3, 3, 4, 12), t, **conditions)
