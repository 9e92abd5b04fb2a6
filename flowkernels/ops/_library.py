"""Registration, backends and dispatch: the one place that knows which code serves an operator.

An *operator* is one boundary of ``torch.library``: a schema, a fake (shapes and dtypes for tracing)
and an implementation for each device. The dispatcher's CPU key is served by the native C++ library,
its CUDA key by a Triton launcher, or by CUDA C++ where the operator names no launcher.

A *function* is what users call (``modulated_norm``). It validates, asks :func:`choose` for a
backend and runs either its reference formula or an ``autograd.Function`` over its operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flowkernels.ops import _native

Tensor = torch.Tensor

BACKENDS = ("reference", "native", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")

_LIBRARY = torch.library.Library("flowkernels", "DEF")
_forced: str | None = None


class Operator:
    """One ``torch.ops.flowkernels`` operator, callable as ``operator(backend, *args)``."""

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        *,
        triton: str | None,
        native_cuda: bool,
    ) -> None:
        self.name = name
        self._triton = triton
        self._launcher: Callable[..., Any] | None = None
        _LIBRARY.define(name + schema)
        torch.library.register_fake(f"flowkernels::{name}", fake, lib=_LIBRARY)
        if triton is not None and not native_cuda:
            _LIBRARY.impl(name, self.launch, "CUDA")
        self.default = getattr(torch.ops.flowkernels, name).default

    def launch(self, *args: Any) -> Any:
        """The Triton launcher, imported at its first use: no Triton, no GPU, no problem."""
        if self._launcher is None:
            assert self._triton is not None
            module, function = self._triton.split(":")
            self._launcher = getattr(importlib.import_module(module), function)
        return self._launcher(*args)

    def __call__(self, backend: str, *args: Any) -> Any:
        # On CPU tensors the dispatcher's key is native; the interpreter is called directly.
        if INTERPRETED and backend == "triton":
            return self.launch(*args)
        return self.default(*args)


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    triton: str | None = None,
    native_cuda: bool = False,
) -> Operator:
    """Define ``flowkernels::name``; ``triton`` is the launcher as ``"module:function"``.

    ``native_cuda`` says that the CUDA library implements the operator and serves the CUDA key.
    """
    return Operator(name, schema, fake, triton=triton, native_cuda=native_cuda)


def implement_on_cpu(name: str, function: Callable[..., Any]) -> None:
    """Serve the CPU key of ``flowkernels::name`` from Python, where it is calls of torch's own."""
    _LIBRARY.impl(name, function, "CPU")


@dataclass(frozen=True)
class Function:
    """A public function: which backends it has on which device."""

    name: str
    module: str
    native: tuple[str, ...]
    triton: bool


FUNCTIONS: dict[str, Function] = {}
_DEFAULTS: dict[str, dict[str, str]] = {}  # by name and type of device


def register_function(
    name: str, module: str, *, native: tuple[str, ...] = ("cpu",), triton: bool = True
) -> None:
    """List a public function in :func:`describe` and settle its default backends."""
    FUNCTIONS[name] = Function(name, module, native, triton)
    _DEFAULTS[name] = {}
    for device in ("cpu", "cuda"):
        # Measured order: C++ beats the reference at every benchmarked size on CPU; on a GPU a
        # function has either a Triton kernel or a CUDA C++ one, never both.
        order = ("native", "triton") if device == "cpu" else ("triton", "native")
        _DEFAULTS[name][device] = next(
            (
                b
                for b in order
                if why_off(name, b, device) is None and (b, device) != ("triton", "cpu")
            ),
            "reference",
        )


def why_off(name: str, backend: str, device: str) -> str | None:
    """The reason ``backend`` cannot serve ``name`` on ``device`` here; None where it can."""
    function = FUNCTIONS[name]
    if backend == "reference":
        return None
    if backend == "native":
        if device not in function.native:
            other = "Triton serves it" if function.triton else "the reference serves it"
            return f"no {'CUDA ' if device == 'cuda' else ''}C++ kernel on {device}: {other} there"
        return _native.OFF[device]
    if not function.triton:
        return "no Triton kernel: CUDA C++ serves it on GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and not INTERPRETED:
        return "Triton runs on GPUs (on CPU by its interpreter alone: set TRITON_INTERPRET=1)"
    if device == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET=1: kernels are interpreted on CPU tensors"
    if device == "cuda" and not torch.version.cuda:
        return "torch was built without CUDA"
    return None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend, for the whole process, inside a ``with`` block.

    Args:
        name: ``"reference"`` (plain PyTorch, any dtype, differentiable any number of times),
            ``"native"`` (C++ or CUDA C++) or ``"triton"``.

    Raises:
        ValueError: The name is none of the three.
        RuntimeError: (from the call) the backend cannot serve the function here; says why.

    Example:
        >>> import torch, flowkernels
        >>> with flowkernels.backend("reference"):
        ...     flowkernels.ops.swiglu(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, need one of {', '.join(BACKENDS)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The backend that a surrounding :func:`backend` forces; None outside one."""
    return _forced


def defaults(name: str) -> dict[str, str]:
    """The backend of ``name`` by type of device, where none is forced and its kernels serve."""
    return _DEFAULTS[name]


def choose(name: str, device: torch.device, served: bool) -> str:
    """The backend for a call of ``name``: the reference where its kernels do not read the operands.

    ``served`` says that they do (dtypes, strides, sizes).
    """
    device_type = device.type
    if _forced is None:
        return _DEFAULTS[name].get(device_type, "reference") if served else "reference"
    if _forced != "reference":
        reason = (
            why_off(name, _forced, device_type)
            if device_type in ("cpu", "cuda")
            else f"no kernels for {device_type}"
        )
        if reason is not None:
            raise RuntimeError(f"backend({_forced!r}) cannot serve {name}: {reason}")
    return _forced if served else "reference"


def table() -> list[dict[str, str]]:
    """One row a function: its backend here, and for every backend that is off, why."""
    rows = []
    device = "cuda" if torch.version.cuda and torch.cuda.is_available() else "cpu"
    for name in sorted(FUNCTIONS):
        row = {"op": f"{FUNCTIONS[name].module}.{name}", "device": device}
        row["uses"] = _DEFAULTS[name][device] if _forced is None else _forced
        for each in BACKENDS:
            row[each] = why_off(name, each, device) or "on"
        rows.append(row)
    return rows


def describe() -> str:
    """Every operator, the backend it would use here, and why each other backend is off."""
    rows = table()
    width = max(len(row["op"]) for row in rows)
    device = rows[0]["device"]
    lines = [f"flowkernels on {device}", f"{'op':<{width}}  uses       reference  native  triton"]
    reasons: dict[str, int] = {}

    def mark(state: str) -> str:
        return "on" if state == "on" else f"off [{reasons.setdefault(state, len(reasons) + 1)}]"

    for row in rows:
        cells = [mark(row[each]) for each in BACKENDS]
        lines.append(
            f"{row['op']:<{width}}  {row['uses']:<9}  {cells[0]:<9}  {cells[1]:<6}  {cells[2]}"
        )
    lines += [f"[{index}] {reason}" for reason, index in reasons.items()]
    return "\n".join(lines)
