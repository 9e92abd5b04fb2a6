"""The timer: its order, its statistics, and how its samples reach pytest-benchmark."""

from __future__ import annotations

import itertools

import pytest

from bench.timing import Comparison, HostSampler, ReplayTimer, compare, order, quartiles

NAMES = ["ours", "eager", "compile", "copy"]


class Recorder:
    """A sampler that notes when it was asked and answers from a list."""

    method = "host"

    def __init__(self, name: str, log: list[str], answers: list[float]) -> None:
        self.name, self.log, self.answers = name, log, itertools.cycle(answers)

    def take(self) -> float:
        self.log.append(self.name)
        return next(self.answers)


def recorders(log: list[str], **answers: list[float]) -> dict[str, Recorder]:
    return {name: Recorder(name, log, values) for name, values in answers.items()}


def test_every_variant_stands_at_every_place():
    rounds = [order(NAMES, index) for index in range(8)]
    for name in NAMES:
        places = [names.index(name) for names in rounds]
        assert sorted(places) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_every_variant_follows_both_of_its_neighbours():
    rounds = [order(NAMES, index) for index in range(8)]
    followed = {(a, b) for names in rounds for a, b in itertools.pairwise(names)}
    assert ("ours", "eager") in followed
    assert ("eager", "ours") in followed


def test_rounds_are_interleaved_and_whole_cycles():
    log: list[str] = []
    clock = itertools.count()
    result = compare(
        recorders(log, a=[1.0], b=[2.0], c=[3.0]), seconds=4, min_rounds=1, now=lambda: next(clock)
    )
    rounds = len(result.samples["a"])
    assert rounds % 3 == 0
    for index in range(rounds):
        assert log[3 * index : 3 * index + 3] == order(["a", "b", "c"], index)


def test_least_and_most_rounds_hold():
    few = compare(recorders([], a=[1.0], b=[1.0]), seconds=0, min_rounds=5)
    assert len(few.samples["a"]) == 6  # the next whole cycle
    many = compare(recorders([], a=[1.0], b=[1.0]), seconds=1e9, min_rounds=2, max_rounds=9)
    assert len(many.samples["a"]) == 8


def test_a_ratio_is_taken_within_a_round():
    # The machine slows down tenfold halfway: the ratio does not see it.
    result = Comparison({"ours": [1.0, 1.0, 10.0, 10.0], "eager": [2.0, 2.0, 20.0, 20.0]})
    assert result.ratios("eager") == [2.0, 2.0, 2.0, 2.0]
    assert result.median("ours") == 5.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3.0, 3.0)), ([1.0, 2.0, 3.0, 4.0, 5.0], (2.0, 4.0)), ([5.0, 1.0], (2.0, 4.0))],
)
def test_quartiles(values: list[float], expected: tuple[float, float]):
    assert quartiles(values) == expected


def test_inputs_rotate_across_samples():
    seen: list[int] = []
    sampler = HostSampler(seen.append, sample_seconds=0, max_calls=1)
    seen.clear()
    sampler.take()
    sampler.take()
    # Each timed call after an untimed one, which takes the inputs before its own.
    lead, first, next_lead, second = seen
    assert (lead, next_lead, second) == (first - 1, first, first + 1)


def test_short_calls_are_timed_many_at_once():
    sampler = HostSampler(lambda index: None, sample_seconds=1e-3, max_calls=50)
    assert sampler.calls == 50
    assert 0 < sampler.take() < 1e-3


def test_the_queue_is_emptied_around_a_sample_not_within():
    events: list[str] = []
    sampler = HostSampler(
        lambda index: events.append("call"),
        sample_seconds=0,
        synchronize=lambda: events.append("synchronize"),
    )
    events.clear()
    sampler.take()
    assert events == ["call", "synchronize", "call", "synchronize"]


def test_a_replayed_sample_is_the_difference_of_two_readings():
    timer, samples = ReplayTimer(), [0.5, 0.25, 0.125]
    timer.load(samples)
    # As pytest-benchmark reads it: once before and once after each round.
    assert [-timer() + timer() for _ in samples] == samples
