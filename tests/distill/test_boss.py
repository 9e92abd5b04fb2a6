"""BOSS: what its loss promises, its weights, its trajectories, and a student that learns."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from flowkernels.distill import BOSS, roll, trajectory_plan
from flowkernels.nn import GaussianMixture, MMDiT, MMDiTConfig
from flowkernels.ode import Schedule, bellman_schedule, sample, uniform

UNEVEN = Schedule([1.0, 0.7, 0.3, 0.0])


class Velocity(nn.Module):
    """A velocity that depends on everything, with guidance's "no class" as class 3."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inward = nn.Linear(size + 1, 16)
        self.classes = nn.Embedding(4, 16)
        self.outward = nn.Linear(16, size)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x, t, labels):
        self.calls.append((t.detach(), labels))
        h = self.inward(torch.cat([x, t[:, None]], 1)) + self.classes(labels)
        return self.outward(torch.tanh(h))

    def null_conditions(self, conditions):
        return {"labels": torch.full_like(conditions["labels"], 3)}


class Corrected(nn.Module):
    """The exact teacher and a correction to it, zero at first."""

    def __init__(self, teacher: nn.Module, width: int = 64) -> None:
        super().__init__()
        self.teacher = teacher
        sizes = [2 + 1 + 8, width, width]
        layers = [[nn.Linear(a, b), nn.SiLU()] for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*itertools.chain(*layers), nn.Linear(width, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t):
        angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        features = torch.cat([x, t[:, None], angles.sin(), angles.cos()], 1)
        return self.teacher(x, t) + self.layers(features)


class Recorded(nn.Module):
    """The slope of stored trajectories at the time asked for: a student at zero loss."""

    def __init__(self, states, schedule) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        steps = schedule.times.diff().float()
        slopes = states.diff(dim=1) / steps.view(1, -1, *[1] * (states.dim() - 2))
        self.slopes = dict(zip(schedule.times[:-1].float().tolist(), slopes.unbind(1), strict=True))

    def forward(self, x, t):
        count = len(next(iter(self.slopes.values())))
        sample = torch.arange(len(t)) * count // len(t)  # B samples, each with all its intervals
        return torch.stack(
            [self.slopes[time][i] for time, i in zip(t.tolist(), sample.tolist(), strict=True)]
        )


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Velocity()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {"x0": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def mixture() -> GaussianMixture:
    angles = torch.arange(5) * (2 * math.pi / 5)
    means = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(means, 0.2, dtype=torch.float32)


def as_batch(states, labels=None):
    batch = {"trajectory": states}
    return batch if labels is None else {**batch, "labels": labels}


# ---- what the loss is ---------------------------------------------------------------------------


def test_at_zero_loss_the_student_lands_on_the_teachers_states():
    exact = mixture()
    noise = torch.randn(5, 2)
    plan = trajectory_plan(50, 1.0, [UNEVEN.times])
    states = roll(exact, noise, plan)
    method = BOSS(exact, schedule=UNEVEN, student=Recorded(states, UNEVEN), grid=50)
    # The slope is a product with 1/dt in the kernel and a quotient here: an ulp of |v| ≤ 4.
    assert method.losses(as_batch(states))["straightening"] < 1e-12
    walked = sample(method.student, noise, UNEVEN, return_trajectory=True)
    torch.testing.assert_close(walked.transpose(0, 1), states, rtol=1e-6, atol=1e-6)
    # and the states are the teacher's own, at 50 steps
    torch.testing.assert_close(states[:, -1], sample(exact, noise, uniform(50)))


def plain_loss(student, states, labels, schedule, weights=None):
    """L of the docstring, interval by interval, [K]."""
    found = []
    for k, (t, t_next) in enumerate(itertools.pairwise(schedule.times.tolist())):
        slope = (states[:, k + 1] - states[:, k]) / (t_next - t)
        velocity = student(states[:, k], torch.full((len(states),), t), labels)
        found.append((velocity - slope).square().mean())
    return torch.stack(found)


def test_the_loss_is_the_formula(teacher, batch):
    labels = batch["labels"]
    method = BOSS(teacher, schedule=UNEVEN, grid=10)
    states = method.rolled(batch["x0"], {"labels": labels})
    loss = method.losses(as_batch(states, labels))["straightening"]
    expected = plain_loss(teacher, states, labels, UNEVEN)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-7)
    loss.backward()
    assert all(parameter.grad is not None for parameter in method.student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    weighted = BOSS(teacher, schedule=UNEVEN, grid=10, weighting="dt2")
    found = weighted.losses(as_batch(states, labels))["straightening"]
    steps = UNEVEN.times.diff().float().square()
    torch.testing.assert_close(found, (steps * expected).mean(), rtol=1e-5, atol=1e-8)
    total = BOSS(teacher, schedule=UNEVEN, grid=10, reduction="sum")
    found = total.losses(as_batch(states, labels))["straightening"]
    torch.testing.assert_close(found, 4 * expected.mean(), rtol=1e-5, atol=1e-7)


def test_dt2_is_the_squared_error_of_the_steps(teacher, batch):
    """What the Bellman cost sums, for the student: mean over elements in place of their sum."""
    labels = batch["labels"]
    method = BOSS(teacher, schedule=UNEVEN, grid=UNEVEN, weighting="dt2")
    bent = batch["x0"][:, None] + torch.randn(6, 4, 4)  # no trajectory, and no matter
    loss = method.losses(as_batch(bent, labels))["straightening"]
    errors = []
    for k, (t, t_next) in enumerate(itertools.pairwise(UNEVEN.times.tolist())):
        velocity = method.student(bent[:, k], torch.full((6,), t), labels)
        errors.append(bent[:, k] + (t_next - t) * velocity - bent[:, k + 1])
    torch.testing.assert_close(loss, torch.stack(errors).square().mean(), rtol=1e-5, atol=1e-7)


def test_one_interval_of_each_is_the_same_in_the_mean(teacher, batch):
    labels = batch["labels"]
    states = BOSS(teacher, schedule=UNEVEN, grid=10).rolled(batch["x0"], {"labels": labels})
    for schedule in (UNEVEN, {2: uniform(2), 5: uniform(5)}):
        every = BOSS(teacher, schedule=schedule, grid=10)
        single = BOSS(teacher, schedule=schedule, grid=10, intervals="one")
        if isinstance(schedule, dict):
            states = every.rolled(batch["x0"], {"labels": labels})
        stored = as_batch(states, labels)
        many = as_batch(states.repeat(4000, *[1] * (states.dim() - 1)), labels.repeat(4000))
        with torch.no_grad():
            expected = every.losses(stored)["straightening"]
            found = single.losses(many)["straightening"]
        # 24,000 draws of losses that vary by less than twice their mean: 3 standard errors.
        assert abs(found / expected - 1) < 3 * 2 / math.sqrt(24_000)


def test_several_budgets_count_the_same(teacher, batch):
    labels = batch["labels"]
    schedules = {2: uniform(2), 5: uniform(5)}
    method = BOSS(teacher, schedule=schedules, grid=10)
    assert method.plan.times.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0])
    states = method.rolled(batch["x0"], {"labels": labels})
    loss = method.losses(as_batch(states, labels))["straightening"]
    parts = []
    for steps, schedule in schedules.items():
        alone = BOSS(teacher, schedule=schedule, grid=10, trajectory_times=method.plan.times)
        parts.append(alone.losses(as_batch(states, labels))["straightening"])
        assert list(alone.schedules) == [steps]
    torch.testing.assert_close(loss, torch.stack(parts).mean(), rtol=1e-5, atol=1e-7)
    for steps in schedules:
        images = method.generate(batch["x0"], steps, labels=labels)
        expected = sample(teacher, batch["x0"], uniform(steps), conditions={"labels": labels})
        torch.testing.assert_close(images, expected)


def test_reflow_is_regressed_on_the_line(teacher, batch):
    labels = batch["labels"]
    states = BOSS(teacher, schedule=UNEVEN, grid=10).rolled(batch["x0"], {"labels": labels})
    noise, endpoint = states[:, 0], states[:, -1]
    ends = states[:, [0, -1]]
    method = BOSS(teacher, schedule=UNEVEN, grid=10, path="reflow-steps")
    loss = method.losses(as_batch(ends, labels))["reflow"]
    line = torch.stack([torch.lerp(endpoint, noise, t) for t in UNEVEN.times.tolist()], 1)
    expected = plain_loss(teacher, line, labels, UNEVEN).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    method = BOSS(teacher, schedule=UNEVEN, grid=10, path="reflow")
    teacher.calls.clear()
    method.student.calls.clear()
    assert method.losses(as_batch(ends, labels))["reflow"].isfinite()
    ((t, _),) = method.student.calls
    assert t.shape == (18,)
    assert len(set(t.tolist())) == 18  # B·K times, as many as straightening's, all their own


# ---- the trajectories ---------------------------------------------------------------------------


def test_stored_trajectories_train_the_same_student(teacher, batch):
    method = BOSS(teacher, schedule=UNEVEN, grid=10)
    torch.manual_seed(7)
    online = method.losses(batch)["straightening"]
    online.backward()
    expected = [parameter.grad.clone() for parameter in method.student.parameters()]
    method.zero_grad()
    torch.manual_seed(7)
    conditions = {"labels": batch["labels"]}
    states = method.rolled(torch.randn(6, 4), conditions)
    stored = method.losses(as_batch(states, batch["labels"]))["straightening"]
    stored.backward()
    assert torch.equal(stored, online)
    for parameter, gradient in zip(method.student.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_times_off_the_grid_become_stops_of_their_own(teacher, batch):
    plan = trajectory_plan(4, 1.0, [uniform(3).times])
    assert plan.schedule.times.tolist() == pytest.approx([1, 0.75, 2 / 3, 0.5, 1 / 3, 0.25, 0])
    labels = {"labels": batch["labels"]}
    states = roll(teacher, batch["x0"], plan, conditions=labels)
    walked = sample(teacher, batch["x0"], plan.schedule, conditions=labels, return_trajectory=True)
    assert torch.equal(states, walked[list(plan.kept)].transpose(0, 1))
    # The schedule of a file and the grid it was chosen on are one, to the last bit or nearly.
    nudged = Schedule([1.0, 0.75 + 1e-12, 0.0])
    assert trajectory_plan(4, 1.0, [nudged.times]).schedule == uniform(4)


def test_guidance_is_baked_in(teacher, batch):
    conditions = {"labels": batch["labels"]}
    method = BOSS(teacher, schedule=uniform(2), grid=4, guidance=3.0)
    expected = sample(
        teacher, batch["x0"], uniform(4), guidance=3.0, conditions=conditions,
        return_trajectory=True,
    )[::2].transpose(0, 1)  # fmt: skip
    assert torch.equal(method.rolled(batch["x0"], conditions), expected)
    method.student.calls.clear()
    method.losses(batch)
    method.generate(batch["x0"], 2, **conditions)
    rows = [len(t) for t, _ in method.student.calls]
    assert rows == [12, 6, 6]  # all intervals of six samples at once; then two steps, no 2B
    assert all(int(labels.max()) < 3 for _, labels in method.student.calls)


def test_trajectories_are_reused_between_rolls(teacher, batch):
    method = BOSS(teacher, schedule=UNEVEN, grid=10, refresh=3, pool=2)
    for call in range(7):
        before = len(teacher.calls)
        method.losses(batch)
        assert len(teacher.calls) - before == (10 if call % 3 == 0 else 0)
    states = [states for states, _ in method._pool.rolls]
    assert len(states) == 2
    drawn, conditions = method._trajectories(batch)
    rows = {tuple(row.flatten().tolist()) for each in states for row in each}
    assert all(tuple(row.flatten().tolist()) in rows for row in drawn)
    labelled = {
        tuple(row.flatten().tolist()): int(label)
        for each, given in method._pool.rolls
        for row, label in zip(each, given["labels"], strict=True)
    }
    for row, label in zip(drawn, conditions["labels"], strict=True):
        assert labelled[tuple(row.flatten().tolist())] == int(label)


def test_a_resume_finds_the_same_trajectories(teacher, batch):
    first = BOSS(copy.deepcopy(teacher), schedule=UNEVEN, grid=10, refresh=4)
    first.losses(batch)
    torch.manual_seed(3)
    expected = [first.losses(batch)["straightening"].item() for _ in range(4)]
    again = BOSS(copy.deepcopy(teacher), schedule=UNEVEN, grid=10, refresh=4)
    torch.manual_seed(5)
    other = BOSS(copy.deepcopy(teacher), schedule=UNEVEN, grid=10, refresh=4)
    other.losses(batch)
    state = copy.deepcopy(other.state_dict())
    torch.manual_seed(3)
    followed = [other.losses(batch)["straightening"].item() for _ in range(4)]
    again.load_state_dict(state)
    torch.manual_seed(3)
    assert [again.losses(batch)["straightening"].item() for _ in range(4)] == followed
    assert followed != expected  # from other trajectories
    with pytest.raises(ValueError, match="schedule: the state is of a student of other steps"):
        BOSS(teacher, schedule=uniform(3), grid=10).load_state_dict(state)


def test_budgets_are_planned_from_noise():
    exact = mixture()
    noise = torch.randn(32, 2)
    method = BOSS(exact, budgets=(2, 4), noise=noise, student=Corrected(exact), grid=20)
    expected = bellman_schedule(exact, noise, grid=20, budgets=(2, 4))
    assert method.schedules == expected.schedules
    assert method.bellman.report().keys() == {2, 4}
    assert method.plan.schedule == uniform(20)  # every stop is on the grid


# ---- a student that learns ----------------------------------------------------------------------


def test_straightening_reduces_the_paired_error():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    exact = mixture()
    schedule = uniform(4)
    method = BOSS(exact, schedule=schedule, student=Corrected(exact), grid=50)
    states = method.rolled(torch.randn(4096, 2), {})
    optimizer = torch.optim.Adam(method.student.layers.parameters(), 3e-3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 250)
        optimizer.zero_grad()
        rows = torch.randint(len(states), (256,))
        sum(method.losses(as_batch(states[rows])).values()).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    noise = torch.randn(2000, 2)
    truth = sample(exact, noise, uniform(50))
    before, after = (
        (sample(network, noise, schedule) - truth).square().mean()
        for network in (exact, method.student)
    )
    # 0.43 to 0.44 of the teacher's were seen over three seeds.
    assert after < 0.6 * before


def test_low_rank_student(batch):
    config = MMDiTConfig(image_size=4, in_channels=1, dim=16, depth=1, heads=2, num_classes=3)
    teacher = MMDiT(config)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)  # the fresh network's output is zero
    method = BOSS(teacher, schedule=UNEVEN, grid=5, lora_rank=2)
    trained = {n for n, p in method.student.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.rsplit(".", 1)[1] in ("up", "down") for name in trained)
    noise, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    x0 = {"x0": torch.randn(2, 1, 4, 4), "labels": labels}
    assert torch.equal(
        method.generate(noise, 3, labels=labels), method.generate(noise, 3, teacher, labels=labels)
    )
    method.losses(x0)["straightening"].backward()
    # Every layer's update is reached, those that a block reads by their weight too.
    ups = {n: p for n, p in method.student.named_parameters() if n.endswith(".up")}
    unreached = [name for name, up in ups.items() if up.grad is None or not up.grad.any()]
    assert not unreached
    with torch.no_grad():
        for up in ups.values():
            up.normal_(std=0.1)
    shipped = method.merged(method.student)
    assert shipped.state_dict().keys() == teacher.state_dict().keys()
    torch.testing.assert_close(
        method.generate(noise, 3, shipped, labels=labels),
        method.generate(noise, 3, labels=labels),
    )
    assert not torch.equal(
        method.generate(noise, 3, labels=labels), method.generate(noise, 3, teacher, labels=labels)
    )


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": None}, "schedule or budgets: one of the two must be given"),
        ({"budgets": 2}, "schedule or budgets: one of the two must be given, and only one"),
        ({"schedule": None, "budgets": 2}, "budgets needs noise"),
        ({"schedule": [1.0, 0.5]}, "schedule: times is .* must fall strictly from exactly 1"),
        ({"schedule": {3: uniform(2)}}, r"schedule\[3\] is Schedule.* must be 3 steps"),
        ({"schedule": {}}, "schedule is empty"),
        ({"grid": 0}, "grid is 0; it must be an int of at least 1"),
        ({"grid": uniform(4), "shift": 3.0}, r"shift is 3\.0; it must be 1 where grid is"),
        ({"shift": -1.0}, r"shift is -1\.0"),
        ({"guidance": math.inf}, "guidance is inf; it must be a finite number"),
        ({"path": "straight"}, "path is 'straight'; it must be one of teacher, reflow, reflow-st"),
        ({"intervals": "two"}, "intervals is 'two'; it must be 'all' or 'one'"),
        ({"weighting": "dt"}, "weighting is 'dt'; it must be None or 'dt2'"),
        ({"weighting": "dt2", "path": "reflow"}, "reflow at uniform times has no steps"),
        ({"refresh": 0}, "refresh is 0; it must be an int of at least 1"),
        ({"pool": 1.5}, r"pool is 1\.5; it must be an int of at least 1"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be None or an int"),
        ({"lora_rank": 2, "lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"reduction": "none"}, "reduction is 'none'; it must be 'mean' or 'sum'"),
        ({"trajectory_times": [1.0, 0.0]}, r"no state at t = 0\.5: the trajectories have 1, 0"),
    ],
)
def test_options_out_of_range(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        BOSS(teacher, **{"schedule": uniform(2), **options})


def test_networks_and_batches_that_do_not_fit(teacher, batch):
    with pytest.raises(ValueError, match="student is the teacher itself"):
        BOSS(teacher, schedule=uniform(2), student=teacher)
    with pytest.raises(ValueError, match="student has no weights to train"):
        BOSS(mixture(), schedule=uniform(2))
    with pytest.raises(ValueError, match="guidance needs unconditional inputs"):
        BOSS(mixture(), schedule=uniform(2), student=Corrected(mixture()), guidance=2.0)
    method = BOSS(teacher, schedule=uniform(2), grid=4)
    with pytest.raises(ValueError, match="steps is 3; this student samples in 2"):
        method.generate(batch["x0"], 3, labels=batch["labels"])
    with pytest.raises(ValueError, match=r"batch\['trajectory'\] has shape \(6, 4, 4\)"):
        method.losses(as_batch(torch.zeros(6, 4, 4), batch["labels"]))
    with pytest.raises(ValueError, match=r"batch\['labels'\] has shape"):
        method.losses(as_batch(torch.zeros(6, 3, 4), batch["labels"][:2]))
    with pytest.raises(ValueError, match="phase is 'fake'"):
        method.losses(batch, "fake")
