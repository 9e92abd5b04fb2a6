"""Checks of what an op computes: agreement, dtypes, strides, empty, NaN, memory, repeatability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flowkernels.ops import _library
from tests.checks.case import Setting, is_float, map_tensors, spread, strided
from tests.checks.compare import (
    assert_agrees,
    assert_same_bits,
    evaluate,
    truth_of,
    yardstick_of,
)
from tests.checks.contexts import (
    CaseChecks,
    interpretable,
    interpretable_briefly,
    poisoned_memory,
    threads,
)


class ValueChecks(CaseChecks):
    def agrees(self, inputs, needs=None):
        """Forward and backward of ours against PyTorch's and the float64 truth."""
        ours, grads = evaluate(self.case, self.case.function, inputs, needs)
        truth = truth_of(self.case, inputs, grads, needs)
        assert_agrees(ours, yardstick_of(self.case, inputs, grads, needs), truth)
        return ours

    @interpretable
    def test_agrees_with_float64(self, setting: Setting):
        """Outputs and gradients, every dtype and mix of dtypes, odd and large sizes."""
        self.agrees(self.inputs(setting))

    @interpretable_briefly
    @pytest.mark.parametrize("dtypes", ["float32", "mixed_bf16_fp32"])
    def test_strided_inputs(self, variant: str, dtypes: str):
        """Chunk views with NaN around them: read in place, and nothing beside them is read."""
        self.agrees(map_tensors(self.inputs(dtypes=dtypes, variant=variant), strided))

    @interpretable
    def test_non_unit_last_stride(self):
        """What the kernels do not serve still gives the right answer."""
        self.agrees(map_tensors(self.inputs(), spread))

    @interpretable
    def test_one_tensor_for_several_arguments(self):
        """Arguments may share memory: x passed as the residual too, say."""
        inputs = self.inputs()
        first = inputs[self.case.differentiable[0]]
        shared = {
            name: first if is_float(value) and value.shape == first.shape else value
            for name, value in inputs.items()
        }
        self.agrees(shared)

    @interpretable_briefly
    def test_edge_sizes(self, edge, request):
        """Sizes of 0 and 1, in each place, in every variant."""
        for variant in self.variants(request.node):
            self.agrees(self.inputs(shape=edge, variant=variant))

    @interpretable_briefly
    def test_nan_stays_in_its_place(self, variant: str):
        """A NaN in one element reaches exactly the results that the formula says."""
        clean = self.inputs(variant=variant)
        for name in self.case.needs(clean):
            if clean[name].numel() == 0:
                continue
            inputs = dict(clean)
            inputs[name] = clean[name].clone()
            inputs[name].view(-1)[inputs[name].numel() // 2] = float("nan")
            self.agrees(inputs)

    @interpretable_briefly
    def test_every_element_is_written(self, variant: str):
        """With fresh memory full of NaN the bits are the same."""
        inputs = self.inputs(dtypes="mixed_bf16_fp32", variant=variant)
        with poisoned_memory():
            poisoned, _ = evaluate(self.case, self.case.function, inputs)
        for name, value in poisoned.named().items():
            assert not value.isnan().any(), f"{name} holds memory that nobody wrote"
        assert_same_bits(poisoned, evaluate(self.case, self.case.function, inputs)[0])

    @interpretable
    @pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
    def test_repeats_bitwise(self, dtypes: str):
        for shape in self.case.shapes[: 2 if _library.INTERPRETED else None]:
            inputs = self.inputs(shape=shape, dtypes=dtypes)
            first, _ = evaluate(self.case, self.case.function, inputs)
            assert_same_bits(first, evaluate(self.case, self.case.function, inputs)[0])

    def test_thread_count_does_not_change_a_bit(self, variant: str):
        shapes = (self.case.shapes[0], max(self.case.shapes, key=lambda s: torch.Size(s).numel()))
        for shape in shapes:
            inputs = self.inputs(shape=shape, variant=variant)
            with threads(1):
                one, _ = evaluate(self.case, self.case.function, inputs)
            with threads(2):
                two, _ = evaluate(self.case, self.case.function, inputs)
            assert_same_bits(one, two)

    @interpretable
    def test_any_shape(self):
        """Property: agreement does not depend on the shape, dtype mix or variant."""
        rank = len(self.case.shapes[0])
        shapes = st.tuples(
            st.integers(0, 4), *[st.integers(1, 40)] * (rank - 2), st.integers(1, 150)
        )

        @hypothesis_settings(
            max_examples=5 if _library.INTERPRETED else 25,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            shape=shapes,
            dtypes=st.sampled_from(["float32", "mixed_bf16_fp32", "mixed_all"]),
            variant=st.sampled_from(self.case.variants),
            views=st.booleans(),
        )
        def check(shape, dtypes, variant, views):
            inputs = self.inputs(shape=self.case.allowed(shape), dtypes=dtypes, variant=variant)
            self.agrees(map_tensors(inputs, strided) if views else inputs)

        check()
