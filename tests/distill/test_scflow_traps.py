"""What has gone wrong in other implementations of SCFlow: a test for each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flowkernels.distill import SCFlow
from flowkernels.nn import LatentDiscriminator, LatentDiscriminatorConfig
from flowkernels.optim import AdamWEMA
from tests.distill.scflow_networks import Judge, Velocity


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Velocity()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"x0": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def train(method, batch, optimizers, steps):
    for _ in range(steps):
        for phase in method.phases():
            optimizer = optimizers[phase.name]
            optimizer.zero_grad()
            sum(method.losses(batch, phase.name).values()).backward()
            optimizer.step()
        method.after_step()


def optimizers(method, **options):
    return {
        phase.name: AdamWEMA(
            (p for name in phase.networks for p in method.get_submodule(name).parameters()),
            **options,
        )
        for phase in method.phases()
    }


def test_teacher_survives_a_resume(teacher, batch):
    """Its weights are in the state, and a resume takes them from there: not from the student,
    and not from whatever teacher the method was built with."""
    method = SCFlow(teacher, Judge())
    original = copy.deepcopy(teacher.state_dict())
    train(method, batch, optimizers(method, lr=0.1), 3)
    torch.manual_seed(7)
    again = SCFlow(Velocity(), Judge())
    again.load_state_dict(method.state_dict())
    for name, weight in original.items():
        assert torch.equal(again.teacher.state_dict()[name], weight)
        assert torch.equal(again.student.state_dict()[name], method.student.state_dict()[name])
        assert torch.equal(again.target.state_dict()[name], method.target.state_dict()[name])
        assert not torch.equal(again.student.state_dict()[name], weight)
    assert not any(parameter.requires_grad for parameter in again.teacher.parameters())


def test_slow_ema_starts_from_the_teacher(teacher, batch):
    """At decay 0.9999 an average that began from anything else would be that for long."""
    method = SCFlow(teacher)
    made = optimizers(method, lr=1e-2, ema_decays=(0.9999,))
    train(method, batch, made, 1)
    slow = made["student"].ema_state_dict(method.student, 0)
    for name, weight in teacher.state_dict().items():
        expected = torch.lerp(weight, method.student.state_dict()[name], 1e-4)
        torch.testing.assert_close(slow[name], expected, rtol=1e-6, atol=1e-8)
    for name, weight in SCFlow(teacher).target.state_dict().items():
        assert torch.equal(weight, teacher.state_dict()[name])  # and so does θ⁻


def test_clipping_clips_every_step(teacher, batch):
    """Parameters given as an iterator, which is exhausted once it has been walked."""
    method = SCFlow(teacher, Judge())
    # With a huge eps and no moments the update is lr/eps times the clipped gradient.
    options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1e6, "max_grad_norm": 1e-3}
    made = optimizers(method, **options)
    for _ in range(4):
        before = [p.detach().double() for p in method.student.parameters()]
        train(method, batch, made, 1)
        after = [p.detach().double() for p in method.student.parameters()]
        length = sum((a - b).square().sum() for a, b in zip(after, before, strict=True)).sqrt()
        assert made["student"].grad_norm > 1e-2  # ten times the limit: clipping has work to do
        assert length <= 1.001e-9
    # In float32 such steps vanish beside the weights; so look at one that does not.
    made["student"].param_groups[0].update(eps=1e-3, lr=1.0)
    for _ in range(3):
        before = [p.detach().clone() for p in method.student.parameters()]
        train(method, batch, made, 1)
        length = torch.stack(
            [(a - b).norm() for a, b in zip(method.student.parameters(), before, strict=True)]
        ).norm()
        assert made["student"].grad_norm > 1e-2
        # g/(|g| + eps) is at most g/eps, and above half of it where |g| < eps, as here.
        assert 0.5 < length <= 1.01


def test_master_weights_are_float32(teacher, batch):
    """bfloat16 has 8 bits: an update of 1e-5 beside a weight of 0.1 would round to nothing."""
    weight = torch.tensor(0.1, dtype=torch.bfloat16)
    assert weight + 1e-5 == weight
    method = SCFlow(copy.deepcopy(teacher).bfloat16())
    for network in (method.student, method.target):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for options in ({"student": copy.deepcopy(teacher).bfloat16()}, {"student": teacher.half()}):
        with pytest.raises(ValueError, match=r"student has weights in torch\.\w+, in which small"):
            SCFlow(Velocity(), **options)
    with pytest.raises(ValueError, match=r"discriminator has weights in torch\.bfloat16"):
        SCFlow(Velocity(), Judge().bfloat16())


def test_small_updates_are_kept(teacher, batch):
    """lr 1e-5 under bfloat16 autocast moves every layer, and θ⁻ after it."""
    method = SCFlow(teacher, Judge())
    before = copy.deepcopy(method.state_dict())
    made = optimizers(method, lr=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        train(method, batch, made, 2)
    after = method.state_dict()
    for network in ("student", "target"):
        for name in teacher.state_dict():
            assert not torch.equal(before[f"{network}.{name}"], after[f"{network}.{name}"])


class Sure(nn.Module):
    """Logits of ±30, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(30.0))

    def forward(self, x, t=None, labels=None):
        return self.logit + 0 * x.sum(1)


def test_no_sigmoid_before_softplus(teacher, batch):
    """Logits reach softplus as they are: squashed by a sigmoid first, no loss could pass 1.32."""
    method = SCFlow(teacher, Sure(), gan=1.0, r1=0.0)
    losses = method.losses(batch)
    assert losses["gan"].item() == pytest.approx(0.0, abs=1e-6)
    assert losses["discriminator"].item() == pytest.approx(30.0)
    losses["discriminator"].backward()
    # d/dl [sp(-l) + sp(l)] = tanh(l/2) = 1; behind a sigmoid it would be 1e-13.
    assert method.discriminator.logit.grad.item() == pytest.approx(1.0)
    with torch.no_grad():
        method.discriminator.logit.neg_()
    assert method.losses(batch)["gan"].item() == pytest.approx(30.0)


@pytest.mark.parametrize("r1", [0.0, 1.0])
@pytest.mark.parametrize("size", [3, 8])
def test_real_and_fake_never_share_a_minibatch_std_group(r1, size):
    """Other fakes beside the same data: the logits of the data keep every bit. A batch of 3 does
    not fill a group, of 8 fills two."""

    class Flat(nn.Module):
        """A velocity of one number everywhere."""

        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return self.value * torch.ones_like(x)

    torch.manual_seed(0)
    config = LatentDiscriminatorConfig(in_channels=1, width=4, depth=1, group_size=4)
    method = SCFlow(Flat(), LatentDiscriminator(config), r1=r1)
    logits = []

    def noted(real, fake):
        logits.append((real.detach().clone(), fake.detach().clone()))
        return original(real, fake)

    from flowkernels.distill import adversarial

    original = adversarial.gan_discriminator
    batch = {"x0": torch.randn(size, 1, 4, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adversarial, "gan_discriminator", noted)
        for value in (0.0, 2.0):
            with torch.no_grad():
                method.student.value.fill_(value)
            torch.manual_seed(1)
            method.losses(batch, "discriminator")
    (real, fake), (same, other) = logits
    assert not torch.equal(fake, other)
    assert torch.equal(real, same)
    # and the group does matter: beside other data they would differ
    assert not torch.equal(real[:1], method.discriminator(batch["x0"][:1]))
