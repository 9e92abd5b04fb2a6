"""Fixed-step samplers: from noise at t = 1 to data at t = 0 along a schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowkernels.ode.schedule import Schedule
from flowkernels.ops._validate import as_number
from flowkernels.ops.step import euler_step
from flowkernels.ops.step._euler import guided_euler_step

Velocity = Callable[..., Tensor]
"""`f(x, t, **conditions)` with x [B, ...], t [B] float32, to a velocity of x's shape."""

Pair = tuple[Tensor, Tensor | None]
"""The velocity with conditions and, under guidance, the one without."""


def velocity_pair(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
) -> Pair:
    """The conditional and unconditional velocities, from one call on 2B rows.

    Args:
        velocity: `f(x, t, **conditions)`.
        x: [B, ...].
        t: [B].
        conditions: tensors [B, ...] by keyword.
        uncond: the same keywords saying nothing, or None for a call without guidance.

    Returns:
        (v_cond, v_uncond), v_uncond None where `uncond` is.

    Raises:
        ValueError: `uncond` has other keywords or shapes than `conditions`.
    """
    if uncond is None:
        return velocity(x, t, **conditions), None
    both = velocity(torch.cat([x, x]), torch.cat([t, t]), **_joined(conditions, uncond))
    v_cond, v_uncond = both.chunk(2)
    return v_cond, v_uncond


def _joined(conditions: Mapping[str, Tensor], uncond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if conditions.keys() != uncond.keys():
        raise ValueError(
            f"uncond has the keywords {sorted(uncond)}; it needs those of conditions, "
            f"{sorted(conditions)}"
        )
    for name, value in conditions.items():
        if value.shape != uncond[name].shape:
            raise ValueError(
                f"uncond[{name!r}] has shape {tuple(uncond[name].shape)}; conditions has "
                f"{tuple(value.shape)}"
            )
    return {name: torch.cat([value, uncond[name]]) for name, value in conditions.items()}


def guided(pair: Pair, guidance: float) -> Tensor:
    """`v_uncond + guidance·(v_cond - v_uncond)`, or v_cond where there is no other."""
    v_cond, v_uncond = pair
    return v_cond if v_uncond is None else torch.lerp(v_uncond, v_cond, guidance)


class _Field:
    """The (guided) velocity of one sampling run, at one time for all rows.

    Conditions are joined once, not at every call as in `velocity_pair`. `kept` says that someone
    beside the loop holds its states.
    """

    def __init__(
        self,
        velocity: Velocity,
        noise: Tensor,
        conditions: dict[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        guidance: float,
        times: list[float],
        kept: bool,
    ) -> None:
        self.velocity = velocity
        self.guidance = guidance
        self.conditions = conditions if uncond is None else _joined(conditions, uncond)
        batch = noise.shape[0]
        self.halves = None if uncond is None else (batch, batch)
        rows = batch if uncond is None else 2 * batch
        self.start = torch.ones(rows, device=noise.device, dtype=torch.float32)
        self.kept = kept
        self.last = times[-2]
        self.ready: dict[float, Tensor] = {}
        if noise.device.type == "cpu":
            # All of the schedule's in one go, in half the host time. Elsewhere that would be a
            # copy from the host, which a stream that is being captured refuses.
            made = torch.tensor(times, dtype=torch.float32, device="cpu")[:, None].expand(-1, rows)
            self.ready.update(zip(times, made.contiguous().unbind(), strict=True))

    def at(self, rows: Tensor, t: float) -> Tensor:
        """The velocity of all rows; under guidance those with conditions, then those without."""
        # Handed out once: a velocity may overwrite it.
        time = self.ready.pop(t, None)
        if time is None:
            time = torch.full_like(self.start, t)
        v = self.velocity(rows, time, **self.conditions)
        if not isinstance(v, Tensor):
            raise TypeError(f"velocity gave {type(v).__name__}; it must give a tensor of x's shape")
        if v.shape != rows.shape:
            raise ValueError(
                f"velocity gave shape {tuple(v.shape)}; it must give x's, {tuple(rows.shape)}"
            )
        return v

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.halves is None:
            return self.at(x, t)
        v_cond, v_uncond = self.at(torch.cat((x, x)), t).split_with_sizes(self.halves)
        return guided((v_cond, v_uncond), self.guidance)


class _Euler:
    """x + h·f(x, t), guidance and the next call's batch inside the step's one pass over memory."""

    def __init__(self) -> None:
        self.twice: Tensor | None = None

    def step(self, field: _Field, x: Tensor, t: float, h: float) -> Tensor:
        if field.halves is None:
            return euler_step(x, field.at(x, t), h)
        # The velocity is given a copy: a state that the loop made none but the loop holds.
        out = None if self.twice is None or field.kept else x
        twice, self.twice = torch.cat((x, x)) if self.twice is None else self.twice, None
        v = field.at(twice, t)
        del twice  # its memory may serve the next
        if t == field.last:
            v_cond, v_uncond = v.split_with_sizes(field.halves)
            return euler_step(x, v_cond, h, v_uncond=v_uncond, guidance=field.guidance)
        x, self.twice = guided_euler_step(x, v, h, field.guidance, out)
        return x


class _Heun:
    """x + h/2·(f(x, t) + f(x + h f, t + h))."""

    def step(self, field: _Field, x: Tensor, t: float, h: float) -> Tensor:
        first = field(x, t)
        second = field(euler_step(x, first, h), t + h)
        return euler_step(x, first + second, h / 2)


class _Midpoint:
    """x + h·f(x + h/2 f, t + h/2)."""

    def step(self, field: _Field, x: Tensor, t: float, h: float) -> Tensor:
        middle = euler_step(x, field(x, t), h / 2)
        return euler_step(x, field(middle, t + h / 2), h)


class _RK4:
    """The classic fourth-order rule, x + h/6·(k₁ + 2k₂ + 2k₃ + k₄)."""

    def step(self, field: _Field, x: Tensor, t: float, h: float) -> Tensor:
        k1 = field(x, t)
        k2 = field(euler_step(x, k1, h / 2), t + h / 2)
        k3 = field(euler_step(x, k2, h / 2), t + h / 2)
        k4 = field(euler_step(x, k3, h), t + h)
        return euler_step(x, (k1 + k4).add_(k2 + k3, alpha=2), h / 6)


class _AB2:
    """Adams–Bashforth of two steps: one call per step, second order on any schedule.

    With r = h/h_prev, x + h·((1 + r/2) f - r/2 f_prev). The first step is Euler's; its error is
    of the size of the whole method's.
    """

    def __init__(self) -> None:
        self.previous: tuple[Tensor, float] | None = None

    def step(self, field: _Field, x: Tensor, t: float, h: float) -> Tensor:
        now = field(x, t)
        combined = now
        if self.previous is not None:
            before, h_before = self.previous
            combined = torch.lerp(now, before, -0.5 * h / h_before)
        self.previous = now, h
        return euler_step(x, combined, h)


_METHODS: dict[str, Callable[[], Any]] = {
    "euler": _Euler,
    "heun": _Heun,
    "midpoint": _Midpoint,
    "rk4": _RK4,
    "ab2": _AB2,
}

METHODS = tuple(_METHODS)
"""Names of the samplers' methods."""


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    schedule: Schedule,
    *,
    method: str = "euler",
    guidance: float | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    cuda_graph: bool = False,
    callback: Callable[[int, float, Tensor], None] | None = None,
    progress: bool = False,
    return_trajectory: bool = False,
) -> Tensor:
    """Integrates `dx/dt = v(x, t)` from noise at t = 1 to data at t = 0.

    Under guidance s the velocity is `v_uncond + s·(v_cond - v_uncond)`, both from one call on a
    batch of 2B; with Euler's method that combination is part of the step. No gradient is
    recorded.

    Args:
        velocity: `f(x, t, **conditions)`, x [B, ...], t [B] float32.
        noise: [B, ...], the state at t = 1.
        schedule: the times; see `uniform`, `shifted`, `Schedule`.
        method: "euler" or "ab2" (one call per step), "heun" or "midpoint" (two), "rk4" (four).
        guidance: scale s; None or 1 calls the velocity on B rows only.
        conditions: keyword tensors for the velocity, each [B, ...].
        uncond: the same keywords for the unconditional half; where left out, the result of
            `velocity.null_conditions(conditions)` if the velocity has that method.
        cuda_graph: capture the velocity call once and replay it at every step. It must do the
            same work on the same shapes each time and never wait for the host. On a CPU it
            warns and runs as usual.
        callback: called as `callback(step, t, x)` after each step: its index from 0, the time
            reached, the state there. It must not change the state.
        progress: show a progress bar.
        return_trajectory: return every state, not the last alone.

    Returns:
        [B, ...] at t = 0; with `return_trajectory` [n+1, B, ...], the states at
        `schedule.times`.

    Raises:
        TypeError: noise, a condition or a velocity is no tensor, schedule no Schedule, guidance
            no number.
        ValueError: an unknown method, guidance without conditions or without unconditional
            inputs, conditions of another batch size, a velocity of another shape than x.

    Example:
        >>> from flowkernels.ode import uniform
        >>> sample(lambda x, t: x, torch.ones(1, 1), uniform(2))  # (1 - 1/2)²
        tensor([[0.2500]])
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(_METHODS)}")
    if not isinstance(noise, Tensor) or noise.dim() == 0:
        raise TypeError(f"noise is {noise!r}; it must be a tensor [B, ...]")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is {schedule!r}; it must be a Schedule, such as uniform(4)")
    conditions = _checked_conditions(conditions, noise.shape[0])
    if guidance is not None:
        guidance = as_number(guidance, "guidance")
    if guidance is None or guidance == 1:
        guidance, uncond = 1.0, None
    elif not conditions:
        raise ValueError(f"guidance is {guidance}; it needs conditions to guide by")
    elif uncond is None:
        uncond = null_conditions(velocity, conditions)

    times = schedule.times.tolist()
    kept = return_trajectory or callback is not None
    field = _Field(velocity, noise, conditions, uncond, guidance, times, kept)
    if cuda_graph:
        field.velocity = _graphed(field, noise)
    stepper = _METHODS[method]()
    x, states = noise, [noise]
    for step in _progress(range(len(times) - 1), progress):
        x = stepper.step(field, x, times[step], times[step + 1] - times[step])
        if return_trajectory:
            states.append(x)
        if callback is not None:
            callback(step, times[step + 1], x)
    return torch.stack(states) if return_trajectory else x


def _checked_conditions(conditions: Mapping[str, Tensor] | None, batch: int) -> dict[str, Tensor]:
    conditions = dict(conditions or {})
    for name, value in conditions.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"conditions[{name!r}] is {value!r}; it must be a tensor [B, ...]")
        if value.dim() == 0 or value.shape[0] != batch:
            raise ValueError(
                f"conditions[{name!r}] has shape {tuple(value.shape)}; its first size must be "
                f"the batch's, {batch}"
            )
    return conditions


def null_conditions(velocity: Velocity, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `velocity.null_conditions` makes of the conditions, for guidance.

    Raises:
        ValueError: the velocity has no such method, so the caller must say what it means.
    """
    make = getattr(velocity, "null_conditions", None)
    if make is None:
        raise ValueError(
            "guidance needs uncond: this velocity has no null_conditions method to make it"
        )
    return dict(make(conditions))


def _progress(steps: range, show: bool) -> Iterable[int]:
    if not show:
        return steps
    from rich.progress import track

    return track(steps, description="sampling")


def _graphed(field: _Field, noise: Tensor) -> Velocity:
    if noise.device.type != "cuda":
        warnings.warn(
            f"cuda_graph ignored: noise is on {noise.device.type}, and CUDA graphs need a CUDA "
            "device; sampling runs without one",
            stacklevel=4,
        )
        return field.velocity
    return _GraphedVelocity(field, noise)


class _GraphedVelocity:
    """A captured velocity call: inputs are copied in, the graph replayed, the output copied out.

    It is copied because Heun, RK4 and AB2 hold one velocity while the next is computed into the
    same memory; beside a network's forward the copy is nothing. The conditions are the run's.
    """

    def __init__(self, field: _Field, noise: Tensor) -> None:
        self.x = noise.clone() if field.halves is None else torch.cat((noise, noise))
        self.t = field.start.clone()
        # Lazily made state (cuBLAS handles, Triton kernels) must exist before the capture.
        with torch.cuda.device(noise.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                field.velocity(self.x, self.t, **field.conditions)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.v = field.velocity(self.x, self.t, **field.conditions)

    def __call__(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.v.clone()
