"""Timing several variants of one computation in one run: interleaved, orders and inputs rotated.

A machine's speed drifts by more than the differences that matter, so a figure here is never a time
taken alone: it is the ratio of two variants within one round, and the median of that over rounds.

A *call* is ``call(i)``: it runs its variant once on the i-th set of inputs (modulo their number).
A *sampler* measures a call many times and answers seconds per call.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

Call = Callable[[int], Any]


class Sampler(Protocol):
    """Measures one variant; ``method`` says how: "host", "events" or "graph"."""

    method: str

    def take(self) -> float:
        """One sample: seconds per call."""
        ...


def order(names: list[str], round_index: int) -> list[str]:
    """The order of a round: rotated by one each round, reversed every other cycle.

    After ``2·len(names)`` rounds each variant has stood at each place twice, and each has followed
    both of its neighbours, so that no one profits from what ran just before it.
    """
    cycle, shift = divmod(round_index, len(names))
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if cycle % 2 else rotated


@dataclass
class Comparison:
    """Seconds per call, one sample a round for each variant."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def spread(self, name: str) -> tuple[float, float]:
        """First and third quartile of the seconds per call."""
        return quartiles(self.samples[name])

    def ratios(self, peer: str, ours: str = "ours") -> list[float]:
        """How many times as long the peer took as ours, round by round."""
        return [p / o for p, o in zip(self.samples[peer], self.samples[ours], strict=True)]


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(
    samplers: Mapping[str, Sampler],
    *,
    seconds: float,
    min_rounds: int = 8,
    max_rounds: int = 200,
    now: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Interleave the samplers, one sample each a round, in the order of :func:`order`.

    Args:
        samplers: by name of the variant.
        seconds: stop after the round in which this much time is spent, but not before
            ``min_rounds``; whole cycles only, so that each variant stood at each place.
        min_rounds: at least so many rounds.
        max_rounds: at most so many.
        now: the clock that ``seconds`` is read on.

    Returns:
        The samples, by variant, in the order of the rounds.
    """
    names = list(samplers)
    result = Comparison({name: [] for name in names}, {n: samplers[n].method for n in names})
    cycle = len(names)
    least = math.ceil(min_rounds / cycle) * cycle
    most = max(least, max_rounds // cycle * cycle)
    start = now()
    done = 0
    with _no_collection():
        while done < most and (done < least or done % cycle or now() - start < seconds):
            for name in order(names, done):
                result.samples[name].append(samplers[name].take())
            done += 1
    return result


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class HostSampler:
    """Wall-clock time of calls: the whole of it on CPU, the launching alone on a GPU.

    Args:
        call: the variant.
        sample_seconds: a sample makes as many calls as fill this, at most ``max_calls``.
        synchronize: run before and after a sample, outside the time (GPU).
        max_calls: on a GPU few enough that the launch queue never fills.
    """

    method = "host"

    def __init__(
        self,
        call: Call,
        *,
        sample_seconds: float = 2e-3,
        synchronize: Callable[[], None] | None = None,
        max_calls: int = 2000,
    ) -> None:
        self._call, self._next = call, 0
        self._synchronize = synchronize or (lambda: None)
        self.calls = 1
        for _ in range(2):
            self.take()
        once = min(self.take() for _ in range(2))
        self.calls = max(1, min(max_calls, math.ceil(sample_seconds / max(once, 1e-7))))

    def take(self) -> float:
        call, first = self._call, self._next
        self._next += self.calls
        # One call that is not timed: what the variant before left behind (memory that the allocator
        # gave back to the system, a cold instruction cache) would be charged to this one.
        call(first - 1)
        self._synchronize()
        start = time.perf_counter()
        for index in range(first, self._next):
            call(index)
        elapsed = time.perf_counter() - start
        self._synchronize()
        return elapsed / self.calls


# Below this a GPU call is timed inside a CUDA graph: launching it would take as long as running it.
# (100 µs of kernels is the rule; a chain of eager kernels may be launch-bound up to a millisecond.)
GRAPH_BELOW_SECONDS = 1e-3


class CudaSampler:
    """Device time of calls, by CUDA events; short ones as replays of a graph of many calls.

    Args:
        call: the variant.
        sets: how many sets of inputs it rotates through; a graph holds at least one call of each.
        sample_seconds: a sample makes as many calls as fill this.
        capture: False for what cannot be captured.
    """

    def __init__(
        self, call: Call, *, sets: int, sample_seconds: float = 2e-3, capture: bool = True
    ) -> None:
        import torch

        self._call, self._next = call, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self.method, self.calls = "events", 1
        for _ in range(3):
            self.take()
        self.calls = 3
        once = min(self.take() for _ in range(3))
        fill = math.ceil(sample_seconds / max(once, 1e-7))
        self.calls = max(1, min(fill, 256))
        if capture and once < GRAPH_BELOW_SECONDS:
            self.calls = max(sets, min(fill, 64))
            self._capture()
        self.take()

    def _capture(self) -> None:
        import torch

        before = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for index in range(3):
                self._call(index)
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for index in range(self.calls):
                    self._call(index)
        except RuntimeError:
            # What cannot be captured is timed by events, and its row says so. A capture that fails
            # leaves its own stream behind as the current one.
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()
            return
        self._graph, self.method = graph, "graph"

    def take(self) -> float:
        import torch

        self._start.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            for index in range(self._next, self._next + self.calls):
                self._call(index)
            self._next += self.calls
        self._end.record()
        torch.cuda.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3 / self.calls


class ReplayTimer:
    """Hands samples that are already taken to pytest-benchmark, through its own timer hook.

    pytest-benchmark times one function a fixture, one after the other; interleaved samples cannot
    come from that. So the variants are compared first, and each one's benchmark then runs an empty
    function under this timer, which it reads twice a round: 0, then that round's sample. Its
    statistics, groups, storage and comparisons work on the real samples.
    """

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def __call__(self) -> float:
        return next(self._readings)


REPLAY = ReplayTimer()
"""The timer that every benchmark names in ``@pytest.mark.benchmark(timer=REPLAY)``."""
