"""The Bellman cost of all jumps on a grid of 100 steps, and the teacher's step that feeds it.

The peer computes the definition from states that are on the device already: for each start, the
errors of the jumps to all later times in one expression. Compiled, that expression is one graph for
every number of later times. The published way holds states on the host and fetches a pair at a
time; it is measured where the level is full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import Call, Case, Context, Operation, Prepared, Random, cases_of
from bench.peers import copy_call
from bench.shapes import label, latent_shapes
from bench.timing import REPLAY
from flowkernels.ode import bellman_cost, uniform
from flowkernels.ops.bellman import bellman_step

Tensor = torch.Tensor
STEPS, DT, GUIDANCE = 100, -1 / 100, 4.5
TINY = (2, 4, 4, 4)
# Trajectories [B, C, H, W], each with its priority: what a CPU does in a second or so; the size
# that the paper's images have.
TRAJECTORIES = {
    "tiny": [((2, 3, 4, 4), 1)],
    "cpu": [((8, 3, 64, 64), 1), ((32, 3, 32, 32), 2)],
    "cuda": [((100, 3, 256, 256), 1), ((100, 16, 64, 64), 2)],
}


def _jump_errors(later: Tensor, x: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    """[K]: mean over samples of ‖later_k - x - span_k·v‖²."""
    shape = (-1, *[1] * x.dim())
    return (later - x - spans.view(shape) * v).square().flatten(2).sum(-1).mean(1)


def pairwise(v: Tensor, x: Tensor, times: Tensor, errors: Callable[..., Any]) -> Tensor:
    """The definition, a row of the matrix at a time."""
    cost = torch.zeros(len(times), len(times), dtype=torch.float64)
    for j in range(len(v)):
        cost[j, j + 1 :] = errors(x[j + 1 :], x[j], v[j], times[j + 1 :] - times[j])
    return cost


def published(v: Tensor, x: Tensor, times: Tensor, device: torch.device) -> Tensor:
    """A pair at a time, from the host's memory."""
    cost = torch.zeros(len(times), len(times), dtype=torch.float64)
    for j in range(len(v)):
        for k in range(j + 1, len(times)):
            start, slope, end = (each.to(device) for each in (x[j], v[j], x[k]))
            error = end - start - (times[k] - times[j]) * slope
            cost[j, k] = error.square().flatten(1).sum(-1).mean().item()
    return cost


def _trajectories(shape: tuple[int, ...], context: Context) -> tuple[Tensor, Tensor]:
    """Velocities that drift as a teacher's do, and their Euler states, float32."""
    random = Random(0, torch.float32, context.torch_device)
    v = torch.empty(STEPS, *shape, device=context.torch_device)
    x = torch.empty(STEPS + 1, *shape, device=context.torch_device)
    v[0], x[0] = random.normal(*shape), random.normal(*shape)
    for k in range(STEPS):
        if k:
            torch.add(v[k - 1], random.normal(*shape, scale=0.1), out=v[k])
        torch.add(x[k], v[k], alpha=DT, out=x[k + 1])
    return v, x


def _build(shape: tuple[int, ...], names: tuple[str, ...], context: Context) -> Prepared:
    grid, (v, x) = uniform(STEPS), _trajectories(shape, context)
    times = grid.times.to(v)
    compiled = torch.compile(
        _jump_errors, fullgraph=True, dynamic=True, backend=context.compile_backend
    )
    variants: dict[str, Call] = {
        "ours": lambda index: bellman_cost(v, grid),
        "eager": lambda index: pairwise(v, x, times, _jump_errors),
        "compile": lambda index: pairwise(v, x, times, compiled),
    }
    if "published" in names:
        hosts = v.cpu(), x.cpu(), times.cpu()
        variants["published"] = lambda index: published(*hosts, context.torch_device)
    checked = {name: variants[name] for name in names if name != "copy"}
    variants["copy"] = copy_call(v.nbytes, 1, context.torch_device)
    return Prepared(
        {name: variants[name] for name in names},
        v.nbytes,
        1,
        lambda: _verify(checked, v, x, grid.times),
        capture=False,  # the matrix comes back to the host
    )


def _verify(calls: dict[str, Call], v: Tensor, x: Tensor, times: Tensor) -> dict[str, float]:
    """The largest relative error over jumps of two steps and more; ours within 1e-5 of float64.

    The truth takes the first two samples alone: in float64 all of them may not fit.
    """
    few, start = v[:, :2].double().cpu(), x[:1, :2].double().cpu()
    spans = times.diff().view(-1, *[1] * (few.dim() - 1))
    states = torch.cat([start, start + (spans * few).cumsum(0)])
    truth = pairwise(few, states, times, _jump_errors)
    far = torch.ones_like(truth, dtype=torch.bool).triu(2)

    def distance(found: Tensor) -> float:
        return float(((found - truth).abs() / truth)[far].max())

    error = distance(bellman_cost(v[:, :2], times))
    assert error < 1e-5, f"ours: relative error {error:.2e}, at most 1e-5"
    ours = calls["ours"](0)
    errors = {"ours": error}
    for name, call in calls.items():
        if name != "ours":  # states in float32 lose digits where a jump's error is small
            errors[name] = float(((call(0) - ours).abs() / ours)[far].max())
            assert errors[name] < 1e-2, f"{name}: {errors[name]:.2e} from ours"
    return errors


def _step_inputs(random: Random, shape: tuple[int, ...]) -> list[Tensor]:
    """The velocity before is an earlier step's result: float32 whatever the model's dtype."""
    x, v, v_uncond, previous = (random.normal(*shape) for _ in range(4))
    return [x, v, v_uncond, previous.float()]


def _step(x: Tensor, v: Tensor, v_uncond: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
    found = bellman_step(x, v, DT, previous, v_uncond=v_uncond, guidance=GUIDANCE)
    assert found[2] is not None
    return found[0], found[1], found[2]


def _eager_step(x: Tensor, v: Tensor, v_uncond: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
    velocity = v_uncond.float() + GUIDANCE * (v.float() - v_uncond.float())
    return (x + DT * velocity).to(x.dtype), velocity, velocity - previous


STEP = Operation(
    name="bellman_step_guided", family="step",
    make=_step_inputs,
    ours=_step, eager=_eager_step, names=("x", "v", "v_uncond", "previous"),
)  # fmt: skip


def cases(context: Context) -> list[Case]:
    tiny = context.level == "tiny"
    peers = ("published",) if context.level == "full" else ()
    names = ("ours", "eager", "compile", *peers, "copy")
    found = [
        Case(
            "bellman_cost", "bellman", f"{STEPS}x{label(shape)}", STEPS * torch.Size(shape).numel(),
            "float32", "forward", "speed", priority, names,
            lambda context, shape=shape: _build(shape, names, context),
        )
        for shape, priority in TRAJECTORIES["tiny" if tiny else context.device]
    ]  # fmt: skip
    shapes = [(shape, 1 + priority) for shape, priority in latent_shapes(context.level)[:2]]
    return found + cases_of(STEP, shapes, tiny=TINY)


@pytest.mark.benchmark(timer=REPLAY)
def test_bellman(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
