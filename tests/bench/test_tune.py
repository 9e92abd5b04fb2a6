"""The tuning script: every candidate changes a launch, and what fails or is wrong is told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from bench import tune
from bench.cases import Context, Operation, Random
from bench.tune import Candidate, Choice, measure
from flowkernels.ops import _triton
from tests.checks.aot import launchers_on_meta

pytest.importorskip("triton")
candidates = pytest.importorskip("bench.candidates")

CHOICES = candidates.choices(90)
CORES = [choice for choice in CHOICES if choice.name == "attention core"]
KERNELS = [choice for choice in CHOICES if choice not in CORES]


class Meta(Random):
    """Tensors of a shape and a dtype, and no numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("meta")

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def times(self, batch: int) -> torch.Tensor:
        return torch.empty(batch, device="meta")


def launched(choice: Choice, candidate: Candidate | None = None) -> list[Any]:
    """Names, grids and options of what one forward and backward would launch on Hopper."""
    operation = choice.operation
    inputs = operation.make(Meta(choice.dtype), choice.shape)
    if choice.direction == candidates.BOTH:
        for i in operation.gradients:
            inputs[i] = inputs[i].detach().requires_grad_()
    seen: list[Any] = []
    replaced = candidate or Candidate("nothing", ())
    with (
        launchers_on_meta(),
        _triton.compiling_for(90),
        _triton.intercepted(
            lambda kernel, grid, args, options: seen.append((kernel.fn.__name__, grid, options))
        ),
        replaced.applied(),
    ):
        found = operation.ours(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        if choice.direction == candidates.BOTH:
            leaves = [inputs[i] for i in operation.gradients]
            torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
    return seen


@pytest.mark.parametrize("choice", KERNELS, ids=lambda choice: choice.title)
def test_every_candidate_changes_a_launch(choice: Choice):
    now = launched(choice)
    assert now
    assert len({each.name for each in choice.candidates}) == len(choice.candidates)
    for candidate in choice.candidates:
        assert launched(choice, candidate) != now, candidate.name
    assert launched(choice) == now  # and leaves nothing behind


@pytest.mark.parametrize("choice", CORES, ids=lambda choice: choice.title)
def test_every_core_can_be_chosen(choice: Choice, monkeypatch: pytest.MonkeyPatch):
    from flowkernels.ops.attention import _select

    lengths = "padded" in choice.operation.name
    width = choice.shape[-1]
    monkeypatch.setattr(_select, "why_not", lambda *_: None)
    for candidate in choice.candidates:
        with candidate.applied():
            chosen = _select._auto("auto", torch.device("cuda"), torch.bfloat16, width, lengths)
        assert chosen == candidate.name


# A choice to try the script on: a function that adds what stands in this module.
SUMMAND = 0.0


def added(x: torch.Tensor) -> torch.Tensor:
    if SUMMAND is None:
        raise RuntimeError("out of resource: shared memory")
    return x + SUMMAND


def summand(value: float | None) -> Candidate:
    return Candidate(f"summand {value}", (lambda: mock.patch(f"{__name__}.SUMMAND", value),))


@pytest.fixture
def choice() -> Choice:
    operation = Operation(
        name="added", family="norm", make=lambda random, shape: [random.normal(*shape)],
        ours=added, eager=lambda x: x + 0.0, names=("x",), gradients=(0,),
        truth=lambda inputs, outputs: [inputs[0], *(torch.ones_like(x) for x in outputs[1:])],
    )  # fmt: skip
    offered = (summand(-0.0), summand(0.5), summand(None))
    return Choice("summand", operation, (64, 8), torch.float32, "forward", offered)


def test_what_is_right_is_timed_and_the_rest_says_why(choice: Choice):
    rows = {row.candidate: row for row in measure(choice, Context("cpu", "tiny", seconds=0.01))}
    assert set(rows) == {"now", "copy", "summand -0.0", "summand 0.5", "summand None"}
    for name in ("now", "copy", "summand -0.0"):
        assert rows[name].microseconds > 0
        assert rows[name].times_now > 0
    assert rows["now"].times_now == 1
    assert "relative error" in rows["summand 0.5"].note
    assert "shared memory" in rows["summand None"].note
    assert rows["summand 0.5"].microseconds is rows["summand None"].microseconds is None


def test_the_table_has_the_fastest_first(choice: Choice):
    rows = measure(choice, Context("cpu", "tiny", seconds=0.01))
    figures = [row.microseconds for row in rows if row.microseconds]
    assert figures == sorted(figures)
    assert all(not row.note for row in rows[: len(figures)])
    text = tune.table(choice.title, rows)
    assert "summand: added 64x8 float32 forward" in text
    assert text.count("\n|") == 2 + len(rows)


def test_the_screen_has_the_fastest_and_what_is_there_now():
    names = [*"abcdefgh", "now", "i", "copy"]
    rows = [tune.Row("", name, float(i), 1.0, (1.0, 1.0), 1.0) for i, name in enumerate(names)]
    assert [row.candidate for row in tune.fastest(rows)] == [*"abcdef", "now", "copy"]


def test_a_candidate_holds_while_it_is_called_and_no_longer(choice: Choice):
    seen = []
    call = summand(2.0).around(lambda index: seen.append((index, SUMMAND)))
    call(3)
    assert (seen, SUMMAND) == ([(3, 2.0)], 0.0)


def test_a_name_that_is_not_there_is_an_error():
    missing = replace(summand(0.0), patches=(candidates.put("modulate.kernels.NO_SUCH", 1),))
    with pytest.raises(AttributeError, match="NO_SUCH"):
        missing.applied()


def test_without_a_gpu_it_says_so_and_lists(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert tune.main(["--list", "-k", "norm backward"]) == 0
    assert "stages 2" in capsys.readouterr().out
