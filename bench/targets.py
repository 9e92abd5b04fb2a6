"""What each operator is meant to reach; a missing figure is reported without a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.shapes import LAUNCH_BOUND_BELOW

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Target:
    """At least so many times as fast as eager and compile, so much of a copy's bandwidth.

    ``host`` is the most microseconds that one call may cost the host.
    """

    eager: float | None = None
    compile: float | None = None
    bandwidth: float | None = None
    host: float | None = None

    def __str__(self) -> str:
        parts = [
            f"≥ {self.eager:g}× eager" if self.eager else "",
            f"≥ {self.compile:g}× compile" if self.compile else "",
            f"≥ {self.bandwidth:.0%} of copy" if self.bandwidth else "",
            f"≤ {self.host:g} µs" if self.host else "",
        ]
        return ", ".join(filter(None, parts))

    def met(self, row: dict[str, Any]) -> bool | None:
        """Whether a row reaches every figure; None where there is nothing to reach."""
        ratio = row["ratio"]
        checks = [
            ratio[peer] >= least
            for peer, least in (("eager", self.eager), ("compile", self.compile))
            if least and peer in ratio
        ]
        if self.bandwidth and row.get("bandwidth_fraction") is not None:
            checks.append(row["bandwidth_fraction"] >= self.bandwidth)
        if self.host:
            checks.append(row["ours_us"] <= self.host)
        return all(checks) if checks else None


HOST = {"cpu": {"forward": 10, "forward+backward": 25},
        "cuda": {"forward": 20, "forward+backward": 45}}  # fmt: skip


# Forward and backward: SDPA on concatenated tensors, with the heads' norms, and under a mask.
# Beside xformers and cuDNN a GPU has more to beat; the table shows eager and compile.
JOINT = {
    "joint": {"cpu": Target(eager=1.0), "cuda": Target(compile=1.15)},
    "normed joint": {"cpu": Target(eager=1.05), "cuda": Target(compile=1.15)},
    "padded joint": {"cpu": Target(eager=1.5), "cuda": Target(eager=2.0)},
}


def target(
    family: str, device: str, direction: str, *, elements: int, bytes_moved: int, kind: str
) -> Target:
    """The target of one case, by the family of its operator.

    Args:
        family: "norm", "gated", "heads", "joint", "normed joint", "padded joint", "loss", "step",
            "sampler", "adaptive solver", "fixed solver", "bellman", "block",
            "FGM step", "SCFlow step", "optimiser" (clip and two averages),
            "optimiser without momentum" or anything else, which has none.
        device: "cpu" or "cuda".
        direction: "forward" or "forward+backward".
        elements: of the largest operand.
        bytes_moved: the least bytes that the case must move.
        kind: "speed" or "host" (time that a call costs the host, at a tiny size).
    """
    if kind == "host":
        # Never above the eager chain it replaces.
        return Target(eager=1.0, host=HOST[device][direction])
    backward = direction == "forward+backward"
    # Where little is moved the launch counts: at most 1.15 times a copy of the same bytes.
    streamed = 0.90 if bytes_moved >= 128 * MEGABYTE else 1 / 1.15
    if family == "norm":
        if device == "cuda":
            return Target(compile=1.3, bandwidth=0.75 if backward else streamed)
        return (
            Target(compile=1.5) if backward else Target(eager=3.5, compile=2.0, bandwidth=1 / 1.5)
        )
    if family == "gated":
        if device == "cuda":
            return Target(compile=1.5, bandwidth=0.75 if backward else 0.90)
        return Target(compile=2.0)
    if family == "heads":
        if device == "cuda":
            return Target(compile=1.5, bandwidth=0.85)
        return Target(compile=2.0)
    if family in JOINT and backward:
        return JOINT[family][device]
    if family == "loss" and backward:
        small = elements < LAUNCH_BOUND_BELOW
        if device == "cuda":
            return Target(eager=3.0, compile=1.3) if small else Target(bandwidth=0.85)
        return Target(eager=3.0, compile=2.0 if small else 1.5)
    if family == "step":
        return Target(bandwidth=0.90) if device == "cuda" else Target(eager=2.0)
    if family == "bellman":
        return Target(eager=20.0)
    if family == "adaptive solver":
        return Target(eager=4.0)  # of torchdiffeq's steps, outside func
    if family == "fixed solver":
        return Target(eager=2.0)
    if family == "sampler":
        # Time outside the model at most half of diffusers', guidance included.
        return Target() if device == "cuda" else Target(eager=2.0)
    if family == "block" and backward:
        if device == "cuda":
            return Target(eager=1.5, compile=1.15)
        return Target(eager=1.06, compile=1.0)
    if family == "FGM step":
        return Target(compile=1.1 if device == "cuda" else 1.3)
    if family == "SCFlow step":
        return Target(compile=1.2)
    if family == "optimiser":
        return Target(eager=1.3, bandwidth=0.90)
    if family == "optimiser without momentum":
        return Target(eager=1.5, bandwidth=0.90)
    return Target()
