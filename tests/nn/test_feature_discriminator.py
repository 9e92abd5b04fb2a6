"""FeatureDiscriminator, and the features of MMDiT that it reads."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from flowkernels.nn import FeatureDiscriminator, MMDiT, MMDiTConfig
from tests.nn.penalty import assert_r1_gradient, separate
from tests.nn.plain import CLASS_CONFIG, CONFIGS, FLUX_CONFIG, build, inputs

EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def discriminator(config, layers=None, dtype=torch.float32, scale=0.3):
    """On a teacher with no zeros in it."""
    teacher = build(config, scale=scale).to(dtype)
    torch.manual_seed(2)
    return FeatureDiscriminator(teacher, layers, width=6).to(dtype)


def block_outputs(model, x, t, conditions):
    """The image tokens after each block of a `forward`, by hooks."""
    seen = []
    blocks = [*model.blocks, *model.single_blocks]
    tokens = x.shape[2] * x.shape[3] // model.config.patch_size**2
    handles = [b.register_forward_hook(lambda _, __, out: seen.append(out)) for b in blocks]
    model(x, t, **conditions)
    for handle in handles:
        handle.remove()
    return [out[0][:, :tokens] for out in seen]


@EVERY
def test_features_are_the_bits_of_forward(config):
    model = build(config)
    x, t, conditions = inputs(config)
    expected = block_outputs(model, x, t, conditions)
    layers = range(len(expected))
    assert all(map(torch.equal, model.features(x, t, layers, **conditions), expected))
    first, again = model.features(x, t, (1, 0), **conditions)
    assert torch.equal(first, expected[1])
    assert torch.equal(again, expected[0])


@EVERY
def test_blocks_after_the_last_one_chosen_do_not_run(config):
    model = build(config)
    x, t, conditions = inputs(config)
    ran = []
    for index, block in enumerate((*model.blocks, *model.single_blocks)):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for last in range(len(model.blocks) + len(model.single_blocks)):
        ran.clear()
        model.features(x, t, (last,), **conditions)
        assert ran == list(range(last + 1))


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradient_to_the_input_alone(config, checkpointing):
    model = discriminator(dataclasses.replace(config, gradient_checkpointing=checkpointing))
    x, t, conditions = inputs(config)
    x.requires_grad_()
    logits = model(x, t, **conditions)
    assert logits.shape == (3,)
    logits.sum().backward()
    assert (x.grad.flatten(1).abs().amax(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters())


@EVERY
def test_checkpointing_changes_nothing(config):
    results = []
    for checkpointing in (False, True):
        model = discriminator(dataclasses.replace(config, gradient_checkpointing=checkpointing))
        x, t, conditions = inputs(config)
        x.requires_grad_()
        logits = model(x, t, **conditions)
        results.append((logits, *torch.autograd.grad(logits.sum(), [x, *model.parameters()])))
    assert all(map(torch.equal, *results))


def test_input_gradient_is_that_of_the_formula():
    """float64, where every operator takes its formula: finite differences through the teacher."""
    model = discriminator(CLASS_CONFIG, dtype=torch.float64)
    x, t, conditions = inputs(CLASS_CONFIG, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: model(x, t, **conditions), x.requires_grad_(), fast_mode=True
    )


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_r1_gradient_equals_finite_differences_in_float64(config, checkpointing):
    config = dataclasses.replace(config, gradient_checkpointing=checkpointing)
    model = discriminator(config, dtype=torch.float64)
    x, t, conditions = inputs(config, dtype=torch.float64)
    assert_r1_gradient(model, x, t, **conditions)


def test_r1_through_the_kernels_agrees_with_float64():
    """In float32 the first backward takes the formulas too, since a graph of it is asked for."""
    results = []
    for dtype in (torch.float32, torch.float64):
        model = discriminator(CLASS_CONFIG).to(dtype)
        model.teacher.to(dtype)
        x, t, conditions = inputs(CLASS_CONFIG, dtype=dtype)
        x.requires_grad_()
        (g,) = torch.autograd.grad(model(x, t, **conditions).sum(), x, create_graph=True)
        gradients = torch.autograd.grad(
            g.square().sum(), list(model.parameters()), allow_unused=True
        )
        results.append([gradient.double() for gradient in gradients if gradient is not None])
    for mine, exact in zip(*results, strict=True):
        # A few hundred float32 roundings of the largest entry, through two backwards.
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-4 * exact.abs().max().item())


class Holder(nn.Module):
    """As a method has it: the teacher has its owner, and the discriminator looks at it."""

    def __init__(self):
        super().__init__()
        self.discriminator = discriminator(CLASS_CONFIG)
        self.teacher = self.discriminator.teacher


def test_the_teacher_is_no_part_of_the_discriminator():
    holder = Holder()
    model = holder.discriminator
    assert not any("teacher" in name for name in model.state_dict())
    own, all_of_it = set(model.parameters()), set(holder.teacher.parameters())
    assert not own & all_of_it
    assert len(list(holder.parameters())) == len(own) + len(all_of_it)
    assert not any(parameter.requires_grad for parameter in all_of_it)
    model.train().requires_grad_(True)
    assert not model.teacher.training
    assert not any(parameter.requires_grad for parameter in all_of_it)


def test_state_dict_round_trip():
    model = discriminator(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG)
    other = FeatureDiscriminator(model.teacher, width=6)
    assert not torch.equal(other(x, t, **conditions), model(x, t, **conditions))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, t, **conditions), model(x, t, **conditions))


def test_deepcopy_keeps_one_teacher_where_there_was_one():
    holder = Holder()
    twin = copy.deepcopy(holder)
    assert twin.discriminator.teacher is twin.teacher
    assert twin.teacher is not holder.teacher
    alone = copy.deepcopy(holder.discriminator)
    assert alone.teacher is not holder.teacher
    x, t, conditions = inputs(CLASS_CONFIG)
    expected = holder.discriminator(x, t, **conditions)
    for each in (twin.discriminator, alone):
        assert torch.equal(each(x, t, **conditions), expected)
        assert not any("teacher" in name for name in each.state_dict())


def test_time_left_out_is_zero_and_time_matters():
    model = discriminator(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG)
    assert torch.equal(model(x, **conditions), model(x, torch.zeros(3), **conditions))
    assert not torch.isclose(model(x, **conditions), model(x, t, **conditions)).any()


@pytest.mark.parametrize("name", ["labels", "text", "pooled", "guidance", "text_lengths"])
def test_conditions_reach_the_teacher(name):
    config = CLASS_CONFIG if name == "labels" else FLUX_CONFIG
    model = discriminator(config)
    # Of padding nothing may be seen, so that text is changed where there is none.
    x, t, conditions = inputs(config, lengths=name == "text_lengths")
    changed = conditions[name].roll(1, dims=0)
    moved = torch.stack([(a != b).any() for a, b in zip(changed, conditions[name], strict=True)])
    assert moved.any()
    logits, other = model(x, t, **conditions), model(x, t, **{**conditions, name: changed})
    assert not torch.isclose(logits, other)[moved].any()


@EVERY
def test_pairs_are_two_calls_and_no_sample_sees_another(config):
    model = discriminator(config)
    real, t, conditions = inputs(config)
    fake = torch.randn_like(real)
    one = model.pairs(real, fake, t, **conditions)
    two = model(real, t, **conditions), model(fake, t, **conditions)
    # Another batch size may take another order of summation: float32 rounding.
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.pairs(real, 3 * fake, t, **conditions)[0], one[0])


@pytest.mark.parametrize("rows", [1, 5])
def test_other_sizes_where_the_teacher_takes_them(rows):
    model = discriminator(FLUX_CONFIG, layers=(0, 3))
    _, t, conditions = inputs(FLUX_CONFIG, rows=rows)
    wide = torch.randn(rows, 2, 2, 10)
    assert model(wide, t, **conditions).shape == (rows,)


def test_default_layers_are_the_quarters_but_the_last():
    for depth, single, expected in (
        (1, 0, (0,)),
        (2, 0, (0, 1)),
        (4, 0, (0, 1, 2)),
        (2, 2, (0, 1, 2)),
    ):
        config = dataclasses.replace(FLUX_CONFIG, depth=depth, single_depth=single)
        assert FeatureDiscriminator(MMDiT(config)).layers == expected
    config = dataclasses.replace(CLASS_CONFIG, depth=24)
    assert FeatureDiscriminator(MMDiT(config)).layers == (5, 11, 17)


def test_a_teacher_of_16_bits_under_heads_of_32():
    teacher = build(CLASS_CONFIG).bfloat16()
    model = FeatureDiscriminator(teacher, width=8)
    x, t, conditions = inputs(CLASS_CONFIG)
    x.requires_grad_()
    logits = model(x, t, **conditions)
    assert logits.dtype == torch.float32
    assert torch.autograd.grad(logits.sum(), x)[0].isfinite().all()


def test_bfloat16_autocast():
    model = discriminator(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG)
    exact = model(x, t, **conditions)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x, t, **conditions)
    assert logits.dtype == torch.float32
    scale = exact.abs().max().clamp_min(1).item()
    # Some twenty roundings to 8 bits in a teacher of random weights.
    torch.testing.assert_close(logits, exact, rtol=0, atol=20 * 2**-8 * scale)
    logits.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


def test_learns_to_tell_two_gaussians_apart():
    model = discriminator(CLASS_CONFIG, scale=0.1)
    conditions = {"labels": torch.arange(32) % 6}
    noise = lambda: torch.randn(32, 3, 4, 6)  # noqa: E731
    before = copy.deepcopy(model.teacher.state_dict())
    assert separate(model, noise, steps=60, lr=1e-2, **conditions) > 0.9
    assert all(torch.equal(before[k], v) for k, v in model.teacher.state_dict().items())


def test_input_gradient_starts_at_order_one():
    """With a teacher of the usual initialisation, whose blocks are the identity."""
    norms = []
    for seed in range(3):
        torch.manual_seed(seed)
        teacher = MMDiT(MMDiTConfig(8, in_channels=1, dim=64, depth=4, heads=2, num_classes=10))
        x = torch.randn(4, 1, 8, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(FeatureDiscriminator(teacher)(x).sum(), x)
        norms.append(gradient.flatten(1).norm(dim=1).mean())
    assert 0.2 < torch.stack(norms).mean() < 5


def test_compiles_to_one_graph():
    model = discriminator(CLASS_CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t, conditions = inputs(CLASS_CONFIG)
    x.requires_grad_()
    pair = [f(x, t, **conditions) for f in (model, compiled)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(logits.sum(), x)[0] for logits in pair]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_the_teachers_own_compiled_blocks_are_used():
    model = discriminator(CLASS_CONFIG)
    x, t, conditions = inputs(CLASS_CONFIG)
    expected = model(x, t, **conditions)
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph

    for block in model.teacher.blocks:
        block.compile(backend=backend)
    torch.testing.assert_close(model(x, t, **conditions), expected, rtol=1e-5, atol=1e-6)
    assert calls


def test_bad_arguments_are_named():
    teacher = build(CLASS_CONFIG)
    with pytest.raises(TypeError, match="teacher is a Linear; it needs to be an MMDiT"):
        FeatureDiscriminator(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="width is 0; it must be an int of at least 1"):
        FeatureDiscriminator(teacher, width=0)
    for layers in ((), (3,), (-1,), (0, 0), (0.0,)):
        with pytest.raises(ValueError, match="different block indices from 0 to 2"):
            FeatureDiscriminator(teacher, layers)
    model = FeatureDiscriminator(teacher)
    x, t, conditions = inputs(CLASS_CONFIG)
    for layers in ((), (3,), (True,)):
        with pytest.raises(ValueError, match="needs block indices from 0 to 2"):
            teacher.features(x, t, layers, **conditions)
    with pytest.raises(ValueError, match="text is given: this model has no text_dim"):
        model(x, t, text=torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match="sizes that add up to the batch, 3"):
        model(x, t, segments=(1, 1), **conditions)
