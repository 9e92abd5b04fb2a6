"""FGM's step: the split form, who gets gradients, K fake steps, no host sync, options."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flowkernels.distill import FGM, Phase
from flowkernels.nn import MMDiT, MMDiTConfig

CLASSES = 3


class Network(nn.Module):
    """A small conditional velocity network with dropout, checkpointed or not."""

    def __init__(self, dim=5, recompute=False):
        super().__init__()
        self.first = nn.Linear(dim + 1, 16)
        self.labels = nn.Embedding(CLASSES + 1, 16)
        self.body = nn.Sequential(nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16), nn.SiLU())
        self.last = nn.Linear(16, dim)
        self.recompute = recompute
        self.modes = []

    def forward(self, x, t, labels):
        self.modes.append((self.training, self.first.weight.requires_grad, len(x)))
        h = self.first(torch.cat([x, t[:, None]], 1)) + self.labels(labels)
        h = checkpoint(self.body, h, use_reentrant=False) if self.recompute else self.body(h)
        return self.last(h)

    def null_conditions(self, conditions):
        return {"labels": torch.full_like(conditions["labels"], CLASSES)}


def method(seed=0, recompute=False, **options):
    torch.manual_seed(seed)
    return FGM(
        Network(recompute=recompute),
        generator=Network(recompute=recompute),
        fake=Network(recompute=recompute),
        **options,
    )


def batch(rows=6):
    return {"x0": torch.zeros(rows, 5), "labels": torch.arange(rows) % CLASSES}


def generator_gradients(fgm, seed=1, scale=1.0, data=None):
    torch.manual_seed(seed)
    loss = fgm.losses(data or batch(), phase="generator")["generator"]
    (loss * scale).backward()
    gradients = [p.grad.clone() for p in fgm.generator.parameters()]
    fgm.zero_grad()
    return loss.detach(), gradients


def assert_same(pair, other, tolerance=1e-6):
    """Loss and gradients agree to 1e-6 of the largest gradient (float32 rounding)."""
    torch.testing.assert_close(pair[0], other[0], rtol=tolerance, atol=tolerance)
    largest = max(g.abs().max() for g in pair[1])
    assert largest > 0
    for a, b in zip(pair[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(tolerance * max(1, largest)))


@pytest.mark.parametrize(
    ("lam", "weighting", "guidance"),
    list(itertools.product([0.0, 1.0, -0.4], [None, "t2(1-t)", "sid"], [1.0, 4.5])),
)
def test_split_vjp_equals_joint(lam, weighting, guidance):
    options = {"lam": lam, "weighting": weighting, "guidance": guidance}
    joint = generator_gradients(method(**options))
    assert_same(joint, generator_gradients(method(split_vjp=True, **options)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen_mode", ["eval", "train"])
def test_split_vjp_equals_joint_with_dropout_and_checkpointing(frozen_mode, recompute):
    options = {"frozen_mode": frozen_mode, "weighting": "sid", "guidance": 2.0}
    joint = generator_gradients(method(**options))
    assert_same(joint, generator_gradients(method(recompute=recompute, **options)))
    split = generator_gradients(method(recompute=recompute, split_vjp=True, **options))
    assert_same(joint, split)


def test_split_vjp_equals_joint_on_mmdit_and_for_a_scaled_loss():
    torch.manual_seed(0)
    config = MMDiTConfig(
        image_size=4,
        in_channels=2,
        dim=16,
        depth=2,
        heads=2,
        num_classes=3,
        qk_norm=True,
        gradient_checkpointing=True,
    )
    networks = [MMDiT(config) for _ in range(3)]
    for parameter in itertools.chain(*(n.parameters() for n in networks)):
        nn.init.normal_(parameter, std=0.2)  # zero-initialised, the gradients would be zero too
    data = {"x0": torch.zeros(4, 2, 4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    results = []
    for split_vjp in (False, True):
        teacher, generator, fake = copy.deepcopy(networks)
        fgm = FGM(teacher, generator=generator, fake=fake, guidance=3.0, split_vjp=split_vjp)
        results.append(generator_gradients(fgm, scale=0.5, data=data))
    assert_same(*results)


def test_joint_form_equals_plain_autograd():
    """The method's own gradient is that of the formula, written out and differentiated."""
    fgm = method(lam=-0.4, weighting="t2(1-t)", guidance=4.5, reduction="sum", t_range=(0.1, 0.9))
    loss, gradients = generator_gradients(fgm)
    torch.manual_seed(1)
    labels = batch()["labels"]
    nothing = torch.full_like(labels, CLASSES)
    z = torch.randn(6, 5)
    x0 = z - fgm.generator(z, torch.ones(6), labels)
    t, noise = 0.1 + 0.8 * torch.rand(6), torch.randn(6, 5)
    fgm.fake.eval()
    x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
    u_uncond = fgm.teacher(x_t, t, nothing)
    u = u_uncond + 4.5 * (fgm.teacher(x_t, t, labels) - u_uncond)
    d, e = u - fgm.fake(x_t, t, labels), fgm.fake(x_t, t, labels) - (noise - x0)
    omega = (t**2 * (1 - t))[:, None]
    expected = (omega * (2 * d * e - 0.4 * d * d)).sum() / 6
    plain = torch.autograd.grad(expected, list(fgm.generator.parameters()))
    assert_same((loss, gradients), (expected.detach(), plain))


@pytest.mark.parametrize("split_vjp", [False, True])
def test_generator_loss_touches_only_the_generator(split_vjp):
    fgm = method(split_vjp=split_vjp, guidance=2.0)
    fgm.fake.first.weight.requires_grad_(False)  # a setting that must survive
    fgm.losses(batch(), phase="generator")["generator"].backward()
    assert all(p.grad is not None for p in fgm.generator.parameters())
    assert all(p.grad is None for p in fgm.fake.parameters())
    assert all(p.grad is None for p in fgm.teacher.parameters())
    assert all(not mode and not wants for mode, wants, _ in fgm.fake.modes + fgm.teacher.modes)
    assert [rows for _, _, rows in fgm.teacher.modes] == [12]  # cond and uncond in one call
    assert all(module.training for module in fgm.fake.modules())
    assert not fgm.fake.first.weight.requires_grad
    assert fgm.fake.last.weight.requires_grad


def test_fake_loss_touches_only_the_fake():
    fgm = method()
    fgm.losses(batch(), phase="fake")["fake"].backward()
    assert all(p.grad is not None for p in fgm.fake.parameters())
    assert all(p.grad is None for p in fgm.generator.parameters())
    assert not fgm.teacher.modes


def test_settings_are_restored_after_an_error():
    fgm = method()

    def broken(*args, **options):
        raise RuntimeError("out of memory")

    fgm.teacher.forward = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        fgm.losses(batch(), phase="generator")
    assert fgm.fake.training
    assert all(p.requires_grad for p in fgm.fake.parameters())


def test_phases_and_k_fake_steps():
    fgm = method(fake_steps=5)
    assert fgm.phases() == (
        Phase("fake", ("fake",), repeats=5),
        Phase("generator", ("generator",)),
    )
    losses = [fgm.losses(batch(), phase="fake")["fake"] for _ in range(5)]
    assert len({loss.item() for loss in losses}) == 5  # fresh randomness each time
    assert set(fgm.losses(batch())) == {"fake", "generator"}


def test_teacher_stays_in_eval_mode_and_frozen():
    fgm = method().train()
    assert not fgm.teacher.training
    assert not fgm.teacher.body.training
    assert fgm.fake.training
    assert fgm.generator.training
    assert not any(p.requires_grad for p in fgm.teacher.parameters())


def test_copies_of_the_teacher_are_trainable_and_independent():
    teacher = Network().requires_grad_(False)
    fgm = FGM(teacher)
    for network in (fgm.generator, fgm.fake):
        assert all(p.requires_grad for p in network.parameters())
        for mine, theirs in zip(network.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()


class NoHostSync(TorchDispatchMode):
    """Fails on every operator that makes the host wait for a value on the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        assert name not in self.WAITING, f"{func} waits for the device"
        assert not (name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("split_vjp", [False, True])
@pytest.mark.parametrize("weighting", ["sid", "t2(1-t)"])
@pytest.mark.parametrize("kind", ["small", "mmdit"])
def test_no_host_sync_in_a_step(split_vjp, weighting, kind):
    options = {"split_vjp": split_vjp, "weighting": weighting, "guidance": 2.0, "fake_steps": 2}
    if kind == "small":
        fgm, data = method(**options), batch()
    else:
        config = MMDiTConfig(image_size=4, dim=16, depth=2, heads=2, num_classes=CLASSES)
        fgm = FGM(MMDiT(config), **options)
        data = {"x0": torch.zeros(2, 4, 4, 4), "labels": torch.tensor([0, 2])}
    with NoHostSync():
        for phase in fgm.phases():
            for _ in range(phase.repeats):
                sum(fgm.losses(data, phase.name).values()).backward()
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        torch.ones(()).item()


def test_nonfinite_sample_is_left_out_and_counted():
    fgm = method()
    clean_loss, _ = generator_gradients(fgm)

    def spoiled(x, t, labels, forward=fgm.teacher.forward):
        u = forward(x, t, labels)
        return torch.where(torch.arange(len(x))[:, None] == 2, torch.inf, u)

    fgm.teacher.forward = spoiled
    loss, _ = generator_gradients(fgm)
    assert fgm.nonfinite.item() == 1
    assert torch.isfinite(loss)
    assert loss != clean_loss


def test_autocast_keeps_the_generators_gradient():
    """The fake's phase runs the generator without a graph; autocast must not cache that cast."""
    fgm = method()
    with torch.autocast("cpu", torch.bfloat16):
        losses = fgm.losses(batch())
    sum(losses.values()).backward()
    for network in (fgm.generator, fgm.fake):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_generate_is_one_step():
    fgm = method(t_star=0.9, sigma_star=1.5)
    z, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    x = fgm.generate(z, 1, labels=labels)
    fgm.generator.eval()
    expected = 1.5 * z - 1.5 * fgm.generator(1.5 * z, torch.full((4,), 0.9), labels)
    torch.testing.assert_close(x, expected)
    assert not x.requires_grad
    other = Network().eval()
    torch.testing.assert_close(
        fgm.generate(z, 1, other, labels=labels),
        1.5 * z - 1.5 * other(1.5 * z, torch.full((4,), 0.9), labels),
    )
    with pytest.raises(ValueError, match="steps is 2"):
        fgm.generate(z, 2, labels=labels)


def test_sigma_star_defaults_to_t_star():
    assert method(t_star=0.957).sigma_star == 0.957


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": float("nan")}, "lam is nan"),
        ({"weighting": "cosine"}, "weighting is 'cosine'"),
        ({"guidance": "4"}, "guidance is '4'"),
        ({"fake_steps": 0}, "fake_steps is 0"),
        ({"t_range": (0.5, 0.5)}, "t_range is"),
        ({"t_range": (0.5, 1.5)}, "t_range is"),
        ({"t_sampling": "beta"}, "t_sampling is 'beta'"),
        ({"logit_std": 0.0}, "logit_std is 0.0"),
        ({"t_star": 0.0}, "t_star is 0.0"),
        ({"sigma_star": -1.0}, "sigma_star is -1.0"),
        ({"frozen_mode": "half"}, "frozen_mode is 'half'"),
        ({"reduction": "none"}, "reduction is 'none'"),
    ],
)
def test_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_bad_networks_and_batches_are_named():
    teacher = Network()
    with pytest.raises(ValueError, match="generator is the teacher itself"):
        FGM(teacher, generator=teacher)
    shared = Network()
    with pytest.raises(ValueError, match="same object"):
        FGM(teacher, generator=shared, fake=shared)
    with pytest.raises(ValueError, match="fake has no weights"):
        FGM(teacher, fake=nn.Identity())
    with pytest.raises(ValueError, match="guidance needs unconditional inputs"):
        FGM(nn.Linear(2, 2), guidance=2.0)
    fgm = method()
    with pytest.raises(ValueError, match="phase is 'teacher'"):
        fgm.losses(batch(), phase="teacher")
    with pytest.raises(ValueError, match="needs 'x0'"):
        fgm.losses({"labels": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"batch\['labels'\]"):
        fgm.losses({"x0": torch.zeros(2, 5), "labels": torch.zeros(3)})
