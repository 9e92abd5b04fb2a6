"""flowkernels' solvers in torchdiffeq's place.

    import flowkernels.integrations.torchdiffeq as ours
    ours.install()          # torchdiffeq.odeint is flowkernels.ode.odeint, and so on
    ours.uninstall()        # or: with ours.install(): ...

Names that other modules took from torchdiffeq before (``from torchdiffeq import odeint``) are
replaced as well.
"""

from __future__ import annotations

import sys
from typing import Any

from flowkernels import ode

NAMES = ("odeint", "odeint_adjoint", "odeint_event", "odeint_dense")
"""What is replaced."""

_replaced: list[tuple[dict[str, Any], str, Any]] = []


class Installed:
    """What ``install`` returns: a context manager that uninstalls at its end.

    Not where torchdiffeq's place was taken before: then that is how it stays.
    """

    def __init__(self, first: bool) -> None:
        self._first = first

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._first:
            uninstall()


def install() -> Installed:
    """Puts flowkernels' ``odeint`` family in place of torchdiffeq's, in every loaded module.

    A second call does nothing more than the first, but for modules imported between them.

    Returns:
        A context manager; leaving it calls :func:`uninstall`, unless they were in place before.

    Raises:
        ImportError: torchdiffeq is not installed.

    Example:
        >>> import torchdiffeq
        >>> import flowkernels.integrations.torchdiffeq as ours
        >>> with ours.install():
        ...     torchdiffeq.odeint.__module__
        'flowkernels.ode.integrate'
        >>> torchdiffeq.odeint.__module__
        'torchdiffeq._impl.odeint'
    """
    import torchdiffeq

    first = not _replaced
    theirs = {name: _original(torchdiffeq, name) for name in NAMES if hasattr(torchdiffeq, name)}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict) or _is_ours(names):
            continue
        for name in [
            key for key, value in names.items() if any(value is t for t in theirs.values())
        ]:
            original = names[name]
            which = next(key for key, value in theirs.items() if value is original)
            _replaced.append((names, name, original))
            names[name] = getattr(ode, which)
    return Installed(first)


def uninstall() -> None:
    """Puts torchdiffeq's own functions back wherever :func:`install` replaced them."""
    while _replaced:
        names, name, original = _replaced.pop()
        if getattr(names.get(name), "__module__", "").startswith("flowkernels."):
            names[name] = original


def _original(module: Any, name: str) -> Any:
    """torchdiffeq's own function, also where ours stands in its place."""
    for names, key, original in _replaced:
        if names is vars(module) and key == name:
            return original
    return getattr(module, name)


def _is_ours(names: dict[str, Any]) -> bool:
    """torchdiffeq's inside must keep calling itself, and we must keep what we replaced."""
    return str(names.get("__name__", "")).startswith(("torchdiffeq._impl.", "flowkernels."))
