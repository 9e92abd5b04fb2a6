"""Schedules: their times, what they refuse, and their files."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkernels.ode import Schedule, from_sigmas, shifted, uniform


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_uniform_times(n):
    schedule = uniform(n)
    assert schedule.times.dtype == torch.float64
    assert schedule.steps == len(schedule) == n
    expected = torch.tensor([1 - i / n for i in range(n + 1)], dtype=torch.float64)
    torch.testing.assert_close(schedule.times, expected, rtol=0, atol=1e-15)
    assert schedule.times[0] == 1
    assert schedule.times[-1] == 0


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0.05, 20))
def test_shifted_times_invert_to_uniform(n, shift):
    times = shifted(n, shift).times
    assert times[0] == 1
    assert times[-1] == 0
    u = times / (shift - (shift - 1) * times)
    torch.testing.assert_close(u, uniform(n).times, rtol=0, atol=1e-13)


def test_shift_one_is_uniform_and_origin_says_how():
    assert shifted(7, 1.0) == uniform(7)
    assert uniform(7).origin == "uniform(7)"
    assert shifted(7, 3).origin == "shifted(7, 3)"
    assert "shifted(2, 3)" in repr(shifted(2, 3.0))


@settings(deadline=None)
@given(st.integers(1, 100), st.floats(0.05, 20))
def test_json_restores_every_bit(n, shift):
    schedule = shifted(n, shift)
    restored = Schedule.from_json(schedule.to_json())
    assert torch.equal(restored.times, schedule.times)
    assert restored.origin == schedule.origin
    assert hash(restored) == hash(schedule)


def test_from_sigmas_takes_them_as_they_are():
    sigmas = shifted(5, 3.0).times.float()
    for given_sigmas in (sigmas, sigmas[:-1], sigmas[:-1].tolist(), sigmas.numpy()):
        assert torch.equal(from_sigmas(given_sigmas).times, sigmas.double())


def test_static_constructors():
    assert Schedule.uniform(3) == uniform(3)
    assert Schedule.shifted(3, 2.0) == shifted(3, 2.0)
    assert Schedule.from_sigmas([1.0, 0.5]) == uniform(2)
    assert Schedule.uniform(3) != uniform(4)
    assert uniform(3) != [1.0, 0.0]


def test_the_callers_times_are_copied():
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    schedule = Schedule(times)
    times[1] = 0.9
    assert schedule.times[1] == 0.5


@pytest.mark.parametrize(
    "times",
    [[], [1.0], [1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [0.0, 1.0], [1.0, float("nan"), 0.0]],
)
def test_bad_times_are_named(times):
    with pytest.raises(ValueError, match="times"):
        Schedule(times)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_bad_step_count_is_named(n):
    with pytest.raises(ValueError, match="n is"):
        uniform(n)


@pytest.mark.parametrize("shift", [0, -2.0, float("inf"), float("nan"), "3"])
def test_bad_shift_is_named(shift):
    with pytest.raises(ValueError, match="shift is"):
        shifted(4, shift)


@pytest.mark.parametrize("text", ["", "[1, 0]", '{"times": 3}', '{"times": ["1", "0"]}'])
def test_bad_json_is_named(text):
    with pytest.raises(ValueError, match=r"text|times"):
        Schedule.from_json(text)


def test_json_is_plain():
    assert json.loads(uniform(2).to_json()) == {"times": [1.0, 0.5, 0.0], "origin": "uniform(2)"}


def test_numbers_of_a_list_keep_every_digit():
    """As float64: by way of torch's default dtype 0.7 would become 0.699999988."""
    assert Schedule([1.0, 0.7, 0.0]).times.tolist() == [1.0, 0.7, 0.0]
    assert from_sigmas([1.0, 0.7]).times.tolist() == [1.0, 0.7, 0.0]


@pytest.mark.parametrize("value", [None, "a"])
def test_what_is_no_numbers_is_named(value):
    with pytest.raises(ValueError, match=r"^times is"):
        Schedule(value)
    with pytest.raises(ValueError, match=r"^sigmas is"):
        from_sigmas(value)
