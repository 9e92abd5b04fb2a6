"""What a patched module carries: the choice of operators, and the calls that it gave back."""

from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# The operators that a caller may choose between.
OPS = (
    "modulated_norm",
    "gated_residual",
    "gated_residual_norm",
    "qk_norm_rope",
    "joint_attention",
    "gelu_tanh",
)

ATTRIBUTE = "_flowkernels_patch"


class State:
    """Lives on the module as ``_flowkernels_patch``, outside its parameters, buffers and children.

    A deepcopy of the module gets a state of its own. A pickled module comes back unpatched: its
    state is None and ``forward`` the class's (see :func:`bind`).

    Attributes:
        name: The module's name in the model that was patched.
        ops: The operators in use.
        exact: Whether every rounding of eager diffusers must be kept.
        active: False after a revert that found the forward wrapped by someone else's hook.
        fallbacks: Reason → number of calls that took the original forward.
    """

    def __init__(self, name: str, ops: frozenset[str], exact: bool) -> None:
        self.name = name
        self.ops = ops
        self.exact = exact
        self.active = True
        self.fallbacks: dict[str, int] = {}
        self.key = next(_keys)
        _states[self.key] = self
        # Rounded once where eager rounds after every operation: never in exact mode.
        self.modulated_norm = "modulated_norm" in ops and not exact
        self.gated_residual = "gated_residual" in ops and not exact
        self.gated_residual_norm = "gated_residual_norm" in ops and not exact
        self.qk_norm_rope = "qk_norm_rope" in ops and not exact
        self.joint_attention = "joint_attention" in ops
        self.gelu_tanh = "gelu_tanh" in ops

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        copied = State(self.name, self.ops, self.exact)
        copied.active = self.active
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        return (type(None), ())

    def note(self, why: str) -> None:
        """Counts a call that takes the original forward; a traced one once, while tracing."""
        if torch.compiler.is_compiling():
            _note_while_tracing(self.key, why)
        else:
            self.fallbacks[why] = self.fallbacks.get(why, 0) + 1


_keys = itertools.count()
_states: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result
def _note_while_tracing(key: int, why: str) -> int:
    """The count as a side effect of tracing, not of the graph: only constants may pass here."""
    state = _states.get(key)
    if state is not None:
        state.fallbacks[why] = state.fallbacks.get(why, 0) + 1
    return 0


def bind(module: nn.Module, forward: Callable[..., Any], state: State) -> None:
    """Give one instance a forward of its own.

    A bound method, because ``copy.deepcopy`` binds its copy to the copied module. The function is
    called "forward", because pickle stores a bound method as (module, name): what is loaded is the
    class's forward.
    """
    forward.__name__ = "forward"
    object.__setattr__(module, ATTRIBUTE, state)
    if own_forward(module) is None:  # else it is ours already, or ours inside someone's wrapper
        object.__setattr__(module, "forward", types.MethodType(forward, module))


def unbind(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Take the forward away again; False where a hook has wrapped it, so that it must stay."""
    own = module.__dict__.get("forward")
    state: State | None = module.__dict__.get(ATTRIBUTE)
    if isinstance(own, types.MethodType) and own.__func__ is forward:
        object.__delattr__(module, "forward")
    elif own is not None and state is not None:
        state.active = False
        return False
    module.__dict__.pop(ATTRIBUTE, None)  # none where another handle has been here before
    return True


def own_forward(module: nn.Module) -> Any:
    """A forward set on the instance that is not its class's, or None."""
    own = module.__dict__.get("forward")
    if (
        isinstance(own, types.MethodType)
        and own.__self__ is module
        and own.__func__ is type(module).forward
    ):
        return None
    return own


@dataclass(frozen=True)
class Chain:
    """How modules of one class are served.

    Attributes:
        forward: Stands in for the class's forward.
        structure: Why a module as it now stands cannot be served, or None. Also asked at every
            call: hooks, processors and layers may change.
        ops: The operators that a module's chain is made of.
        sources: The functions of diffusers that the forward stands in for.
        exact_layout: Whether the joint layout is diffusers' own, so that exact mode may write it.
    """

    forward: Callable[..., Any]
    structure: Callable[[Any], str | None]
    ops: Callable[[Any], tuple[str, ...]]
    sources: tuple[Any, ...] = ()
    exact_layout: bool = False
