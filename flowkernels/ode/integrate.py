"""``odeint`` and what is built on it, with torchdiffeq's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flowkernels.ode.solvers.problem import Problem, State, check_inputs, first_event
from flowkernels.ode.solvers.registry import SOLVERS, solve, solve_event
from flowkernels.ode.solvers.traced import is_traceable, trace

Tensor = torch.Tensor

ODE_METHODS = tuple(SOLVERS)
"""Names of the methods that ``odeint`` knows."""


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """Solves ``dy/dt = func(t, y)``, ``y(t[0]) = y0``, and returns y at the times t.

    Drop-in for ``torchdiffeq.odeint``: see docs/ode.md for the methods, for every option and for
    what differs. Gradients reach y0, t and whatever func depends on.

    Args:
        func: ``f(t, y)``, t 0-d float32 (float64 where y is float64 or complex128; [B] under
            ``per_sample``), to dy/dt in y's form. Its attributes ``callback_step``,
            ``callback_accept_step`` and ``callback_reject_step`` are called with (t, y, dt).
        y0: a tensor of any shape, floating-point or complex, or a tuple of them.
        t: [T], ascending or descending; the first is y0's.
        rtol: relative tolerance: a number, or a sequence of one for each tensor of a tuple.
        atol: absolute tolerance, likewise.
        method: "dopri5" (default), "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun";
            on a fixed grid "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams",
            "implicit_adams" (= "fixed_adams"); "scipy_solver".
        options: adaptive: ``first_step``, ``min_step``, ``max_step``, ``safety``, ``ifactor``,
            ``dfactor``, ``max_num_steps``, ``step_t``, ``jump_t``, ``norm``, ``dtype``,
            ``per_sample`` (each row of the batch its own step), ``sync_every`` (steps between the
            host's looks). Fixed grid: ``step_size``, ``grid_constructor``, ``interp``,
            ``perturb``; Adams ``max_order``, ``max_iters``; SciPy ``solver``.
        event_fn: of (t, y), whose zero ends the solve; then t is [2] and only t[0] counts, t[1]
            says in which direction.

    Returns:
        [T, *y0.shape], or a tuple of them; with ``event_fn`` (t of the event, [2, *y0.shape]: y0
        and the state there).

    Raises:
        ValueError: the method is unknown, options exclude each other, or func's result has a
            shape that does not broadcast to y's.
        TypeError: t or y0 is not floating-point, or func returned no tensor.
        AssertionError: t is empty or not strictly monotonic, a step underflows, the state is not
            finite, or ``max_num_steps`` is reached; the messages are torchdiffeq's.

    Example:
        >>> import torch
        >>> from flowkernels.ode import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> round(y[-1].item(), 6)
        0.367879
    """
    if not torch.compiler.is_compiling():
        return _odeint(func, y0, t, rtol, atol, method, options, event_fn)
    if not is_traceable(func, t, method, options, event_fn):
        return _apart(func, y0, t, rtol, atol, method, options, event_fn)
    problem = check_inputs(func, y0, t, rtol, atol, method, options, None, SOLVERS, traced=True)
    return problem.finish(trace(problem))


def _odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable[[Tensor, Any], Tensor] | None,
) -> Any:
    problem = check_inputs(func, y0, t, rtol, atol, method, options, event_fn, SOLVERS)
    if event_fn is None:
        return problem.finish(run(problem))
    found, solution = run_event(problem)
    return event_time(problem, found, t), problem.finish(solution)


_apart = torch.compiler.disable(_odeint)


@torch.compiler.disable
def run(problem: Problem) -> Tensor:
    """One solve. To torch.compile it is one call: what a solver does depends on its numbers."""
    return solve(problem)


@torch.compiler.disable
def run_event(problem: Problem) -> tuple[Tensor, Tensor]:
    return solve_event(problem)


def event_time(problem: Problem, tau: Tensor, t: Tensor) -> Tensor:
    """The caller's time of an event, in the dtype of the caller's times."""
    return problem.user_time(tau.to(problem.t))


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, State]:
    """Solves until ``event_fn(t, y) = 0``; gradients run through the time of the event.

    The event's time t* depends on the state: with c = event_fn and dc/dt = ∂c/∂t + ∂c/∂y·f,
    ``dt* = -(∂c/∂y)/(dc/dt) dy``, and ``dy(t*)/dt* = f``. (arXiv 2011.03902.)

    Args:
        func: as in ``odeint``.
        y0: as in ``odeint``.
        t0: the time of y0, a tensor.
        event_fn: of (t, y); of several values, the first to change sign ends the solve.
        reverse_time: integrate to earlier times.
        odeint_interface: ``odeint`` or ``odeint_adjoint``.
        **kwargs: its other arguments.

    Returns:
        (t of the event, [2, *y0.shape]: y0 and the state there), a tuple of states where y0 is.

    Example:
        >>> import torch
        >>> from flowkernels.ode import odeint_event
        >>> t, y = odeint_event(lambda t, y: torch.ones_like(y), torch.zeros(1), torch.tensor(0.0),
        ...                     event_fn=lambda t, y: y.sum() - 2.0)
        >>> round(t.item(), 4)
        2.0
    """
    ahead = -1.0 if reverse_time else 1.0
    t = torch.cat([t0.reshape(-1), t0.reshape(-1).detach() + ahead])
    found, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    problem = check_inputs(func, y0, t.detach(), 0.0, 0.0, None, None, None, SOLVERS)
    event = first_event(event_fn, t.detach()[0], y0)
    packing = problem.packing
    state = solution[-1] if packing is None else packing.pack([part[-1] for part in solution])

    def value(time: Tensor, packed: Tensor) -> Tensor:
        return event(time, packed if packing is None else packing.unpack(packed))

    found, state = EventGradient.apply(problem.slope, value, found, state)
    if packing is None:
        return found, torch.cat([solution[:-1], state[None]])
    ends = packing.unpack(state)
    return found, tuple(
        torch.cat([part[:-1], end[None]]) for part, end in zip(solution, ends, strict=True)
    )


class EventGradient(torch.autograd.Function):
    """The identity, with the gradient of an event's time handed to the state it depends on."""

    @staticmethod
    def forward(ctx: Any, slope: Any, event: Any, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.slope, ctx.event = slope, event
        ctx.save_for_backward(t, y)
        return t.detach(), y.detach()

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor, grad_y: Tensor) -> Any:
        t, y = (x.detach().clone().requires_grad_() for x in ctx.saved_tensors)
        k = ctx.slope(t, y).detach()
        with torch.enable_grad():
            value = ctx.event(t, y)
            by_t, by_y = torch.autograd.grad(value, (t, y), allow_unused=True)
        by_t = torch.zeros_like(t) if by_t is None else by_t
        by_y = torch.zeros_like(y) if by_y is None else by_y
        rate = by_t + (by_y * k).sum()
        # Later by dt*, the state is further by f·dt*.
        along = grad_t + (grad_y * k).sum()
        return None, None, None, grad_y + by_y * (-along / (rate + 1e-12)).to(by_y.dtype)
