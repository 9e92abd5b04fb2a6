"""``odeint_adjoint``: gradients by solving the adjoint equation backwards in time.

With a(t) = ∂L/∂y(t): ``da/dt = -a·∂f/∂y``, ``∂L/∂θ = ∫ a·∂f/∂θ dt`` and likewise for t; all of them
are solved with y itself from each output time to the one before, in memory that does not grow with
the number of steps (Chen et al., arXiv 1806.07366).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from flowkernels.ode.integrate import event_time, odeint, run, run_event
from flowkernels.ode.solvers.problem import (
    ADJOINT_CALLBACKS,
    CALLBACKS,
    Problem,
    State,
    check_inputs,
    mixed_norm,
)
from flowkernels.ode.solvers.registry import SOLVERS

Tensor = torch.Tensor


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """``odeint`` whose gradients come from the adjoint equation: memory for the output times only.

    Args:
        func: as in ``odeint``; an ``nn.Module`` unless ``adjoint_params`` is given. Its attributes
            ``callback_step_adjoint`` and so on are called in the backward solve.
        y0: as in ``odeint``.
        t: as in ``odeint``.
        rtol: as in ``odeint``.
        atol: as in ``odeint``.
        method: as in ``odeint``.
        options: as in ``odeint``.
        event_fn: as in ``odeint``; gradients do not run through the time of the event (see
            ``odeint_event``).
        adjoint_rtol: of the backward solve; ``rtol`` by default.
        adjoint_atol: likewise.
        adjoint_method: likewise.
        adjoint_options: likewise, less ``norm`` and ``per_sample``. Its ``norm`` is over the tuple
            (adjoint of t, y, adjoint of y, adjoints of the parameters…), or "seminorm": without
            the parameters.
        adjoint_params: what gets a gradient beside y0 and t; by default func's parameters.

    Returns:
        As ``odeint``.

    Raises:
        ValueError: func is no module and ``adjoint_params`` is missing, or options for another
            ``adjoint_method`` cannot be inferred.

    Example:
        >>> import torch
        >>> from flowkernels.ode import odeint_adjoint
        >>> y0 = torch.ones(1, requires_grad=True)
        >>> t = torch.tensor([0.0, 1.0])
        >>> odeint_adjoint(lambda t, y: -y, y0, t, adjoint_params=())[-1].sum().backward()
        >>> round(y0.grad.item(), 5)
        0.36788
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            "func must be an instance of nn.Module to specify the adjoint parameters; "
            "alternatively they can be specified explicitly via the `adjoint_params` argument. If "
            "there are no parameters then it is allowable to set `adjoint_params=()`."
        )
    adjoint_method = method if adjoint_method is None else adjoint_method
    if adjoint_method != method and options is not None and adjoint_options is None:
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. "
            "So as `options` has been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        left_out = ("norm", "per_sample")
        adjoint_options = {k: v for k, v in (options or {}).items() if k not in left_out}
    params = _wanted(func, adjoint_params, adjoint_options)
    problem = check_inputs(func, y0, t, rtol, atol, method, options, event_fn, SOLVERS)
    settings: dict[str, Any] = {
        "rtol": rtol if adjoint_rtol is None else adjoint_rtol,
        "atol": atol if adjoint_atol is None else adjoint_atol,
        "method": adjoint_method,
    }
    for name in ("rtol", "atol"):
        if isinstance(settings[name], (tuple, list)):
            # Tolerances of the state's tensors say nothing of the adjoint's: the strictest holds.
            settings[name] = min(float(each) for each in settings[name])
    adjoint_options = {**adjoint_options, "norm": _adjoint_norm(problem, adjoint_options)}
    ans = OdeintAdjoint.apply(problem, settings, adjoint_options, problem.y0, problem.t, *params)
    if event_fn is None:
        return problem.finish(ans)
    found, solution = ans
    return event_time(problem, found, t), problem.finish(solution)


def _wanted(
    func: Any, adjoint_params: Iterable[Tensor] | None, adjoint_options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The parameters that ask for a gradient."""
    given = tuple(_parameters(func) if adjoint_params is None else adjoint_params)
    wanted = tuple(each for each in given if each.requires_grad)
    if len(wanted) < len(given) and callable(adjoint_options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will "
            "be excluded from the adjoint pass, and will not appear as a tensor in the adjoint "
            "norm.",
            stacklevel=3,
        )
    return wanted


def _parameters(module: nn.Module) -> list[Tensor]:
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    # A replica of DataParallel holds its parameters as plain attributes.
    return [
        value
        for each in module.modules()
        for value in each.__dict__.values()
        if isinstance(value, Tensor) and value.requires_grad
    ]


def _adjoint_norm(problem: Problem, adjoint_options: dict[str, Any]) -> Callable[[Any], Tensor]:
    """The norm of the backward solve, over (adjoint of t, y, adjoint of y, of parameters…)."""
    given = adjoint_options.get("norm")
    packing = problem.packing

    def largest(parts: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *params = parts
        norms = [t.abs(), problem.norm_of(y), problem.norm_of(adj_y)]
        if given is None and params:
            norms.append(mixed_norm(params))
        return torch.stack([torch.as_tensor(each).to(norms[0]) for each in norms]).max()

    def in_form(parts: tuple[Tensor, ...]) -> Tensor:
        t, y, adj_y, *params = parts
        assert packing is not None
        assert given is not None
        return given((t, *packing.unpack(y), *packing.unpack(adj_y), *params))

    if given is None or given == "seminorm":
        return largest
    return given if packing is None else in_form


class OdeintAdjoint(torch.autograd.Function):
    """The solve without a graph; its backward solves the adjoint equation."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        settings: dict[str, Any],
        adjoint_options: dict[str, Any],
        y0: Tensor,
        t: Tensor,
        *params: Tensor,
    ) -> Any:
        ctx.problem, ctx.settings, ctx.adjoint_options = problem, settings, adjoint_options
        ctx.t_requires_grad = t.requires_grad
        problem.y0, problem.t = y0.detach(), t.detach()
        with torch.no_grad():
            if problem.event_fn is None:
                y = run(problem)
                ctx.save_for_backward(problem.t, y, problem.t, *params)
                return y
            found, y = run_event(problem)
        found = found.to(problem.t)
        ctx.save_for_backward(problem.t, y, found, *params)
        return found, y

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        problem: Problem = ctx.problem
        tau, y, found, *params = ctx.saved_tensors
        event = problem.event_fn is not None
        grad_y = grads[-1]
        times = torch.stack([tau[0], found]) if event else tau
        with torch.no_grad():
            t = problem.user_time(times)
            field = _Augmented(problem, tuple(params), ctx.t_requires_grad)
            adjoint = [t.new_zeros((), dtype=y.dtype), y[-1], grad_y[-1]]
            adjoint += [torch.zeros_like(each) for each in params]
            grad_t = torch.zeros_like(times) if ctx.t_requires_grad else None
            for i in range(len(t) - 1, 0, -1):
                if grad_t is not None:
                    # Later by dt, the state at this output time is further by f·dt.
                    by_time = field.along(t[i], y[i], grad_y[i])
                    grad_t[i] = by_time
                    adjoint[0] = adjoint[0] - by_time
                state = odeint(
                    field, tuple(adjoint), t[i - 1 : i + 1].flip(0),
                    options=dict(ctx.adjoint_options), **ctx.settings,
                )  # fmt: skip
                adjoint = [part[1] for part in state]
                adjoint[1] = y[i - 1]  # our own estimate of the state, not the backward solve's
                adjoint[2] = adjoint[2] + grad_y[i - 1]
            if grad_t is not None:
                grad_t[0] = adjoint[0].real if adjoint[0].is_complex() else adjoint[0]
                # An event's time is found, not given: the first time alone has a gradient.
                grad_t = torch.cat([grad_t[:1], torch.zeros_like(tau[1:])]) if event else grad_t
                grad_t = (problem.sign * grad_t).to(tau.dtype)
            by_params = [
                _real_like(part, each) for part, each in zip(adjoint[3:], params, strict=True)
            ]
        return (None, None, None, _real_like(adjoint[2], y), grad_t, *by_params)


def _real_like(part: Tensor, like: Tensor) -> Tensor:
    if part.is_complex() and not like.is_complex():
        part = part.real
    return part.to(like.dtype)


class _Augmented:
    """Right-hand side of the backward solve, over (adjoint of t, y, adjoint of y, parameters…)."""

    def __init__(self, problem: Problem, params: tuple[Tensor, ...], t_requires_grad: bool) -> None:
        self.problem, self.params, self.t_requires_grad = problem, params, t_requires_grad
        for name, adjoint_name in zip(CALLBACKS, ADJOINT_CALLBACKS, strict=True):
            if adjoint_name in problem.adjoint_callbacks:
                setattr(self, name, problem.adjoint_callbacks[adjoint_name])

    def _slope(self, t: Tensor, y: Tensor) -> Tensor:
        if self.problem.options.get("per_sample"):
            t = t.expand(y.shape[0])
        return self.problem.slope(t.to(self.problem.time_dtype), y)

    def along(self, t: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """``Re Σ conj(grad)·f``."""
        product = self._slope(t, y) * grad.conj()
        total = product.sum()
        return total.real if total.is_complex() else total

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        like = self.problem.y0
        y, adj_y = _real_like(state[1], like), _real_like(state[2], like)
        with torch.enable_grad():
            t = t.detach().requires_grad_(self.t_requires_grad)
            y = y.detach().requires_grad_()
            k = self._slope(t, y)
            inputs = ((t,) if self.t_requires_grad else ()) + (y, *self.params)
            found: Any = (None,) * len(inputs)
            if k.requires_grad:
                # The graph is kept: func may share a part of it between its calls.
                found = torch.autograd.grad(k, inputs, -adj_y, allow_unused=True, retain_graph=True)
        slopes = [
            torch.zeros_like(each) if grad is None else grad
            for each, grad in zip(inputs, found, strict=True)
        ]
        by_t = slopes.pop(0) if self.t_requires_grad else torch.zeros_like(t)
        return (by_t, k.detach(), *slopes)
