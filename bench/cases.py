"""A case: one operator at one shape, dtype and direction, in all its variants.

An :class:`Operation` says how to call it, what its peers are and what it must read and write;
:func:`cases_of` makes the cases, and :meth:`Case.build` sets one up on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import flowkernels
from bench import numerics, peers
from bench.machine import cache_bytes
from bench.shapes import label

Tensor = torch.Tensor
Call = Callable[[int], Any]

DIRECTIONS = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SPEED = ("ours", "eager", "compile", "copy")
HOST = ("ours", "eager")

# Inputs rotate until they fill the last cache so many times, within these limits.
CACHE_FILLS, MOST_SETS, MOST_BYTES = 3, 64, 4 << 30


@dataclass(frozen=True)
class Context:
    """What a run measures: where, how thoroughly, and with which compiler."""

    device: str = "cpu"
    level: str = "default"
    compile_backend: str = "inductor"
    seconds: float = 2.0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


class Random:
    """Random inputs of one dtype on one device; the same seed gives the same ones."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, device=self.device, generator=self._generator)
        return (made * scale).to(self.dtype)

    def times(self, batch: int) -> Tensor:
        """t in (0, 1), float32 whatever the dtype."""
        return torch.rand(batch, device=self.device, generator=self._generator) * 0.96 + 0.02


@dataclass(frozen=True)
class Operation:
    """One public function as it is benchmarked.

    Attributes:
        name: of the public function, and of the variant where it has some.
        family: whose targets it has (:mod:`bench.targets`).
        make: inputs at a shape, in the order of the arguments.
        ours: the fused function.
        eager: the same in plain PyTorch; compiled, it is the second peer.
        gradients: which inputs a gradient is asked for (empty: forward alone is measured).
        names: of the inputs.
        saved: which inputs the backward pass has to read again.
        saved_outputs: which outputs it has to read.
        one_pass: the forward pass already writes the gradients, and the backward reads nothing.
        reads: bytes of the inputs that have to be read; by default all of them.
        truth: float64 results from float64 inputs and the variant's own outputs; by default our
            reference backend's, and the gradients are checked with it.
    """

    name: str
    family: str
    make: Callable[[Random, tuple[int, ...]], list[Any]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    names: tuple[str, ...]
    gradients: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    saved_outputs: tuple[int, ...] = ()
    one_pass: bool = False
    reads: Callable[[Sequence[Any]], int] | None = None
    truth: Callable[[list[Any], list[Tensor]], list[Tensor]] | None = None

    def traffic(self, direction: str, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> int:
        """The least bytes that the direction moves: each tensor once in each pass that needs it."""
        forward = (self.reads or size)(inputs) + size(outputs)
        if direction == "forward":
            return forward
        gradients = size(inputs[i] for i in self.gradients)
        if self.one_pass:
            return forward + gradients
        again = size(inputs[i] for i in self.saved) + size(outputs[i] for i in self.saved_outputs)
        return forward + size(outputs) + again + gradients


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among them."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


@dataclass
class Prepared:
    """A case on a device, ready to be checked and timed."""

    variants: dict[str, Call]
    bytes_moved: int
    sets: int
    verify: Callable[[], dict[str, float]]
    capture: bool = True


@dataclass(frozen=True)
class Case:
    """One row of the table; ``build`` is called when its turn comes."""

    op: str
    family: str
    shape: str
    elements: int
    dtype: str
    direction: str
    kind: str
    priority: int
    variants: tuple[str, ...]
    build: Callable[[Context], Prepared]

    @property
    def id(self) -> str:
        host = "-host" if self.kind == "host" else ""
        return f"{self.op}-{self.shape}-{self.dtype}-{self.direction}{host}"


def cases_of(
    operation: Operation,
    shapes: Iterable[tuple[tuple[int, ...], int]],
    *,
    tiny: tuple[int, ...],
) -> list[Case]:
    """The cases of an operation: each shape and dtype, each direction, and the host's time.

    Args:
        operation: what is measured.
        shapes: (shape, priority) pairs.
        tiny: the shape at which a call's cost is the host's alone.
    """
    directions = DIRECTIONS if operation.gradients else DIRECTIONS[:1]
    sized = [(shape, dtype, rank, "speed") for shape, rank in shapes for dtype in DTYPES]
    sized.append((tiny, "float32", 1, "host"))

    def case(shape: tuple[int, ...], dtype: str, rank: int, kind: str, direction: str) -> Case:
        return Case(
            op=operation.name,
            family=operation.family,
            shape=label(shape),
            elements=torch.Size(shape).numel(),
            dtype=dtype,
            direction=direction,
            kind=kind,
            priority=rank,
            variants=HOST if kind == "host" else SPEED,
            build=lambda context: prepare(
                operation, shape, DTYPES[dtype], direction, kind, context
            ),
        )

    return [case(*size, direction) for size in sized for direction in directions]


def prepare(
    operation: Operation,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    direction: str,
    kind: str,
    context: Context,
) -> Prepared:
    """Make the inputs and the variants of one case (compiling happens at their first call)."""
    device = context.torch_device
    backward = direction == "forward+backward"
    wanted = operation.gradients if backward else ()

    def inputs_of(seed: int) -> list[Any]:
        return _differentiable(operation.make(Random(seed, dtype, device), shape), wanted)

    first = inputs_of(0)
    outputs = [x.detach() for x in _tuple(operation.eager(*first))]
    bytes_moved = operation.traffic(direction, first, outputs)
    sets = 1 if kind == "host" else rotation(bytes_moved, context)
    inputs = [first, *(inputs_of(seed) for seed in range(1, sets))]
    grads = [_upstream(outputs, seed, dtype, device) for seed in range(sets)]

    functions = {"ours": operation.ours, "eager": operation.eager}
    if kind == "speed":
        functions["compile"] = peers.compiled(
            operation.eager, device=context.device, backend=context.compile_backend
        )
    variants = {
        name: _call(function, inputs, grads, wanted, backward)
        for name, function in functions.items()
    }
    if kind == "speed":
        variants["copy"] = peers.copy_call(bytes_moved, sets, device)

    def verify() -> dict[str, float]:
        return _verify(operation, functions, inputs[0], grads[0], wanted, dtype)

    return Prepared(variants, bytes_moved, sets, verify)


def rotation(bytes_moved: int, context: Context) -> int:
    """How many sets of inputs it takes for the cache not to be the memory."""
    if context.level == "tiny":
        return 2
    wanted = -(-CACHE_FILLS * cache_bytes(context.device) // max(1, bytes_moved))
    return max(2, min(wanted + 1, MOST_SETS, max(2, MOST_BYTES // max(1, bytes_moved))))


def _differentiable(inputs: list[Any], wanted: Sequence[int]) -> list[Any]:
    # detach() keeps a view's strides: a chunk of the modulation stays strided as a leaf.
    return [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _upstream(
    outputs: Sequence[Tensor], seed: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor] | None:
    """Random gradients of the outputs; None for a loss, whose gradient is 1."""
    if len(outputs) == 1 and outputs[0].dim() == 0:
        return None
    random = Random(1000 + seed, dtype, device)
    return [random.normal(*x.shape) for x in outputs]


def _call(
    function: Callable[..., Any],
    inputs: list[list[Any]],
    grads: list[list[Tensor] | None],
    wanted: Sequence[int],
    backward: bool,
) -> Call:
    sets = len(inputs)
    if not backward:
        return lambda index: function(*inputs[index % sets])
    leaves = [[arguments[i] for i in wanted] for arguments in inputs]

    def both(index: int) -> Any:
        which = index % sets
        outputs = function(*inputs[which])
        return torch.autograd.grad(outputs, leaves[which], grads[which])

    return both


def _verify(
    operation: Operation,
    functions: dict[str, Callable[..., Any]],
    inputs: list[Any],
    grads: list[Tensor] | None,
    wanted: Sequence[int],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Compare outputs and gradients of every variant with float64 (see :mod:`bench.numerics`)."""

    def results(function: Callable[..., Any], arguments: list[Any], up: Any) -> list[Tensor]:
        outputs = _tuple(function(*arguments))
        leaves = [arguments[i] for i in wanted]
        found = torch.autograd.grad(outputs, leaves, up) if leaves else ()
        return [x.detach() for x in (*outputs, *found)]

    exact = _differentiable([_double(x) for x in inputs], wanted)
    if operation.truth is not None:
        # The variant's outputs hold its own random numbers: each is held to its own truth.
        errors: dict[str, float] = {}
        for name, function in functions.items():
            drawn = results(function, inputs, grads)
            own = operation.truth(exact, [x.double() for x in drawn])
            names = [f"output {i} of {name}" for i in range(len(drawn))]
            errors[name] = numerics.verify({"eager": drawn}, own, dtype, names)["eager"]
        return errors
    up = None if grads is None else [x.double() for x in grads]
    with flowkernels.backend("reference"):
        truth = results(operation.ours, exact, up)
    names = [f"output {i}" for i in range(len(truth) - len(wanted))]
    names += [f"gradient of {operation.names[i]}" for i in wanted]
    found = {name: results(function, inputs, grads) for name, function in functions.items()}
    return numerics.verify(found, truth, dtype, names)


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value
