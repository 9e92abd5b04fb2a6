"""Every op on the GPU: the checks of tests/checks on CUDA tensors, and CUDA-graph capture."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.checks import OpCase, all_cases
from tests.checks.case import map_tensors, strided
from tests.checks.compare import assert_agrees, evaluate, flatten, truth_of, yardstick_of
from tests.checks.contexts import CaseChecks
from tests.checks.framework import FrameworkChecks
from tests.checks.gradients import GradientChecks
from tests.checks.values import ValueChecks
from tests.gpu import DEVICE

pytestmark = pytest.mark.gpu


class GraphChecks(CaseChecks):
    def test_real_shapes(self):
        """The shapes of real models, in bfloat16, strided: more rows than a GPU has places."""
        for shape in self.case.benchmark_shapes:
            for variant in self.case.variants[:2]:
                inputs = self.inputs(shape=shape, dtypes="bfloat16", variant=variant)
                inputs = map_tensors(inputs, strided)
                ours, grads = evaluate(self.case, self.case.function, inputs)
                truth = truth_of(self.case, inputs, grads)
                assert_agrees(ours, yardstick_of(self.case, inputs, grads), truth)

    def test_cuda_graph(self):
        """Captured once, replayed with other values in the same place; forward and backward."""
        inputs = self.inputs(dtypes="bfloat16")
        needs = self.case.needs(inputs)
        static = {
            name: value.clone().requires_grad_() if name in needs else value
            for name, value in inputs.items()
        }
        operands = [static[name] for name in needs]

        def step():
            outputs = flatten(self.case.function(**static))
            wanted = [out for out in outputs if out.requires_grad]
            ones = [torch.ones_like(out) for out in wanted]
            return outputs, torch.autograd.grad(wanted, operands, ones)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # Triton compiles before the capture
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        other = self.inputs(dtypes="bfloat16", seed=1)
        with torch.no_grad():
            for name in needs:
                static[name].copy_(other[name])
        graph.replay()
        torch.cuda.synchronize()
        outputs, gradients = [[each.clone() for each in group] for group in captured]
        again = step()
        for one, two in zip([*outputs, *gradients], [*again[0], *again[1]], strict=True):
            assert torch.equal(one, two)


class GPUChecks(ValueChecks, GradientChecks, FrameworkChecks, GraphChecks):
    """What OpChecks holds on the CPU, on the GPU. Threads are a matter of CPUs, gradcheck of
    formulas, what is said of a bad operand of the host: none of them is asked here.
    """

    device = DEVICE
    test_thread_count_does_not_change_a_bit: ClassVar[None] = None
    test_gradcheck: ClassVar[None] = None
    test_names_the_argument_of_a_bad_input: ClassVar[None] = None
    test_names_the_argument_that_is_no_float_tensor: ClassVar[None] = None


def _class(case: OpCase) -> type:
    name = "Test" + "".join(part.title() for part in case.name.split("_"))
    return type(name, (GPUChecks,), {"case": case, "__module__": __name__})


for _case in all_cases():
    _made = _class(_case)
    globals()[_made.__name__] = _made
del _made
