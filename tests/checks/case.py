"""What a public op is to the checks: how to call it, what it should give, what to try it with."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flowkernels.ops import _library

Tensor = torch.Tensor
Shape = tuple[int, ...]
Inputs = dict[str, Any]

# Odd, prime and large; more rows than a chunk; sizes of 1 in every place.
ROW_SHAPES: tuple[Shape, ...] = (
    (2, 5, 17),
    (1, 1, 1),
    (2, 3, 3),
    (2, 37, 33),
    (1, 2, 333),
    (1, 3, 2432),
)
# SD3-medium, SD3.5-large, FLUX.1-dev at 512 px; FLUX.2; rows too wide for the registers.
ROW_BENCHMARK_SHAPES: tuple[Shape, ...] = (
    (4, 1024, 1536),
    (4, 1024, 2432),
    (4, 1024, 3072),
    (1, 256, 6144),
    (2, 64, 16384),
)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "mixed_bf16_fp32": (torch.bfloat16, torch.float32),
    "mixed_fp32_bf16": (torch.float32, torch.bfloat16),
    "mixed_all": (torch.float16, torch.float32, torch.bfloat16),
}


class Bad(NamedTuple):
    """A call that must fail: the error's type, a pattern of its text, the arguments to change."""

    error: type[Exception]
    match: str
    change: Mapping[str, Any]


def bad(error: type[Exception], match: str, **change: Any) -> Bad:
    """``change``: replacements by argument; a callable gets the good inputs and returns one."""
    return Bad(error, match, change)


@dataclass(frozen=True)
class OpCase:
    """One public op.

    Attributes:
        name: As registered with ``_library.register_function``.
        function: The public function, called as ``function(**inputs)``. Returns a tensor or a
            tuple of tensors (None entries and integer tensors are left out of comparisons).
        reference: The formula in plain PyTorch, written for the test, called with the same
            keywords and every floating-point tensor as float64; differentiable.
        make_inputs: ``(shape, dtype, device, variant) -> dict`` of keyword arguments. Called under
            a fixed torch seed; use :func:`draw`, which also serves the meta device. Optional
            arguments that a variant leaves out are None.
        differentiable: Arguments that may ask for a gradient (where they are tensors).
        variants: Names that ``make_inputs`` understands; the first is the default. Options such as
            ``norm="rms"``, broadcast forms, absent operands: one variant each.
        shapes: What ``make_inputs`` gets; the first is used where one must do.
        benchmark_shapes: Shapes of real models, for ahead-of-time compilation.
        fixed: Floating-point arguments whose dtype the op prescribes (times, weights): not cast.
        bad_inputs: By name, calls that must fail with a one-line error (see :func:`bad`).
        compile_shapes: Shapes that one compiled graph must serve; every size ≥ 2 and distinct.
        edge_shapes: Sizes of 0 and 1, for which one more graph is allowed; also the empty ones.
        gradcheck_shape: Small: finite differences take two evaluations for each element.
        allowed: Maps any random shape of the same rank to one that the op takes (an even last
            size, say).
        second_order: False where gradients of gradients are documented not to exist.
        peer: Where the reference backend is more accurate than what PyTorch itself does in these
            dtypes (it keeps an attention's output in float32, say), PyTorch's way, called as
            ``function``: the yardstick for values and first-order gradients.
        resets: Called before each evaluation with the inputs, for arguments that the op changes.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, Any, str], Inputs]
    differentiable: tuple[str, ...]
    variants: tuple[str, ...] = ("plain",)
    shapes: tuple[Shape, ...] = ROW_SHAPES
    benchmark_shapes: tuple[Shape, ...] = ROW_BENCHMARK_SHAPES
    fixed: tuple[str, ...] = ()
    bad_inputs: Mapping[str, Bad] = field(default_factory=dict)
    compile_shapes: tuple[Shape, ...] = ((2, 3, 16), (4, 5, 16), (3, 7, 16))
    edge_shapes: tuple[Shape, ...] = ((1, 3, 16), (2, 1, 16), (0, 3, 16), (2, 0, 16))
    gradcheck_shape: Shape = (2, 3, 4)
    allowed: Callable[[Shape], Shape] = lambda shape: shape
    second_order: bool = True
    resets: Callable[[Inputs], None] | None = None
    peer: Callable[..., Any] | None = None

    def inputs(
        self,
        shape: Shape | None = None,
        dtypes: str | torch.dtype = "float32",
        variant: str | None = None,
        device: Any = "cpu",
        seed: int = 0,
    ) -> Inputs:
        """Fresh inputs; ``dtypes`` is a key of DTYPES (a cycle over the tensors) or one dtype."""
        cycle = (dtypes,) if isinstance(dtypes, torch.dtype) else DTYPES[dtypes]
        torch.manual_seed(seed)
        made = self.make_inputs(
            shape or self.shapes[0], cycle[0], torch.device(device), variant or self.variants[0]
        )
        wanted = itertools.cycle(cycle)
        return {
            name: value.to(next(wanted)) if is_float(value) and name not in self.fixed else value
            for name, value in made.items()
        }

    def needs(self, inputs: Inputs) -> tuple[str, ...]:
        """The differentiable arguments that are there."""
        return tuple(name for name in self.differentiable if is_float(inputs.get(name)))


class Setting(NamedTuple):
    shape: Shape
    dtypes: str
    variant: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.dtypes}-{self.variant}"


def settings(case: OpCase) -> list[Setting]:
    """All shapes in all dtypes for the default variant; every other variant at the first shape.

    The interpreter runs a program at a time, so there each shape beyond the first sees one dtype
    and each variant two.
    """
    first, *others = case.shapes
    default, *variants = case.variants
    found = [Setting(first, each, default) for each in DTYPES]
    found += [
        Setting(first, each, variant)
        for variant in variants
        for each in (("float32", "mixed_all") if _library.INTERPRETED else DTYPES)
    ]
    for index, shape in enumerate(others):
        names = list(DTYPES)
        if _library.INTERPRETED:
            names = [names[index % 3]]
        found += [Setting(shape, each, default) for each in names]
    return found


def draw(shape: Any, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """Standard normal values from torch's default CPU generator, rounded to ``dtype``."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape).to(dtype).to(device)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def to_double(inputs: Inputs) -> Inputs:
    """The same values in float64, detached and contiguous."""
    return {
        name: value.detach().double().contiguous() if is_float(value) else value
        for name, value in inputs.items()
    }


def map_tensors(inputs: Inputs, transform: Callable[[Tensor], Tensor]) -> Inputs:
    """``transform`` applied to every floating-point tensor with at least one dimension."""
    return {
        name: transform(value) if is_float(value) and value.dim() else value
        for name, value in inputs.items()
    }


def strided(x: Tensor) -> Tensor:
    """The same values as a chunk of a larger buffer of NaN: unit last stride, odd offset."""
    *leading, columns = x.shape
    buffer = x.new_full([size + 1 for size in leading] + [3 * columns + 1], float("nan"))
    view = buffer[(*(slice(1, None) for _ in leading), slice(columns + 1, 2 * columns + 1))]
    return view.copy_(x)


def spread(x: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension: kernels do not serve it."""
    *leading, columns = x.shape
    return x.new_full([*leading, 2 * columns], float("nan"))[..., ::2].copy_(x)


def all_cases() -> list[OpCase]:
    """Every case of every module of ``tests.checks.cases``."""
    from tests.checks import cases

    found: list[OpCase] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(cases.__path__)):
        found += importlib.import_module(f"{cases.__name__}.{module}").CASES
    return found


def triton_cases() -> list[OpCase]:
    """Those that have a Triton kernel; CUDA C++ serves the others on a GPU."""
    return [case for case in all_cases() if _library.FUNCTIONS[case.name].triton]
