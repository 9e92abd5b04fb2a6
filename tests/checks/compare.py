"""Evaluating an op with its gradients, and the one rule by which results are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import flowkernels
from tests.checks.case import Inputs, OpCase, is_float, to_double

Tensor = torch.Tensor


class Result:
    """Outputs, and gradients by argument name (None where autograd gave none)."""

    def __init__(self, outputs: list[Tensor], gradients: dict[str, Tensor | None]) -> None:
        self.outputs = outputs
        self.gradients = gradients

    def named(self) -> dict[str, Tensor]:
        found = {f"output {i}": out.detach() for i, out in enumerate(self.outputs)}
        for name, gradient in self.gradients.items():
            if gradient is not None:
                found[f"gradient of {name}"] = gradient.detach()
        return found


def flatten(result: Any) -> list[Tensor]:
    """The floating-point tensors of an op's result, in order."""
    items = result if isinstance(result, tuple | list) else (result,)
    return [item for item in items if is_float(item)]


def leaves(inputs: Inputs, needs: Sequence[str]) -> Inputs:
    """The same inputs, strides kept, with the named ones as leaves that ask for a gradient."""
    return {
        name: value.detach().requires_grad_() if name in needs else value
        for name, value in inputs.items()
    }


def grad_outputs_for(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """A random gradient for each output, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs
    ]


def evaluate(
    case: OpCase,
    function: Callable[..., Any],
    inputs: Inputs,
    needs: Sequence[str] | None = None,
    make_grads: Callable[[Sequence[Tensor]], Sequence[Tensor]] = grad_outputs_for,
) -> tuple[Result, list[Tensor]]:
    """Run forward and backward; returns the result and the grad_outputs that were used."""
    if case.resets is not None:
        case.resets(inputs)
    needs = case.needs(inputs) if needs is None else needs
    taken = leaves(inputs, needs)
    outputs = flatten(function(**taken))
    grads = list(make_grads(outputs))
    found: dict[str, Tensor | None] = dict.fromkeys(needs)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    if pairs and needs:
        gradients = torch.autograd.grad(
            [out for out, _ in pairs],
            [taken[name] for name in needs],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        found = dict(zip(needs, gradients, strict=True))
    return Result(outputs, found), grads


def truth_of(
    case: OpCase, inputs: Inputs, grads: Sequence[Tensor], needs: Sequence[str] | None = None
) -> Result:
    """The float64 formula with float64 autograd, given the same values."""
    doubled = [grad.double() for grad in grads]
    return evaluate(case, case.reference, to_double(inputs), needs, lambda outputs: doubled)[0]


def yardstick_of(
    case: OpCase, inputs: Inputs, grads: Sequence[Tensor], needs: Sequence[str] | None = None
) -> Result:
    """PyTorch in the same dtypes: the case's peer, or the reference backend."""
    with flowkernels.backend("reference"):
        return evaluate(case, case.peer or case.function, inputs, needs, lambda outputs: grads)[0]


def assert_agrees(ours: Result, yardstick: Result, truth: Result) -> None:
    """Same dtypes and shapes as PyTorch gives, NaN where the truth has it, values by the rule."""
    mine, peer, exact = ours.named(), yardstick.named(), truth.named()
    assert mine.keys() == exact.keys() == peer.keys()
    for name, value in mine.items():
        assert value.dtype == peer[name].dtype, name
        assert value.shape == exact[name].shape, name
        assert_close(name, value, peer[name], exact[name])


# Float32 arithmetic takes a handful of roundings to a result. PyTorch may be lucky in all of few
# elements, so twice its distance is no bound there: this many roundings of the largest value are.
ROUNDINGS = 4


def assert_close(name: str, ours: Tensor, yardstick: Tensor, truth: Tensor) -> None:
    """The rule: at most twice PyTorch's own distance from the float64 truth, plus rounding noise.

    The noise is what adding and subtracting a constant does to the truth in ours' dtype; the
    constant is 0.3, or 0.3 of the largest value where all are small.
    """
    undefined = truth.isnan()
    assert torch.equal(ours.isnan(), undefined), f"{name}: NaN not exactly where the formula has it"
    rounded = truth.to(ours.dtype)
    infinite = rounded.isinf()
    assert torch.equal(ours[infinite], rounded[infinite]), f"{name}: infinities differ"
    finite = ~(undefined | infinite)
    if not finite.any():
        return
    exact, rounded = truth[finite].double(), rounded[finite]
    largest = rounded.abs().max().item()
    offset = 0.3 * min(1.0, largest)
    noise = 2 * ((rounded + offset - offset) - rounded).abs().max().item()
    floor = ROUNDINGS * torch.finfo(torch.float32).eps * largest
    peer = (yardstick[finite].double() - exact).abs().max().item()
    distance = (ours[finite].double() - exact).abs().max().item()
    allowed = 2 * peer + max(noise, floor)
    assert distance <= allowed, (
        f"{name}: {distance:.3e} from the truth, allowed {allowed:.3e} "
        f"(PyTorch {peer:.3e}, largest value {largest:.3e})"
    )


def assert_same_bits(first: Result, second: Result) -> None:
    one, other = first.named(), second.named()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(
            value.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
        ), f"{name}: bits differ"
