"""MMDiT against a plain float64 re-implementation, and what surrounds it."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.nn import block as block_module
from flowkernels.nn.embeddings import patchify, sincos_positions_2d, timestep_embedding, unpatchify

CLASS_CONFIG = MMDiTConfig(
    image_size=(4, 6),
    in_channels=3,
    patch_size=2,
    dim=24,
    depth=3,
    heads=2,
    num_classes=5,
    class_tokens=2,
)
TEXT_CONFIG = MMDiTConfig(
    image_size=4,
    in_channels=2,
    patch_size=1,
    dim=16,
    depth=2,
    heads=2,
    mlp_ratio=3.0,
    text_dim=7,
    pooled_dim=9,
    qk_norm=True,
    frequency_dim=32,
)


def build(config, seed=0, scale=0.3):
    """A model with no zeros in it, so that every weight matters."""
    torch.manual_seed(seed)
    model = MMDiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model


def inputs(config, rows=3, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(rows, config.in_channels, *config.image_shape).to(dtype)
    t = torch.rand(rows)
    if config.text_dim is None:
        return x, t, {"labels": torch.randint(0, config.num_classes + 1, (rows,))}
    text = torch.randn(rows, 5, config.text_dim).to(dtype)
    return x, t, {"text": text, "pooled": torch.randn(rows, config.pooled_dim).to(dtype)}


def plain(weights, config, x, t, labels=None, text=None, pooled=None):
    """The same network from its weights, in the plainest PyTorch: no fusion, no views."""
    D, H, depth = config.dim, config.heads, config.depth

    def linear(name, h):
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def vector_mlp(name, h):
        return linear(f"{name}.fc2", F.silu(linear(f"{name}.fc1", h)))

    def norm(h, shift, scale):
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, unbiased=False, keepdim=True)
        return (h - mean) / (variance + config.eps).sqrt() * (1 + scale) + shift

    def heads(h, name, count):
        parts = linear(f"{name}.qkv", h).chunk(count, -1)
        parts = [p.reshape(*p.shape[:2], H, D // H).transpose(1, 2) for p in parts]
        if config.qk_norm:
            for index, weight in ((-2, "k_weight"), *([(-3, "q_weight")] if count == 3 else [])):
                p = parts[index]
                rms = (p.square().mean(-1, keepdim=True) + config.eps).sqrt()
                parts[index] = p / rms * weights[f"{name}.qk_norm.{weight}"]
        return parts

    positions = sincos_positions_2d(D, *config.grid).to(x.dtype)
    h = linear("patch_embedding.projection", patchify(x, config.patch_size)) + positions
    vector = vector_mlp("time_embedding", timestep_embedding(t, config.frequency_dim).to(x.dtype))
    if text is None:
        vector = vector + weights["class_embedding.weight"][labels]
        c = weights["context_embedding.table.weight"][labels].view(len(x), -1, D)
    else:
        vector = vector + vector_mlp("pooled_embedding", pooled)
        c = linear("context_embedding", text)
    vector = F.silu(vector)
    for i in range(depth):
        last = i == depth - 1
        mods = [m[:, None] for m in linear(f"modulations.{i}", vector).split(D, -1)]
        x_mod, c_mod = mods[:6], mods[6:]
        q, k, v = heads(norm(h, *x_mod[:2]), f"blocks.{i}.image", 3)
        context = heads(norm(c, *c_mod[:2]), f"blocks.{i}.context", 2 if last else 3)
        q = q if last else torch.cat([q, context[0]], 2)
        k, v = torch.cat([k, context[-2]], 2), torch.cat([v, context[-1]], 2)
        out = (q @ k.mT / (D // H) ** 0.5).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        streams = [("image", h, x_mod, out[:, : h.shape[1]])]
        if not last:
            streams.append(("context", c, c_mod, out[:, h.shape[1] :]))
        done = []
        for stream, s, (_, _, gate1, shift2, scale2, gate2), attended in streams:
            name = f"blocks.{i}.{stream}"
            s = s + gate1 * linear(f"{name}.out", attended)
            hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(s, shift2, scale2)), approximate="tanh")
            done.append(s + gate2 * linear(f"{name}.mlp.fc2", hidden))
        h, c = done[0], done[-1]
    shift, scale = (m[:, None] for m in linear("final_modulation", vector).chunk(2, -1))
    out = linear("final", norm(h, shift, scale))
    return unpatchify(out, config.in_channels, config.patch_size, config.grid)


def gradients_of(function, x, weights):
    """(output, gradient of x, gradients of the weights) of a fixed random functional."""
    x = x.detach().requires_grad_()
    out = function(x)
    torch.manual_seed(2)
    weight = torch.randn(x.shape, dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), [x, *weights])


def run(config, dtype):
    """(model, plain) in `dtype`, each an output and all gradients."""
    model = build(config).to(dtype)
    x, t, conditions = inputs(config, dtype=dtype)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    mine = gradients_of(lambda x: model(x, t, **conditions), x, list(model.parameters()))
    other = gradients_of(
        lambda x: plain(weights, config, x, t, **conditions), x, list(weights.values())
    )
    return mine, other


@pytest.mark.parametrize("config", [CLASS_CONFIG, TEXT_CONFIG], ids=["classes", "text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_output_and_gradients_equal_plain_pytorch_in_float64(config, checkpointing):
    config = MMDiTConfig.from_dict({**config.to_dict(), "gradient_checkpointing": checkpointing})
    for mine, expected in zip(*run(config, torch.float64), strict=True):
        # float64 rounding through a few layers, of the largest entry
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("config", [CLASS_CONFIG, TEXT_CONFIG], ids=["classes", "text"])
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


def test_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        config = MMDiTConfig.from_dict(
            {**CLASS_CONFIG.to_dict(), "gradient_checkpointing": checkpointing}
        )
        model = build(config)
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


def test_starts_as_the_zero_velocity_and_learns_from_the_first_step():
    model = MMDiT(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG)
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


def test_null_conditions_of_text_are_zeros():
    _, _, conditions = inputs(TEXT_CONFIG)
    nothing = build(TEXT_CONFIG).null_conditions(conditions)
    assert {n: v.shape for n, v in nothing.items()} == {n: v.shape for n, v in conditions.items()}
    assert all(not v.any() for v in nothing.values())


def test_unconditional_model_and_single_block():
    config = MMDiTConfig(image_size=4, in_channels=1, dim=8, depth=1, heads=1)
    out = build(config)(torch.randn(2, 1, 4, 4), torch.rand(2))
    assert out.shape == (2, 1, 4, 4)
    out.sum().backward()


def test_each_sample_is_independent_and_batches_may_be_empty():
    model = build(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG, rows=4)
    whole = model(x, t, **conditions)
    one = model(x[2:3], t[2:3], labels=conditions["labels"][2:3])
    torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-4)
    assert model(x[:0], t[:0], labels=conditions["labels"][:0]).shape == (0, 3, 4, 6)


def test_bfloat16_weights_and_autocast():
    model = build(CLASS_CONFIG, scale=0.05)
    x, t, conditions = inputs(CLASS_CONFIG)
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
@pytest.mark.parametrize("config", [CLASS_CONFIG, TEXT_CONFIG], ids=["classes", "text"])
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


def test_state_dict_holds_weights_only_and_round_trips():
    model, other = build(CLASS_CONFIG, seed=0), build(CLASS_CONFIG, seed=1)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict())
    x, t, conditions = inputs(CLASS_CONFIG)
    assert torch.equal(model(x, t, **conditions), other(x, t, **conditions))


def test_config_round_trips_through_json():
    for config in (CLASS_CONFIG, TEXT_CONFIG):
        assert MMDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
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
