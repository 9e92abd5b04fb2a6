"""LatentDiscriminator: shapes, minibatch statistics, R1, conditions, and what training asks."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flowkernels.nn import LatentDiscriminator, LatentDiscriminatorConfig, MinibatchStd
from tests.nn.penalty import assert_r1_gradient, separate

DIGITS = LatentDiscriminatorConfig(in_channels=1, num_classes=10)
LATENTS = LatentDiscriminatorConfig(in_channels=4, width=8, depth=3, max_width=32, stem_stride=1)


def build(config=DIGITS, seed=0, **options):
    """A discriminator whose biases and classes are not zero."""
    torch.manual_seed(seed)
    model = LatentDiscriminator(
        LatentDiscriminatorConfig.from_dict({**config.to_dict(), **options})
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    if model.classes is not None:
        torch.nn.init.normal_(model.classes.weight[:-1].detach())
    return model


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (DIGITS, (8, 8)),
        (LATENTS, (32, 32)),
        (LATENTS, (4, 4)),
        (LATENTS, (5, 7)),
        (LATENTS, (33, 18)),
        (LatentDiscriminatorConfig(16, width=4, depth=4, stem_stride=2), (64, 64)),
        (LatentDiscriminatorConfig(3, width=4, depth=4, stem_stride=3), (13, 4)),
    ],
)
def test_one_finite_logit_per_sample_at_any_size(config, size, batch):
    x = torch.randn(batch, config.in_channels, *size, requires_grad=True)
    logits = build(config)(x)
    assert logits.shape == (batch,)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert torch.isfinite(logits).all()
    # Every pixel counts, those of an odd edge too.
    assert (gradient.abs().amax(dim=1) > 0).all()


def naive_groups(batch, group_size):
    """Sizes as even as can be, the larger ones first."""
    count = -(-batch // group_size)
    return [batch // count + (index < batch % count) for index in range(count)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 23), st.integers(2, 9))
def test_groups_take_everyone_and_none_is_larger_than_asked(batch, group_size):
    torch.manual_seed(batch)
    x = torch.randn(batch, 3, 2, 1, dtype=torch.float64)
    sizes = naive_groups(batch, group_size)
    assert sum(sizes) == batch
    assert max(sizes) <= group_size
    assert max(sizes) - min(sizes) <= 1
    expected = []
    for group in x.split(sizes):
        variance = group.var(dim=0) if len(group) > 1 else torch.zeros_like(group[0])
        expected += [(variance + 1e-4).sqrt().mean()] * len(group)
    out = MinibatchStd(group_size)(x)
    assert torch.equal(out[:, :3], x)
    expected = torch.stack(expected).view(-1, 1, 1, 1).expand(-1, 1, 2, 1)
    torch.testing.assert_close(out[:, 3:], expected, rtol=1e-12, atol=0)


def test_minibatch_std_sees_a_collapsed_batch():
    x = torch.randn(8, 6, 2, 2)
    layer = MinibatchStd(4)
    same = x[:1].expand_as(x)
    assert layer(x)[:, -1].mean() > 0.7
    torch.testing.assert_close(layer(same)[:, -1], torch.full((8, 2, 2), 0.01))


@pytest.mark.parametrize("sizes", [(5, 3), (1, 7), (4, 4), (6, 1)])
def test_real_logits_do_not_depend_on_the_fake_samples(sizes):
    """Real and fake share no minibatch-std group: not a bit changes, no gradient flows."""
    model = build()
    real, *fakes = torch.randn(sizes[0], 1, 8, 8), *torch.randn(2, sizes[1], 1, 8, 8)
    labels = torch.arange(sum(sizes))
    fakes[1] *= 100
    results = [model(torch.cat([real, f]), segments=sizes, labels=labels) for f in fakes]
    assert torch.equal(results[0][: sizes[0]], results[1][: sizes[0]])
    assert not torch.isclose(results[0][sizes[0] :], results[1][sizes[0] :]).all()

    fake = fakes[0].requires_grad_()
    logits = model(torch.cat([real, fake]), segments=sizes, labels=labels)
    (gradient,) = torch.autograd.grad(logits[: sizes[0]].sum(), fake)
    assert not gradient.any()
    # Without segments they do meet, which is what the argument is for.
    mixed = [model(torch.cat([real, f]), labels=labels)[: sizes[0]] for f in fakes]
    if sizes[0] % 4:
        assert not torch.equal(*mixed)


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_pairs_are_two_separate_calls(batch):
    model = build()
    real, fake = torch.randn(2, batch, 1, 8, 8)
    labels = torch.randint(0, 11, (batch,))
    one = model.pairs(real, fake, labels=labels)
    two = model(real, labels=labels), model(fake, labels=labels)
    # Another batch size may take another order of summation: float32 rounding.
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 8])
@pytest.mark.parametrize("config", [DIGITS, LATENTS], ids=["digits", "latents"])
def test_r1_gradient_equals_finite_differences_in_float64(config, batch):
    model = build(config).double()
    x = torch.randn(batch, config.in_channels, 7, 6, dtype=torch.float64)
    # Not "no class": its row has no gradient by design, and the differences would move it.
    labels = torch.randint(0, 10, (batch,))
    assert_r1_gradient(model, x, labels=labels)


def test_r1_is_finite_where_all_samples_are_equal():
    """The usual place of a NaN: the root in the minibatch standard deviation."""
    model = build()
    x = torch.ones(4, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (DIGITS, 8),
        (LatentDiscriminatorConfig(4, width=32, depth=3, stem_stride=1), 32),
        (LatentDiscriminatorConfig(16, width=16, depth=3), 64),
    ],
    ids=["digits", "latents32", "latents64"],
)
def test_input_gradient_starts_at_order_one(config, size):
    """R1 with weight 1 is then neither nothing nor everything."""
    norms = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(4, config.in_channels, size, size, requires_grad=True)
        (gradient,) = torch.autograd.grad(LatentDiscriminator(config)(x).sum(), x)
        norms.append(gradient.flatten(1).norm(dim=1).mean())
    assert 0.2 < torch.stack(norms).mean() < 5


def test_label_projection_and_no_class():
    model = build()
    x = torch.randn(3, 1, 8, 8)
    plain = model(x)
    assert torch.equal(model(x, labels=torch.full((3,), 10)), plain)
    by_class = [model(x, labels=torch.full((3,), k)) for k in range(10)]
    assert all(not torch.isclose(logits, plain).any() for logits in by_class)
    model(x, labels=torch.tensor([2, 10, 10])).sum().backward()
    touched = model.classes.weight.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == [2]


def test_a_new_discriminator_knows_no_class():
    model = LatentDiscriminator(DIGITS)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, labels=torch.tensor([1, 2])), model(x))


def test_time_and_foreign_conditions_are_accepted_and_not_read():
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    model = build(num_classes=0)
    logits = model(x, t, labels=torch.tensor([0, 1, 2]), text=torch.randn(3, 5, 7))
    assert torch.equal(logits, model(x))
    real, fake = model.pairs(x, 2 * x, t, text=torch.randn(3, 5, 7))
    assert real.shape == fake.shape == (3,)


def test_learns_to_tell_two_gaussians_apart():
    torch.manual_seed(0)
    model = LatentDiscriminator(DIGITS)
    assert separate(model, lambda: torch.randn(32, 1, 8, 8), steps=40) > 0.95


def test_classes_are_learned():
    """Real and fake differ by whether the label is right, and by nothing else."""
    torch.manual_seed(0)
    model = LatentDiscriminator(LatentDiscriminatorConfig(1, width=16, num_classes=2))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)

    def batch():
        labels = torch.randint(0, 2, (64,))
        return labels.view(-1, 1, 1, 1) * 2 - 1 + torch.randn(64, 1, 8, 8), labels

    for _ in range(60):
        x, labels = batch()
        right, wrong = model(x, labels=labels), model(x, labels=1 - labels)
        loss = (F.softplus(-right) + F.softplus(wrong)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, labels = batch()
    assert (model(x, labels=labels) > 0).float().mean() > 0.95
    assert (model(x, labels=1 - labels) < 0).float().mean() > 0.95
    assert not model.classes.weight[2].any()


def test_same_bits_each_time_and_in_each_mode():
    x = torch.randn(6, 1, 8, 8)
    results = []
    for mode in (True, False, True):
        model = build().train(mode)
        logits = model(x)
        gradients = torch.autograd.grad(logits.sum(), [model.stem.weight, model.mix.weight])
        results.append((logits, *gradients))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("config", [DIGITS, LATENTS], ids=["digits", "latents"])
def test_bfloat16_autocast_and_bfloat16_weights(config):
    model = build(config)
    x = torch.randn(5, config.in_channels, 8, 8, requires_grad=True)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.float32
    # A dozen roundings to 8 bits, each on the size of the features; logits are of order 1.
    scale = exact.abs().max().clamp_min(1)
    torch.testing.assert_close(logits, exact, rtol=0, atol=12 * 2**-8 * scale.item())
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert torch.isfinite(model.stem.weight.grad).all()
    narrow = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=0, atol=24 * 2**-8 * scale.item())


def test_state_dict_and_config_round_trip():
    model = build()
    values = json.loads(json.dumps(model.config.to_dict()))
    other = LatentDiscriminator(LatentDiscriminatorConfig.from_dict(values))
    other.load_state_dict(model.state_dict())
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 9, 10])
    assert torch.equal(other(x, labels=labels), model(x, labels=labels))
    assert torch.equal(copy.deepcopy(model)(x, labels=labels), model(x, labels=labels))


def test_compiles_to_one_graph():
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 1, 8, 8, requires_grad=True)
    labels = torch.randint(0, 11, (7,))
    pair = [f(x, segments=(4, 3), labels=labels) for f in (model, compiled)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(logits.sum(), x)[0] for logits in pair]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_groups_of_a_batch_of_unknown_size_compile():
    layer = MinibatchStd(4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for batch in (7, 10):
        x = torch.randn(batch, 3, 2, 2)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0; it must be an int of at least 1"),
        ({"width": 2.0}, "width is 2.0"),
        ({"depth": 0}, "depth is 0"),
        ({"width": 64, "max_width": 32}, "max_width is 32; it must be an int of at least width=64"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"group_size": True}, "group_size is True"),
        ({"stem_stride": 0}, "stem_stride is 0"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LatentDiscriminatorConfig(**options)


def test_unknown_configuration_keys_are_named():
    with pytest.raises(ValueError, match="unknown LatentDiscriminatorConfig key heads; known are"):
        LatentDiscriminatorConfig.from_dict({"heads": 2})


def test_bad_inputs_are_named():
    model = build()
    x = torch.randn(4, 1, 8, 8)
    for bad in (x[0], x.expand(4, 2, 8, 8), x[..., :3]):
        with pytest.raises(ValueError, match=r"x has shape .*; it needs \(B, 1, H, W\)"):
            model(bad)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); it needs \(4,\)"):
        model(x, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels has dtype torch.float32"):
        model(x, labels=torch.zeros(4))
    with pytest.raises(ValueError, match=r"labels has ids from -1 to 0; "):
        model(x, labels=torch.tensor([0, 0, 0, -1]))
    for segments in ((2, 3), (5, -1)):
        with pytest.raises(ValueError, match="sizes that add up to the batch, 4"):
            model(x, segments=segments)
    with pytest.raises(ValueError, match=r"fake has shape \(3, 1, 8, 8\)"):
        model.pairs(x, x[:3])
