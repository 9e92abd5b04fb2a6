"""An initial value problem in normal form: one tensor, ascending time, checked options.

Inside the solvers time τ ascends; ``sign`` maps it to the caller's, t = sign·τ. The right-hand side
keeps the caller's time and slope, and steps are taken over sign·dτ: no tensor is negated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Tensor = torch.Tensor
State = Tensor | tuple[Tensor, ...]

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
ADJOINT_CALLBACKS = tuple(name + "_adjoint" for name in CALLBACKS)


def require(condition: Any, message: str) -> None:
    """``assert`` that also holds under ``python -O``: callers catch AssertionError."""
    if not condition:
        raise AssertionError(message)


def time_dtype(y: Tensor) -> torch.dtype:
    """The dtype of the times that the right-hand side is given."""
    return torch.float64 if y.dtype in (torch.float64, torch.complex128) else torch.float32


@dataclass(frozen=True)
class Packing:
    """A tuple of tensors as one: flat, or [B, n] where samples are to stay apart."""

    shapes: tuple[torch.Size, ...]
    by_sample: bool = False

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        if self.by_sample:
            return torch.cat([part.reshape(part.shape[0], -1) for part in parts], 1)
        return torch.cat([part.reshape(-1) for part in parts])

    def unpack(self, packed: Tensor, lead: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        """The parts of ``packed``, whose leading dimensions beyond one state's are ``lead``."""
        parts, start = [], 0
        for shape in self.shapes:
            end = start + (shape[1:] if self.by_sample else shape).numel()
            parts.append(packed[..., start:end].view((*lead, *shape)))
            start = end
        return tuple(parts)


@dataclass
class Problem:
    """What a solver is given.

    Attributes:
        func: the caller's right-hand side of (t, y), y in the caller's form.
        y0: the state as one tensor.
        t: output times, ascending.
        sign: -1 where the caller's times descend.
        rtol, atol: numbers, or tensors that broadcast against ``y0``.
        method: the solver's name.
        options: of the solver; ``norm`` is taken out.
        norm: of the caller, over states in the caller's form; None for the default.
        event_fn: of (τ, y as one tensor), or None.
        packing: how the caller's tuple became one tensor, or None.
        callbacks: the caller's, by name, over (τ tensor, y, dt).
    """

    func: Callable[[Tensor, Any], Any]
    y0: Tensor
    t: Tensor
    sign: int
    rtol: float | Tensor
    atol: float | Tensor
    method: str
    options: dict[str, Any]
    norm: Callable[[Any], Any] | None = None
    event_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    packing: Packing | None = None
    callbacks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    adjoint_callbacks: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not torch.is_grad_enabled():
            self.y0, self.t = self.y0.detach(), self.t.detach()
        self.time_dtype = time_dtype(self.y0)
        self.shape, self.dtype = self.y0.shape, self.y0.dtype

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt at the caller's time t, as one tensor of y's shape and dtype."""
        if self.packing is None:
            k = self.func(t, y)
        else:
            k = self._packed(self.func(t, self.packing.unpack(y)))
        if not isinstance(k, Tensor):
            raise TypeError(f"func: returned {type(k).__name__}, need a torch.Tensor")
        if k.shape != self.shape or k.dtype != self.dtype:
            return self._conform(k)
        return k

    def _packed(self, parts: Any) -> Tensor:
        assert self.packing is not None
        if not isinstance(parts, Iterable):
            raise TypeError(f"func: returned {type(parts).__name__}, need a tuple of tensors")
        parts = tuple(parts)
        for index, part in enumerate(parts):
            if not isinstance(part, Tensor):
                kind = type(part).__name__
                raise TypeError(f"func: returned {kind} as part {index}, need a torch.Tensor")
        return self.packing.pack(parts)

    def _conform(self, k: Tensor) -> Tensor:
        try:
            k = k.expand(self.shape)
        except RuntimeError:
            raise ValueError(
                f"func: returned shape {tuple(k.shape)}, need y's {tuple(self.shape)}"
            ) from None
        if k.is_complex() and not self.dtype.is_complex:
            raise TypeError(f"func: returned {k.dtype} for y0 of {self.dtype}, need y0 complex")
        return k.to(self.dtype)

    def user_time(self, tau: Tensor) -> Tensor:
        return tau if self.sign > 0 else -tau

    def finish(self, solution: Tensor) -> State:
        """Stacked states in the caller's form."""
        if self.packing is None:
            return solution
        return self.packing.unpack(solution, (solution.shape[0],))

    def norm_of(self, y: Tensor) -> Tensor:
        """The caller's norm, or the default: root mean square, the largest over a tuple's parts."""
        if self.norm is None:
            return default_norm(y if self.packing is None else self.packing.unpack(y))
        return self.norm(y if self.packing is None else self.packing.unpack(y))

    def notify(self, name: str, tau: float | Tensor, y: Tensor, dt: float | Tensor) -> None:
        """Call one of the caller's callbacks."""
        callback = self.callbacks.get(name)
        if callback is not None:
            times = [
                x
                if isinstance(x, Tensor)
                else torch.tensor(x, dtype=torch.float64, device=y.device)
                for x in (tau, dt)
            ]
            callback(times[0], y, times[1])


class Outputs:
    """The states at the output times, in one tensor from the start unless a gradient runs through.

    ``room`` is where the next one may be written.
    """

    def __init__(self, y0: Tensor, count: int) -> None:
        self._states: list[Tensor] = [y0]
        self._rows: tuple[Tensor, ...] | None = None
        if not y0.requires_grad and y0.is_contiguous():
            self._whole = y0.new_empty((count, *y0.shape))
            self._rows = self._whole.unbind(0)
            self._rows[0].copy_(y0)

    @property
    def room(self) -> Tensor | None:
        return None if self._rows is None else self._rows[len(self._states)]

    def append(self, y: Tensor) -> None:
        if self._rows is not None:
            row = self._rows[len(self._states)]
            if y.requires_grad:  # the first one that a gradient runs through
                self._states = [*self._rows[: len(self._states)]]
                self._rows = None
            elif y is not row:
                row.copy_(y)
        self._states.append(y)

    def stacked(self) -> Tensor:
        return torch.stack(self._states) if self._rows is None else self._whole


def rms_norm(y: Tensor) -> Tensor:
    return y.abs().pow(2).mean().sqrt()


def mixed_norm(parts: Sequence[Tensor]) -> Any:
    return max([rms_norm(part) for part in parts]) if len(parts) else 0.0


def default_norm(y: State) -> Any:
    return rms_norm(y) if isinstance(y, Tensor) else mixed_norm(y)


def check_inputs(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable[..., Any] | None,
    solvers: dict[str, Any],
    *,
    traced: bool = False,
) -> Problem:
    """The problem in normal form; where it is ``traced`` time stays the caller's, not looked at.

    Raises:
        AssertionError: the state is no tensor or tuple, the times are not strictly monotonic.
        TypeError: the times or the state are not floating-point.
        ValueError: the method is unknown, or an event is asked for with other than two times.
    """
    options = {} if options is None else dict(options)
    if event_fn is not None:
        if len(t) != 2:
            raise ValueError(
                f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}."
            )
        event_fn = first_event(event_fn, t[0], y0)
    packing = None
    if not isinstance(y0, Tensor):
        require(isinstance(y0, tuple), "y0 must be either a torch.Tensor or a tuple")
        packing = Packing(tuple(part.shape for part in y0), bool(options.get("per_sample")))
        if packing.by_sample:
            _check_samples(packing)
        rtol, atol = (_packed_tolerance(n, v, packing) for n, v in (("rtol", rtol), ("atol", atol)))
        y0 = packing.pack(y0)
    if not (y0.is_floating_point() or y0.is_complex()):
        raise TypeError(f"`y0` must be a floating point Tensor but is a {y0.type()}")
    method = "dopri5" if method is None else method
    if method not in solvers:
        names = '", "'.join(solvers)
        raise ValueError(f'Invalid method "{method}". Must be one of {{"{names}"}}.')
    sign = _check_times(t, traced)
    t = t if sign > 0 else -t
    if sign < 0:
        _reverse_options(options)
    for name, value in (("rtol", rtol), ("atol", atol)):
        require(
            not (isinstance(value, Tensor) and value.requires_grad),
            f"{name} cannot require gradient",
        )
    if t.device != y0.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=4)
        t = t.to(y0.device)
    problem = Problem(
        func=func,
        y0=y0,
        t=t,
        sign=sign,
        rtol=_tolerance("rtol", rtol, y0),
        atol=_tolerance("atol", atol, y0),
        method=method,
        norm=options.pop("norm", None),
        options=options,
        packing=packing,
    )
    if event_fn is not None:
        problem.event_fn = _event_of(event_fn, problem)
    problem.callbacks = _callbacks(func, CALLBACKS, problem)
    problem.adjoint_callbacks = {
        name: getattr(func, name) for name in ADJOINT_CALLBACKS if hasattr(func, name)
    }
    unknown = set(problem.callbacks) - solvers[method].callbacks
    if unknown:
        warnings.warn(f"Solver '{method}' does not support callbacks {unknown}", stacklevel=4)
    return problem


def first_event(event_fn: Callable[..., Tensor], t0: Tensor, y0: Any) -> Callable[..., Tensor]:
    """One event function of several: positive at the start, zero where the first of them is."""
    with torch.no_grad():
        signs = torch.sign(event_fn(t0, y0))
    return lambda t, y: torch.min(event_fn(t, y) * signs)


def _event_of(event_fn: Callable[..., Tensor], problem: Problem) -> Callable[..., Tensor]:
    def event(tau: Tensor, y: Tensor) -> Tensor:
        state = y if problem.packing is None else problem.packing.unpack(y)
        return event_fn(problem.user_time(tau), state)

    return event


def _packed_tolerance(name: str, value: Any, packing: Packing) -> Any:
    """One tolerance for each element, from one for each tensor of the tuple."""
    if isinstance(value, (int, float)):  # torch 2.11 cannot trace the TypeError below
        return value
    try:
        values = tuple(value)
    except TypeError:
        return value
    require(
        len(values) == len(packing.shapes),
        f"If using tupled {name} it must have the same length as the tuple y0",
    )
    shapes = [shape[1:] if packing.by_sample else shape for shape in packing.shapes]
    return torch.cat(
        [torch.as_tensor(v).expand(s.numel()) for v, s in zip(values, shapes, strict=True)]
    )


def _check_samples(packing: Packing) -> None:
    heads = [shape[:1] for shape in packing.shapes]
    if any(len(head) == 0 or head != heads[0] for head in heads):
        shapes = [tuple(shape) for shape in packing.shapes]
        raise ValueError(f"y0: got tensors of shapes {shapes}, need one B in front for per_sample")


def _tolerance(name: str, value: Any, y0: Tensor) -> float | Tensor:
    """A number where it is one, so that it reaches the kernels without a look at the device."""
    if not isinstance(value, (int, float, Tensor)):  # a list or an array, one for each element
        try:
            value = torch.as_tensor(value, dtype=torch.float64, device=y0.device)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(value).__name__
            raise TypeError(
                f"{name}: got {kind}, need a number, or one for each element"
            ) from error
    if isinstance(value, Tensor) and value.dim() > 0:
        compute = torch.promote_types(y0.dtype, torch.float32).to_real()
        return value.to(device=y0.device, dtype=compute)
    return float(value)


def _check_times(t: Any, traced: bool) -> int:
    require(isinstance(t, Tensor), "t must be a torch.Tensor")
    if not t.is_floating_point():
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    require(t.ndim == 1, "t must be one dimensional")
    require(len(t) > 0, "t must hold at least one time")
    if traced:
        return 1
    values = t.tolist()
    sign = -1 if len(values) > 1 and values[0] > values[1] else 1
    ascending = all(sign * b > sign * a for a, b in pairwise(values))
    require(ascending, "t must be strictly increasing or decreasing")
    return sign


def _reverse_options(options: dict[str, Any]) -> None:
    """Times among the options, as the ascending time knows them."""
    constructor = options.get("grid_constructor")
    if constructor is not None:
        options["grid_constructor"] = lambda func, y0, t: -constructor(func, y0, -t)
    for name in ("step_t", "jump_t"):
        if isinstance(options.get(name), Tensor):
            options[name] = -options[name]


def _callbacks(func: Any, names: Sequence[str], problem: Problem) -> dict[str, Callable[..., Any]]:
    def in_form(callback: Callable[..., Any]) -> Callable[..., Any]:
        def call(tau: Tensor, y: Tensor, dt: Tensor) -> Any:
            state = y if problem.packing is None else problem.packing.unpack(y)
            return callback(problem.user_time(tau), state, dt)

        return call

    return {name: in_form(getattr(func, name)) for name in names if hasattr(func, name)}
