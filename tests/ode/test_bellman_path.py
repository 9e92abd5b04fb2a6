"""The path search: brute force, ties, rises, budgets, and the fallback without C++."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkernels.ode import bellman_cost, bellman_path, shifted, uniform
from flowkernels.ode.bellman import path as module
from flowkernels.ode.bellman.path import solve_in_python
from tests.ode.bellman_oracles import brute_force, uneven

pytestmark = pytest.mark.filterwarnings("ignore:bellman_path")  # of random costs many rise
native = pytest.mark.skipif(module._native() is None, reason="the host routines are not built")


@st.composite
def costs(draw, most=10):
    """Of few distinct values, so that paths tie, or of any."""
    N = draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        cost = torch.randint(0, 4, (N + 1, N + 1), generator=generator).double()
    else:
        cost = torch.rand(N + 1, N + 1, generator=generator, dtype=torch.float64)
    return cost  # what lies on and below the diagonal is not read


@settings(deadline=None, max_examples=60)
@given(cost=costs(), discount=st.sampled_from([1.0, 1.15, 0.5]))
def test_equals_brute_force(cost, discount):
    """Every K of every grid up to ten steps: the optimum, and of equal paths the lowest stops."""
    N = len(cost) - 1
    grid = uneven(N)
    found = bellman_path(cost, grid, range(1, N + 1), discount=discount)
    assert list(found) == list(range(1, N + 1))
    for K in found:
        total, stops = brute_force(cost, K, discount)
        assert found.optima[K] == total
        assert found.stops[K] == stops
        assert torch.equal(found[K].times, grid.times[stops])
        assert found[K].origin == f"bellman({K} of {N})"


@native
@settings(deadline=None, max_examples=30)
@given(cost=costs(40), discount=st.sampled_from([1.0, 1.15, 0.0]))
def test_the_fallback_gives_the_same_bits(cost, discount):
    above = np.triu(cost.numpy(), 1)
    budgets = list(range(1, len(cost)))
    assert module.solve(above, budgets, discount) == solve_in_python(above, budgets, discount)


def test_without_the_host_routines(monkeypatch):
    cost = torch.rand(9, 9)
    expected = bellman_path(cost, uniform(8), [4])
    monkeypatch.setitem(sys.modules, "flowkernels._C", None)
    assert module._native() is None
    found = bellman_path(cost, uniform(8), [4])
    assert found == expected
    assert found.stops == expected.stops


@native
def test_the_host_routine_checks_what_it_is_given():
    from flowkernels import _C

    with pytest.raises(ValueError, match=r"^cost: need a square matrix"):
        _C.bellman_paths(np.zeros((2, 3)), [1], 1.0)
    for budget in (0, 2):
        with pytest.raises(ValueError, match=r"^budgets: need numbers from 1"):
            _C.bellman_paths(np.zeros((2, 2)), [budget], 1.0)


def test_all_steps_are_the_grid_and_one_step_is_one():
    grid = shifted(12, 3.0)
    found = bellman_path(torch.rand(13, 13), grid, [12, 1])
    assert list(found) == [12, 1]
    assert found[12] == grid
    assert found[1].times.tolist() == [1.0, 0.0]


def test_ties_go_to_the_lowest_stop():
    for K in range(1, 7):
        found = bellman_path(torch.zeros(7, 7), uniform(6), [K])
        assert found.stops[K] == [*range(K), 6]


def test_a_rise_is_reported():
    """v = (1, 0, 2): one step lands on the teacher's endpoint by luck, two cannot."""
    cost = bellman_cost(torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1), uniform(3))
    with pytest.warns(UserWarning, match=r"^bellman_path: .* at K = 2$") as caught:
        found = bellman_path(cost, uniform(3), [1, 2, 3])
    assert caught[0].filename == __file__
    assert found.rises == (2,)
    assert found.optima == pytest.approx({1: 0.0, 2: 1 / 9, 3: 0.0}, abs=1e-12)
    # Also where the lower budget was not asked for.
    with pytest.warns(UserWarning, match="K = 2"):
        assert bellman_path(cost, uniform(3), [2]).rises == (2,)


def test_rounding_is_no_rise():
    cost = torch.zeros(5, 5)
    cost[0, 1:] = 1.0
    cost[1:, 4] = 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bellman_path(cost, uniform(4), [1, 2, 3]).rises == ()


def test_takes_what_numbers_come_in():
    cost = torch.rand(5, 5, dtype=torch.float64)
    expected = bellman_path(cost, uniform(4), [2, 4])
    for given_cost in (cost.numpy(), cost.tolist(), cost.clone().requires_grad_()):
        for times in (uniform(4).times, uniform(4).times.tolist()):
            assert bellman_path(given_cost, times, (2, np.int64(4), 2)) == expected


def test_only_what_lies_above_the_diagonal_is_read():
    cost = torch.full((4, 4), float("nan")).tril() + torch.rand(4, 4).triu(1)
    assert bellman_path(cost, uniform(3), [2]) == bellman_path(cost.triu(1), uniform(3), [2])


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"^cost: got shape \(4, 4\), need \(5, 5\)", {"cost": torch.zeros(4, 4)}),
        (ValueError, "^cost: .*not finite", {"cost": torch.full((5, 5), float("inf"))}),
        (ValueError, "^cost: got str", {"cost": "cheap"}),
        (ValueError, "^times is .*must fall strictly", {"times": [1.0, 0.5, 0.6, 0.2, 0.0]}),
        (ValueError, "^times is .*must fall strictly", {"times": [0.0, 0.2, 0.5, 0.6, 1.0]}),
        (ValueError, "^budgets: got 0, need", {"budgets": [0]}),
        (ValueError, "^budgets: got 5, need .* 4", {"budgets": [2, 5]}),
        (ValueError, "^budgets: got none", {"budgets": []}),
        (TypeError, "^budgets: got 2.0 among them", {"budgets": [2.0]}),
        (TypeError, "^budgets: got True among them", {"budgets": [True]}),
        (TypeError, "^budgets: got 4, need", {"budgets": 4}),
        (TypeError, "^budgets: got '4'", {"budgets": "4"}),
        (ValueError, "^discount: got -1", {"discount": -1}),
        (TypeError, "^discount: got str", {"discount": "none"}),
    ],
)
def test_names_the_argument_of_a_bad_input(error, match, change):
    arguments = {"cost": torch.zeros(5, 5), "times": uniform(4), "budgets": [2], **change}
    with pytest.raises(error, match=match) as caught:
        bellman_path(**arguments)
    assert "\n" not in str(caught.value)
