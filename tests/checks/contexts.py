"""Contexts that the checks run an op in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import flowkernels
from flowkernels.ops import _library
from tests.checks.case import OpCase, Setting, settings

# Runs on the interpreted Triton kernels too; `briefly`: there in the first variants alone.
interpretable = pytest.mark.interpreter
interpretable_briefly = pytest.mark.interpreter(variants=3)


def _junk_fill() -> ctypes.c_bool:
    """The switch of torch's CPU allocator that fills fresh memory with 0x7fedbeef.

    That is NaN as float32 and, in every other element, as bfloat16 and float16. Unlike
    ``fill_uninitialized_memory`` it reaches what native code allocates.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, on CPU those of the native library too."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    junk = _junk_fill()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    junk.value = True
    try:
        assert torch.empty(64).isnan().all(), "fresh memory is not poisoned"
        yield
    finally:
        junk.value = False
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _detached(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_detached(each) for each in arg]
    return arg.detach() if isinstance(arg, torch.Tensor) else arg


@contextmanager
def recorded_operators() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """The (torch operator, arguments) of every operator call made inside."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    original = _library.Operator.__call__

    def record(self: Any, backend: str, *args: Any) -> Any:
        calls.append((self.default, tuple(_detached(arg) for arg in args)))
        return original(self, backend, *args)

    _library.Operator.__call__ = record  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        _library.Operator.__call__ = original  # type: ignore[method-assign]


class CaseChecks:
    """Base of the check classes: the case, its device, and the backend that is under test."""

    case: OpCase
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _kernels(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Force the kernels, so that nothing passes by falling back on the reference."""
        if request.node.get_closest_marker("unforced"):
            yield
            return
        with flowkernels.backend(self.backend()):
            yield

    def backend(self) -> str:
        if self.device == "cuda":
            return next(
                each
                for each in ("triton", "native")
                if _library.why_off(self.case.name, each, "cuda") is None
            )
        return "triton" if _library.INTERPRETED else "native"

    def variants(self, item: pytest.Item) -> tuple[str, ...]:
        marker = item.get_closest_marker("interpreter")
        count = marker.kwargs.get("variants") if marker and _library.INTERPRETED else None
        return self.case.variants[:count]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        names = metafunc.fixturenames
        if "setting" in names:
            metafunc.parametrize("setting", settings(self.case), ids=str)
        if "variant" in names:
            metafunc.parametrize("variant", self.variants(metafunc.definition))
        if "edge" in names:
            metafunc.parametrize("edge", self.case.edge_shapes, ids=lambda s: "x".join(map(str, s)))
        if "name" in names:
            metafunc.parametrize("name", self.case.differentiable)
        if "bad_input" in names:
            bad_inputs = self.case.bad_inputs
            metafunc.parametrize("bad_input", bad_inputs.values(), ids=list(bad_inputs))

    def inputs(self, setting: Setting | None = None, **options: Any) -> dict[str, Any]:
        if setting is not None:
            options = {**setting._asdict(), **options}
        return self.case.inputs(**{"device": self.device, **options})
