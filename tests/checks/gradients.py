"""Checks of an op's backward: who asks, how often, with what, and to which order."""

from __future__ import annotations

import pytest
import torch

import flowkernels
from tests.checks.case import map_tensors, strided, to_double
from tests.checks.compare import (
    Result,
    assert_agrees,
    evaluate,
    flatten,
    grad_outputs_for,
    leaves,
    truth_of,
    yardstick_of,
)
from tests.checks.contexts import CaseChecks, interpretable, interpretable_briefly


def _transposed(outputs):
    """Gradients whose last stride is not 1."""
    return [
        grad.mT.contiguous().mT if grad.dim() > 1 else grad for grad in grad_outputs_for(outputs)
    ]


def _expanded(outputs):
    """What ``sum()`` hands to backward: one number with strides of 0."""
    return [
        torch.full((), 0.7, dtype=out.dtype, device=out.device).expand(out.shape) for out in outputs
    ]


def _strided(outputs):
    """What the backward of ``chunk`` or a slice hands out: rows of a larger tensor."""
    return [strided(grad) if grad.dim() else grad for grad in grad_outputs_for(outputs)]


GRAD_OUTPUTS = {"transposed": _transposed, "expanded": _expanded, "strided": _strided}


class GradientChecks(CaseChecks):
    def variant_with(self, name: str) -> str:
        for variant in self.case.variants:
            if name in self.case.needs(self.inputs(variant=variant)):
                return variant
        raise AssertionError(f"no variant of {self.case.name} has the argument {name}")

    @interpretable
    def test_gradient_asked_for_alone(self, name: str):
        """One argument asks: right values for it, none for the others."""
        inputs = self.inputs(variant=self.variant_with(name))
        ours, grads = evaluate(self.case, self.case.function, inputs, (name,))
        assert ours.gradients[name] is not None
        truth = truth_of(self.case, inputs, grads, (name,))
        assert_agrees(ours, yardstick_of(self.case, inputs, grads, (name,)), truth)

    @interpretable
    def test_gradient_asked_for_by_all_others(self, name: str):
        inputs = self.inputs(variant=self.variant_with(name))
        needs = tuple(each for each in self.case.needs(inputs) if each != name)
        ours, grads = evaluate(self.case, self.case.function, inputs, needs)
        truth = truth_of(self.case, inputs, grads, needs)
        assert_agrees(ours, yardstick_of(self.case, inputs, grads, needs), truth)

    @interpretable_briefly
    @pytest.mark.parametrize("form", GRAD_OUTPUTS)
    def test_any_grad_output(self, form: str, variant: str):
        inputs = self.inputs(variant=variant)
        ours, grads = evaluate(self.case, self.case.function, inputs, make_grads=GRAD_OUTPUTS[form])
        truth = truth_of(self.case, inputs, grads)
        assert_agrees(ours, yardstick_of(self.case, inputs, grads), truth)

    @interpretable_briefly
    def test_some_outputs_unused(self, variant: str):
        """Backward through one output of several, each in turn."""
        inputs = self.inputs(variant=variant)
        needs = self.case.needs(inputs)
        with torch.no_grad():
            count = len(flatten(self.case.function(**inputs)))
        for index in range(count):
            ours = self._one_output(self.case.function, inputs, needs, index)
            truth = self._one_output(self.case.reference, to_double(inputs), needs, index)
            with flowkernels.backend("reference"):
                peer = self._one_output(self.case.peer or self.case.function, inputs, needs, index)
            assert_agrees(ours, peer, truth)

    def _one_output(self, function, inputs, needs, index) -> Result:
        if self.case.resets is not None:
            self.case.resets(inputs)
        taken = leaves(inputs, needs)
        output = flatten(function(**taken))[index]
        if not output.requires_grad:
            return Result([output], {})
        found = torch.autograd.grad(
            output, [taken[each] for each in needs], torch.ones_like(output), allow_unused=True
        )
        # A gradient that is zero everywhere may be given as none at all.
        zeros = {
            each: torch.zeros_like(taken[each]) if gradient is None else gradient
            for each, gradient in zip(needs, found, strict=True)
        }
        return Result([output], zeros)

    @interpretable_briefly
    def test_second_backward_with_another_grad_output(self, variant: str):
        """``retain_graph``: what the first backward did leaves no trace in the second."""
        inputs = self.inputs(variant=variant)
        needs = self.case.needs(inputs)
        taken = leaves(inputs, needs)
        if self.case.resets is not None:
            self.case.resets(taken)
        outputs = [out for out in flatten(self.case.function(**taken)) if out.requires_grad]
        first = grad_outputs_for(outputs, seed=1)
        ones = [torch.ones_like(out) for out in outputs]
        for grads in (first, grad_outputs_for(outputs, seed=2), ones, first):
            found = torch.autograd.grad(
                outputs, [taken[each] for each in needs], grads, retain_graph=True
            )
            ours = Result([], dict(zip(needs, found, strict=True)))
            truth = self._gradients(self.case.reference, to_double(inputs), needs, grads)
            with flowkernels.backend("reference"):
                peer = self._gradients(self.case.peer or self.case.function, inputs, needs, grads)
            assert_agrees(ours, peer, truth)

    def _gradients(self, function, inputs, needs, grads) -> Result:
        if self.case.resets is not None:
            self.case.resets(inputs)
        taken = leaves(inputs, needs)
        outputs = [out for out in flatten(function(**taken)) if out.requires_grad]
        found = torch.autograd.grad(
            outputs,
            [taken[each] for each in needs],
            [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)],
        )
        return Result([], dict(zip(needs, found, strict=True)))

    @interpretable_briefly
    def test_second_order(self, variant: str):
        """Gradients of a function of the gradients (R1, penalties) against double autograd."""
        if not self.case.second_order:
            return
        inputs = map_tensors(self.inputs(variant=variant), strided)
        needs = self.case.needs(inputs)
        ours = self._second_order(self.case.function, inputs, needs)
        truth = self._second_order(self.case.reference, to_double(inputs), needs)
        with flowkernels.backend("reference"):
            peer = self._second_order(self.case.function, inputs, needs)
        assert_agrees(ours, peer, truth)

    def _second_order(self, function, inputs, needs) -> Result:
        if self.case.resets is not None:
            self.case.resets(inputs)
        taken = leaves(inputs, needs)
        operands = [taken[each] for each in needs]
        outputs = [out for out in flatten(function(**taken)) if out.requires_grad]
        grads = [grad.requires_grad_() for grad in grad_outputs_for(outputs)]
        first = torch.autograd.grad(outputs, operands, grads, create_graph=True)
        weights = grad_outputs_for(first, seed=5)
        penalty = sum((a * b).sum() for a, b in zip(first, weights, strict=True))
        names = [*needs, *(f"grad_output {index}" for index in range(len(grads)))]
        second = torch.autograd.grad(
            penalty, [*operands, *grads], allow_unused=True, materialize_grads=True
        )
        return Result(list(first), dict(zip(names, second, strict=True)))

    @pytest.mark.unforced
    def test_gradcheck(self, variant: str):
        """The public function on the reference backend, by finite differences in float64."""
        inputs = self.inputs(shape=self.case.gradcheck_shape, variant=variant)
        needs = self.case.needs(inputs)
        doubled = to_double(inputs)

        def function(*operands):
            if self.case.resets is not None:
                self.case.resets(doubled)
            return tuple(
                flatten(
                    self.case.function(**{**doubled, **dict(zip(needs, operands, strict=True))})
                )
            )

        operands = [doubled[each].requires_grad_() for each in needs]
        with flowkernels.backend("reference"):
            assert torch.autograd.gradcheck(function, operands)
