"""Models, runs and comparisons that the optimiser's tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor

# Odd, prime, empty, longer than a chunk, two-dimensional.
SHAPES = ((3, 5), (17,), (1,), (0,), (333, 7), (2432,), ())


def make_params(
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
    device: str = "cpu",
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    ]


def clone_params(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [p.detach().to(dtype or p.dtype, copy=True).requires_grad_() for p in params]


def set_grads(step: int, *param_lists: Sequence[Tensor], scale: float = 1.0) -> None:
    """The same gradients for each list, in each parameter's dtype; those of the first list rounded
    to its dtype before the others see them."""
    generator = torch.Generator().manual_seed(1000 + step)
    for column in zip(*param_lists, strict=True):
        first = column[0]
        grad = (torch.randn(first.shape, generator=generator) * scale).to(first.device, first.dtype)
        for param in column:
            param.grad = grad.to(param.device, param.dtype, copy=True)


def run(
    params: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int],
    before: Callable[[], Any] = lambda: None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    for step in steps:
        set_grads(step, params)
        before()
        optimizer.step()
        after()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN for NaN and sign of zero for sign of zero."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().contiguous().view(-1).view(torch.uint8),
                       b.detach().contiguous().view(-1).view(torch.uint8))  # fmt: skip


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested dicts and lists, in order."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [found for key in value for found in tensors_of(value[key])]
    if isinstance(value, list | tuple):
        return [found for item in value for found in tensors_of(item)]
    return []


def snapshot(*values: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_of(list(values))]


def assert_same_bits(found: Any, expected: Any) -> None:
    found, expected = tensors_of(found), tensors_of(expected)
    assert len(found) == len(expected)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def assert_no_worse(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """At most twice as far from the float64 truth as torch in the same dtype, plus one rounding of
    the largest value. Over all tensors together: on five elements torch's error may be luck.
    """

    def furthest(found: Sequence[Tensor]) -> Tensor:
        pairs = [(a, exact) for a, exact in zip(found, truth, strict=True) if exact.numel()]
        return torch.stack([(a.double() - exact).abs().max() for a, exact in pairs]).max()

    largest = torch.stack([exact.abs().max() for exact in truth if exact.numel()]).max()
    error = furthest(ours)
    budget = 2 * furthest(theirs) + torch.finfo(ours[0].dtype).eps * largest
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}"


class NoHostSync(TorchDispatchMode):
    """Fails where the host reads a value of the device, be it the CPU in a GPU's place."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.READS:
            assert all(each.device.type != self.device for each in args), (
                f"{func} waits for the device"
            )
        return func(*args, **(kwargs or {}))
