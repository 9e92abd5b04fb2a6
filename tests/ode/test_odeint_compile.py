"""odeint under torch.compile: one graph on a fixed grid, one break around any other solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flowkernels.ode import odeint
from flowkernels.ode.solvers.traced import MOST_CALLS
from flowkernels.ode.tableaus import FIXED

Tensor = torch.Tensor


class Field(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight.to(dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight) * torch.cos(t).to(y.dtype)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _state(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).to(dtype)


@pytest.mark.parametrize(("method", "reverse"), [("euler", True), ("heun3", False), ("rk4", True)])
def test_a_fixed_grid_is_one_graph(method: str, reverse: bool) -> None:
    """Values, and gradients to the state, to the times and to the parameters."""
    field = Field()

    def solve(y: Tensor, t: Tensor) -> Tensor:
        return odeint(field, y * 2, t, method=method).sin()

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, solve):
        y, t = _state().requires_grad_(), torch.linspace(0, 1, 3, dtype=torch.float64)
        t = (-t if reverse else t).requires_grad_()
        result = function(y, t)
        grads = torch.autograd.grad(result[1:].square().sum(), (y, t, field.weight))
        found.append((result, *grads))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_sizes_share_a_graph(dtype: torch.dtype) -> None:
    field = Field(dtype)
    compiled = torch.compile(
        lambda y, t: odeint(field, y, t, method="midpoint"),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    t = torch.linspace(1, 0, 3)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for batch in (2, 5, 9):
            y = torch.linspace(-1, 1, 3 * batch).reshape(batch, 3).to(dtype)
            found, expected = compiled(y, t), odeint(field, y, t, method="midpoint")
            assert found.dtype == dtype
            limit = 1e-6 if dtype == torch.float32 else 2e-2  # two roundings of the state
            torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def test_tuples_are_one_graph() -> None:
    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -y[1].sum() * y[0], torch.cos(t) * y[1]

    y0 = (_state(), torch.ones(4, dtype=torch.float64))
    t = torch.linspace(0, 1, 3, dtype=torch.float64)

    def solve(a: Tensor, b: Tensor) -> Any:
        return odeint(field, (a, b), t, method="midpoint")

    found = torch.compile(solve, fullgraph=True, backend="aot_eager")(*y0)
    torch.testing.assert_close(found, solve(*y0), rtol=0, atol=1e-12)


def _breaks(solve: Callable[[Tensor], Tensor]) -> int:
    """Breaks of the graph, between work before and after the solve, which is what it is without."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        found = torch.compile(lambda y: solve(y * 2) + 1, backend=count)(_state())
        torch.testing.assert_close(found, solve(_state() * 2) + 1, rtol=0, atol=1e-12)
    return len(graphs) - 1


T = torch.linspace(0, 1, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "dopri5"},
        {"method": "dopri5", "options": {"sync_every": 4}},
        {"method": "euler", "options": {"step_size": 0.1}},
        {"method": "explicit_adams"},
        {"method": "euler", "t": torch.linspace(0, 1, MOST_CALLS + 2)},
    ],
    ids=("dopri5", "sync_every", "step_size", "adams", "long"),
)
def test_any_other_solve_breaks_the_graph_once(arguments: dict[str, Any]) -> None:
    field = Field()

    def solve(y: Tensor) -> Tensor:
        return odeint(field, y, **{"t": T, **arguments})

    assert _breaks(solve) == 1


def test_a_short_fixed_grid_breaks_no_graph() -> None:
    field = Field()
    for method in FIXED:
        assert _breaks(lambda y, method=method: odeint(field, y, T, method=method)) == 0


def test_what_is_wrong_is_said_in_a_graph_too() -> None:
    compiled = torch.compile(lambda y, t: odeint(Field(), y, t, method="euler"), backend="eager")
    with pytest.raises(Exception, match="`t` must be a floating point Tensor"):
        compiled(_state(), torch.arange(3))
