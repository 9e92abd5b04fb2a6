"""SCFlow: its losses are the formulas, its calls are as few as they can be, and it resumes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from flowkernels.distill import SCFlow
from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.ode import sample, uniform
from tests.distill.scflow_networks import Judge, Velocity, gradients, literal

STUDENT = ("self_corrected", "gan", "reflow")
DISCRIMINATOR = ("discriminator", "r1")


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Velocity()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"x0": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def moved(method):
    """The method with student and target off the teacher, as in the middle of a training."""
    with torch.no_grad():
        for network in (method.student, method.target):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def watched(method):
    networks = (method.teacher, method.target, method.student, method.discriminator)
    for network in filter(None, networks):
        network.calls.clear()
    return method


# ---- what the losses are ------------------------------------------------------------------------


@pytest.mark.parametrize("seen", ["clean", "noised"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_losses_are_the_formulas(teacher, batch, guidance, seen):
    """Separate calls, states formed, differences of endpoints: in float64, gradients too."""
    method = SCFlow(
        teacher, Judge(), guidance=guidance, delta=0.3, trunc=0.4, huber=0.02,
        bidirectional=0.3, gan=0.2, reflow=0.5, discriminator_input=seen, r1=0.7,
    )  # fmt: skip
    moved(method).double()
    x0, labels = batch["x0"].double().repeat(9, 1), batch["labels"].repeat(9)
    torch.manual_seed(2)
    expected = literal(method, x0, labels, torch.full_like(labels, 3))
    wanted = {}
    for names, network in ((STUDENT, method.student), (DISCRIMINATOR, method.discriminator)):
        total = sum(expected[name] for name in names)
        parameters = list(network.parameters())
        # inward's bias and the classes reach R1 only together with others: all are used.
        wanted[names] = torch.autograd.grad(total, parameters, retain_graph=True)
    torch.manual_seed(2)
    found = method.losses({"x0": x0, "labels": labels})
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-9, atol=1e-12)
    sum(found.values()).backward()
    for names, network in ((STUDENT, method.student), (DISCRIMINATOR, method.discriminator)):
        for gradient, want in zip(gradients(network), wanted[names], strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-11)


def test_each_phase_reaches_its_network_alone(teacher, batch):
    method = moved(SCFlow(teacher, Judge()))
    student, discriminator = method.phases()
    assert (student.networks, discriminator.networks) == (("student",), ("discriminator",))
    losses = method.losses(batch, "student")
    assert sorted(losses) == sorted(STUDENT)
    sum(losses.values()).backward()
    assert all(gradient is not None for gradient in gradients(method.student))
    for network in (method.teacher, method.target, method.discriminator):
        assert all(gradient is None for gradient in gradients(network))
    method.student.zero_grad()
    losses = method.losses(batch, "discriminator")
    assert sorted(losses) == sorted(DISCRIMINATOR)
    sum(losses.values()).backward()
    assert any(gradient is not None for gradient in gradients(method.discriminator))
    for network in (method.teacher, method.target, method.student):
        assert all(gradient is None for gradient in gradients(network))
    assert all(parameter.requires_grad for parameter in method.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in method.student.parameters())


def test_gan_reaches_the_one_step_image_alone(teacher, batch):
    """The generator's loss moves v(ε, 1); the self-correction moves everything but that."""
    method = moved(SCFlow(teacher, Judge(), gan=1.0, bidirectional=0.0))
    torch.manual_seed(4)
    losses = method.losses(batch, "student")
    alone = torch.autograd.grad(losses["gan"], method.student.outward.bias, retain_graph=True)
    noise = torch.manual_seed(4) and torch.randn(6, 4)
    fake = noise - method.student(noise, torch.ones(6), batch["labels"])
    logits = method.discriminator(fake, None, batch["labels"])
    want = torch.autograd.grad(torch.nn.functional.softplus(-logits).mean(), [
        method.student.outward.bias
    ])  # fmt: skip
    torch.testing.assert_close(alone, want)


# ---- how many calls -----------------------------------------------------------------------------

CASES = [
    # options, step, teacher's rows, target's, student's (rows, with a graph), judge's
    ({}, 0, [6], [12], [(12, True), (6, True)], [6]),
    ({"guidance": 2.0}, 0, [12], [12], [(12, True), (6, True)], [6]),
    ({"gan_warmup": 3}, 2, [6], [12], [(6, True), (6, False), (6, True)], []),
    ({"gan_warmup": 3}, 3, [6], [12], [(12, True), (6, True)], [6]),
    ({"reflow_warmup": 3}, 2, [6], [12], [(12, True)], [6]),
    ({"reflow_warmup": 3, "gan_warmup": 3}, 2, [6], [12], [(6, True), (6, False)], []),
    ({"bidirectional_warmup": 3}, 2, [6], [6], [(12, True), (6, True)], [6]),
    ({"bidirectional_warmup": 3}, 3, [6], [12], [(12, True), (6, True)], [6]),
    ({"gan": 0.0}, 0, [6], [12], [(6, True), (6, False), (6, True)], None),
    ({"gan": 0.0, "reflow": 0.0}, 0, [6], [12], [(6, True)], None),
    ({"gan": 0.0, "reflow": 0.0, "bidirectional": 0.0}, 0, [6], [6], [(6, True)], None),
    ({"reflow": 0.0, "bidirectional": 0.0}, 0, [6], [6], [(12, True)], [6]),
]


@pytest.mark.parametrize(
    ("options", "step", "of_teacher", "of_target", "of_student", "judged"), CASES
)
def test_a_step_calls_no_network_twice(
    teacher, batch, options, step, of_teacher, of_target, of_student, judged
):
    method = watched(SCFlow(teacher, Judge(), **options))
    method.step = step
    losses = method.losses(batch, "student")
    assert [len(x) for x, _, _ in method.teacher.calls] == of_teacher
    assert [len(x) for x, _, _ in method.target.calls] == of_target
    assert [(len(x), graph) for x, _, graph in method.student.calls] == of_student
    assert ("reflow" in losses) == (len(of_student) > 1 and of_student[-1] == (6, True))
    if judged is None:
        assert method.discriminator is None
        assert [phase.name for phase in method.phases()] == ["student"]
        return
    assert [len(x) for x, _ in method.discriminator.calls] == judged
    assert ("gan" in losses) == bool(judged)
    # The discriminator's phase finds the student's images: only the judge is called.
    watched(method).losses(batch, "discriminator")
    assert [len(x) for x, _ in method.discriminator.calls] == [6, 6]
    assert not method.teacher.calls + method.target.calls + method.student.calls


def test_discriminator_sees_the_images_of_this_very_batch(teacher, batch):
    method = watched(SCFlow(teacher, Judge()))
    torch.manual_seed(3)
    method.losses(batch, "student")
    noise = torch.manual_seed(3) and torch.randn(6, 4)
    fake = noise - method.student(noise, torch.ones(6), batch["labels"])
    (seen, _), *_ = method.discriminator.calls
    torch.testing.assert_close(seen, fake)
    watched(method).losses(batch, "discriminator")
    (real, _), (again, _) = method.discriminator.calls
    assert torch.equal(real, batch["x0"])
    assert torch.equal(again, seen)
    # Without a student's phase before it, or for other conditions, it makes images of its own.
    for other in (batch, {**batch, "labels": batch["labels"].flip(0)}):
        method.losses(batch, "student")
        method.losses(batch, "discriminator")
        watched(method).losses(other, "discriminator")
        assert [(len(x), graph) for x, _, graph in method.student.calls] == [(6, False)]
        assert not torch.equal(method.discriminator.calls[1][0], seen)


def test_images_are_forgotten_with_their_batch(teacher, batch):
    method = SCFlow(teacher, Judge())
    for _ in range(3):
        method.losses({**batch, "x0": batch["x0"].clone()}, "student")
    assert len(method._made) <= 1  # the last one's, at most: nobody holds the other batches
    method.losses(batch, "student")
    assert len(method._made) >= 1
    method.after_step()
    assert len(method._made) == 0


def test_noised_real_and_fake_share_noise_and_times(teacher, batch):
    method = watched(SCFlow(teacher, Judge(), discriminator_input="noised"))
    assert method.r1 == 0
    torch.manual_seed(5)
    losses = method.losses(batch, "student")
    (fake, t), *_ = method.discriminator.calls
    assert torch.equal(t, method.target.calls[0][1][:6])  # t'
    watched(method)
    losses.update(method.losses(batch, "discriminator"))
    assert "r1" not in losses
    (real, t_real), (again, t_fake) = method.discriminator.calls
    assert torch.equal(t_real, t)
    assert torch.equal(t_fake, t)
    assert torch.equal(again, fake)
    noise = torch.manual_seed(5) and torch.randn(6, 4)
    made = noise - method.student(noise, torch.ones(6), batch["labels"])
    torch.testing.assert_close(real - fake, (1 - t)[:, None] * (batch["x0"] - made))


def test_lazy_penalty_is_the_same_in_the_mean(teacher, batch):
    method = SCFlow(teacher, Judge(), r1=0.5, r1_every=3)
    found = []
    for step in range(6):
        method.step = step
        found.append(method.losses(batch, "discriminator").get("r1"))
    assert [loss is not None for loss in found] == [True, False, False] * 2
    every = SCFlow(teacher, method.discriminator, r1=0.5)
    torch.testing.assert_close(found[0], 3 * every.losses(batch, "discriminator")["r1"])
    assert "r1" not in SCFlow(teacher, Judge(), r1=0.0).losses(batch)


# ---- times, sizes, conditions -------------------------------------------------------------------


def test_neighbours_are_within_delta_and_independent(teacher):
    method = SCFlow(teacher, delta=0.2)
    torch.manual_seed(0)
    t, t_post, t_prev = method._draw_times(20_000, torch.device("cpu"))
    assert ((t_post >= 0) & (t_post <= t) & (t <= t_prev) & (t_prev <= 1)).all()
    down, up = (t - t_post) / t.clamp(max=0.2), (t_prev - t) / (1 - t).clamp(max=0.2)
    for share in (down, up):  # uniform on [0, 1): mean and variance within 4 standard errors
        assert abs(share.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20_000)
        assert abs(share.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / 20_000)
    assert abs(torch.corrcoef(torch.stack([down, up]))[0, 1]) < 4 / math.sqrt(20_000)


def test_times_on_a_grid(teacher):
    method = SCFlow(teacher, t_grid=8, t_range=(0.05, 0.95))
    t, _, _ = method._draw_times(1000, torch.device("cpu"))
    assert {*(8 * t).tolist()} == {*range(1, 9)}


@pytest.mark.parametrize("size", [1, 2])
def test_any_batch_with_and_without_conditions(teacher, batch, size):
    for conditions in ({"labels": batch["labels"][:size]}, {}):
        method = SCFlow(teacher, Judge())
        losses = method.losses({"x0": batch["x0"][:size], **conditions})
        assert sorted(losses) == sorted(STUDENT + DISCRIMINATOR)
        assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
        method.after_step()


def test_guidance_is_the_teachers_alone(teacher, batch):
    method = watched(SCFlow(teacher, Judge(), guidance=3.0))
    method.losses(batch)
    (asked, _, _), *_ = method.teacher.calls
    assert torch.equal(asked[:6], asked[6:])
    images = method.generate(batch["x0"], 2, labels=batch["labels"])
    conditions = {"labels": batch["labels"]}
    expected = sample(method.student, batch["x0"], uniform(2), conditions=conditions)
    assert torch.equal(images, expected)
    assert [len(x) for x, _, _ in method.student.calls[-2:]] == [6, 6]


def test_same_draws_same_losses(teacher, batch):
    method = moved(SCFlow(teacher, Judge()))
    found = []
    for _ in range(2):
        torch.manual_seed(9)
        found.append([loss.item() for loss in method.losses(batch).values()])
    assert found[0] == found[1]


def test_terms_are_logged_unweighted(teacher, batch):
    method = moved(SCFlow(teacher, Judge(), bidirectional=0.5))
    loss = method.losses(batch)["self_corrected"]
    values = method.monitors()
    assert sorted(values) == ["bidirectional", "consistency", "fake_logit", "real_logit"]
    assert not any(value.requires_grad for value in values.values())
    torch.testing.assert_close(loss, values["consistency"] + 0.5 * values["bidirectional"])


# ---- the target, and state ----------------------------------------------------------------------


def test_target_follows_the_student(teacher, batch):
    method = moved(SCFlow(teacher, target_decay=0.75))
    expected = {
        name: torch.lerp(method.target.get_parameter(name), now.detach(), 0.25)
        for name, now in method.student.named_parameters()
    }
    method.after_step()
    for name, want in expected.items():
        torch.testing.assert_close(method.target.get_parameter(name), want)
    assert method.step == 1
    assert not any(parameter.requires_grad for parameter in method.target.parameters())
    method.train()
    assert method.student.training
    assert not method.target.training
    assert not method.teacher.training


def test_a_resume_goes_on_bitwise(teacher, batch):
    def advance(method, optimizers, steps):
        for _ in range(steps):
            for phase in method.phases():
                optimizers[phase.name].zero_grad()
                sum(method.losses(batch, phase.name).values()).backward()
                optimizers[phase.name].step()
            method.after_step()

    def build():
        torch.manual_seed(0)
        method = SCFlow(copy.deepcopy(teacher), Judge(), gan_warmup=2, reflow_warmup=3, r1_every=2)
        return method, {
            name: torch.optim.SGD(method.get_submodule(name).parameters(), 0.1)
            for name in ("student", "discriminator")
        }

    whole, optimizers = build()
    torch.manual_seed(1)
    advance(whole, optimizers, 2)
    state, generator = copy.deepcopy(whole.state_dict()), torch.get_rng_state()
    advance(whole, optimizers, 3)
    again, optimizers = build()
    again.load_state_dict(state)
    assert again.step == 2
    torch.set_rng_state(generator)
    advance(again, optimizers, 3)
    for name, value in whole.state_dict().items():
        same = again.state_dict()[name]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same


def test_a_copy_is_its_own(teacher, batch):
    method = SCFlow(teacher, Judge())
    method.losses(batch, "student")
    other = copy.deepcopy(method)
    sum(other.losses(batch).values()).backward()
    assert all(gradient is None for gradient in gradients(method.student))


def test_it_can_be_pickled_in_the_middle_of_a_step(teacher, batch):
    method = SCFlow(teacher, Judge())
    method.losses(batch, "student")
    other = pickle.loads(pickle.dumps(method))
    torch.manual_seed(7)
    mine = method.losses(batch, "student")
    torch.manual_seed(7)
    theirs = other.losses(batch, "student")
    assert {k: v.item() for k, v in mine.items()} == {k: v.item() for k, v in theirs.items()}


def test_mmdit_under_autocast(batch):
    """Under autocast no call finds weights that another has cast without a graph."""
    teacher = MMDiT(MMDiTConfig(image_size=4, in_channels=1, dim=8, depth=1, heads=1))
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the fresh network's output is zero
    x0 = {"x0": torch.randn(3, 1, 4, 4)}

    class Convolution(torch.nn.Sequential):
        def forward(self, x, t=None):
            return super().forward(x).flatten(1).mean(1)

    for options in ({}, {"gan_warmup": 1}, {"reflow_warmup": 1}):
        judge = Convolution(torch.nn.Conv2d(1, 4, 3), torch.nn.SiLU(), torch.nn.Conv2d(4, 1, 1))
        method = SCFlow(teacher, judge, r1=0.0, **options)
        with torch.autocast("cpu", torch.bfloat16):
            first = method.losses(x0, "discriminator")
            losses = {**first, **method.losses(x0, "student"), **method.losses(x0, "discriminator")}
        assert all(loss.isfinite() for loss in losses.values())
        sum(loss.float() for loss in losses.values()).backward()
        for network in (method.student, method.discriminator):
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in network.parameters())


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": math.nan}, "guidance is nan; it must be a finite number"),
        ({"delta": 0.0}, r"delta is 0\.0; it must lie in \(0, 1\]"),
        ({"trunc": 1.5}, r"trunc is 1\.5; it must lie in \[0, 1\]"),
        ({"huber": 0}, r"huber is 0; it must lie in \[1e-18, 1e18\]"),
        ({"huber": 1e-20}, r"huber is 1e-20; it must lie in"),
        ({"bidirectional": -1}, "bidirectional is -1; it must be a number of at least 0"),
        ({"reflow": "x"}, "reflow is 'x'; it must be a number"),
        ({"gan": math.inf}, "gan is inf; it must be a number of at least 0"),
        ({"gan": 0.1}, r"gan is 0\.1, but there is no discriminator"),
        ({"gan_warmup": 0.5}, r"gan_warmup is 0\.5; it must be an int of at least 0"),
        ({"reflow_warmup": -1}, "reflow_warmup is -1; it must be an int"),
        ({"target_decay": 1.0}, r"target_decay is 1\.0; it must lie in \[0, 1\)"),
        ({"t_grid": 0}, "t_grid is 0; it must be None or an int of at least 1"),
        ({"t_sampling": "beta"}, "t_sampling is 'beta'"),
        ({"discriminator_input": "noisy"}, "discriminator_input is 'noisy'; it must be 'clean'"),
        ({"r1": -0.5}, r"r1 is -0\.5; it must be a number of at least 0"),
        ({"r1_every": 0}, "r1_every is 0; it must be an int of at least 1"),
    ],
)
def test_options_out_of_range(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        SCFlow(teacher, **options)


def test_networks_and_batches_that_do_not_fit(teacher, batch):
    with pytest.raises(ValueError, match="student is the teacher itself"):
        SCFlow(teacher, student=teacher)
    with pytest.raises(ValueError, match="discriminator is the teacher or the student"):
        SCFlow(teacher, teacher)
    with pytest.raises(ValueError, match="guidance needs unconditional inputs"):
        SCFlow(Judge(), student=Velocity(), guidance=2.0)
    method = SCFlow(teacher)
    with pytest.raises(ValueError, match="phase is 'discriminator'; it must be None or one of stu"):
        method.losses(batch, "discriminator")
    with pytest.raises(ValueError, match=r"batch\['labels'\] has shape"):
        method.losses({**batch, "labels": batch["labels"][:2]})
