"""Measures one case: check, time, peak memory, and the row of the table that comes of it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Call, Case, Context, Prepared
from bench.targets import Target, target
from bench.timing import Comparison, CudaSampler, HostSampler, Sampler, compare, quartiles

# A launch queue holds some thousand launches; a chain of eager kernels takes up to about ten each.
HOST_CALLS_ON_GPU = 40


@dataclass
class Measurement:
    """A case's row, and the samples behind it by variant."""

    row: dict[str, Any]
    samples: dict[str, list[float]]


def measure(case: Case, context: Context) -> Measurement:
    """Set the case up, check every variant against float64, time them together.

    Raises:
        AssertionError: A variant computes something else than the reference.
    """
    prepared = case.build(context)
    errors = prepared.verify()
    compared = _compare(prepared, case, context)
    row = _row(case, context, prepared, compared, errors)
    if case.kind == "speed":
        row["peak_bytes"] = {
            name: peak_memory(call, context.device)
            for name, call in prepared.variants.items()
            if name != "copy"
        }
        if context.device == "cuda":
            row["host_us"] = _host_microseconds(prepared, context)
    del prepared
    if case.kind == "speed" and context.level != "tiny":
        gc.collect()  # what the compiler keeps in cycles holds inputs too
    if context.device == "cuda":
        torch.cuda.empty_cache()
    return Measurement(row, compared.samples)


def _compare(prepared: Prepared, case: Case, context: Context) -> Comparison:
    tiny = context.level == "tiny"
    sample_seconds = 2e-4 if tiny else 2e-3
    samplers: dict[str, Sampler] = {}
    for name, call in prepared.variants.items():
        if case.kind == "host" or context.device == "cpu":
            samplers[name] = _host_sampler(call, context, sample_seconds)
        else:
            samplers[name] = CudaSampler(
                call, sets=prepared.sets, sample_seconds=sample_seconds, capture=prepared.capture
            )
    return compare(samplers, seconds=context.seconds, min_rounds=2 if tiny else 8)


def _host_sampler(call: Call, context: Context, sample_seconds: float) -> HostSampler:
    if context.device == "cpu":
        return HostSampler(call, sample_seconds=sample_seconds)
    return HostSampler(
        call,
        sample_seconds=sample_seconds,
        synchronize=torch.cuda.synchronize,
        max_calls=HOST_CALLS_ON_GPU,
    )


def _host_microseconds(prepared: Prepared, context: Context) -> dict[str, float]:
    """Host time per call of each variant at the case's own shape (the device runs behind)."""
    samplers = {
        name: _host_sampler(call, context, 2e-3)
        for name, call in prepared.variants.items()
        if name != "copy"
    }
    compared = compare(samplers, seconds=0.1, min_rounds=5, max_rounds=20)
    return {name: compared.median(name) * 1e6 for name in samplers}


def _row(
    case: Case,
    context: Context,
    prepared: Prepared,
    compared: Comparison,
    errors: dict[str, float],
) -> dict[str, Any]:
    ours = compared.median("ours")
    ratios = {n: compared.ratios(n) for n in compared.samples if n not in ("ours", "copy")}
    aim = Target()  # tiny shapes show that everything runs: no target is stated at them
    if context.level != "tiny":
        aim = target(
            case.family, context.device, case.direction,
            elements=case.elements, bytes_moved=prepared.bytes_moved, kind=case.kind,
        )  # fmt: skip
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "kind": case.kind,
        "device": context.device,
        "ours_us": ours * 1e6,
        "ours_spread_us": [value * 1e6 for value in compared.spread("ours")],
        "ratio": {peer: statistics.median(values) for peer, values in ratios.items()},
        "ratio_spread": {peer: quartiles(values) for peer, values in ratios.items()},
        "rounds": len(compared.samples["ours"]),
        "sets": prepared.sets,
        "timed_by": compared.methods,
        "bytes_moved": prepared.bytes_moved,
        "relative_error": errors,
        "target": str(aim),
    }
    if "copy" in compared.samples:
        # The copy moves as many bytes: its time over ours is the fraction of its bandwidth.
        fractions = compared.ratios("copy")
        row["bandwidth_fraction"] = statistics.median(fractions)
        row["bandwidth_fraction_spread"] = quartiles(fractions)
        row["copy_gb_per_s"] = prepared.bytes_moved / compared.median("copy") / 1e9
    row["met"] = aim.met(row)
    return row


def peak_memory(call: Call, device: str) -> int | None:
    """The most bytes that one call holds beyond its inputs; None where torch cannot say."""
    return _peak_cuda(call) if device == "cuda" else _peak_cpu(call)


def _peak_cuda(call: Call) -> int:
    call(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _peak_cpu(call: Callable[[int], Any]) -> int | None:
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            kept = call(0)
        del kept
        held = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
    except (AttributeError, RuntimeError):
        return None  # a torch whose profiler gives no allocations
    return peak
