"""Checks of an op's manners inside PyTorch: opcheck, compile, torch.func, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import flowkernels
from tests.checks.case import Bad, map_tensors, strided
from tests.checks.compare import assert_agrees, evaluate, flatten, truth_of, yardstick_of
from tests.checks.contexts import CaseChecks, interpretable, recorded_operators


class FrameworkChecks(CaseChecks):
    @pytest.mark.parametrize("layout", ["contiguous", "strided"])
    def test_opcheck(self, layout: str):
        """Every operator that forward and backward call: schema, fake, autograd, tracing."""
        inputs = self.inputs(dtypes="mixed_bf16_fp32")
        if layout == "strided":
            inputs = map_tensors(inputs, strided)
        with recorded_operators() as calls:
            evaluate(self.case, self.case.function, inputs)
        assert calls, f"{self.case.name} called no operator"
        for operator, arguments in calls:
            torch.library.opcheck(operator, arguments)

    def compiled(self):
        """The function compiled as one graph, any sizes; nothing compiled before is left."""
        torch._dynamo.reset()
        return torch.compile(self.case.function, fullgraph=True, dynamic=True, backend="aot_eager")

    def graphs(self) -> int:
        """How many compiled versions of the function there are, each with its guards."""
        return len(_debug_get_cache_entry_list(self.case.function.__code__))

    def run_compiled(self, function, shape, variant=None, dtypes="float32"):
        inputs = self.inputs(shape=shape, variant=variant, dtypes=dtypes)
        ours, grads = evaluate(self.case, function, inputs)
        truth = truth_of(self.case, inputs, grads)
        assert_agrees(ours, yardstick_of(self.case, inputs, grads), truth)

    @pytest.mark.unforced
    def test_compile_makes_one_graph(self, variant: str):
        """fullgraph, dynamic: forward and backward, no recompile for sizes of 2 and more."""
        function = self.compiled()
        for shape in self.case.compile_shapes:
            self.run_compiled(function, shape, variant)
        assert self.graphs() == 1

    @pytest.mark.unforced
    def test_compile_at_most_one_more_for_zero_or_one(self, edge):
        function = self.compiled()
        self.run_compiled(function, self.case.compile_shapes[0])
        self.run_compiled(function, edge)
        self.run_compiled(function, self.case.compile_shapes[1])
        assert self.graphs() <= 2

    @pytest.mark.unforced
    def test_compile_strided_and_mixed(self):
        function = self.compiled()
        inputs = map_tensors(self.inputs(dtypes="mixed_bf16_fp32"), strided)
        ours, grads = evaluate(self.case, function, inputs)
        truth = truth_of(self.case, inputs, grads)
        assert_agrees(ours, yardstick_of(self.case, inputs, grads), truth)
        assert self.graphs() == 1

    def test_torch_func_names_the_way_out(self):
        """torch.func, forward mode: an error that names the reference backend, where they work."""
        inputs = self.inputs()
        name = self.case.differentiable[0]

        def total(operand):
            if self.case.resets is not None:
                self.case.resets(inputs)
            return sum(
                out.sum() for out in flatten(self.case.function(**{**inputs, name: operand}))
            )

        with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
            torch.func.grad(total)(inputs[name])
        with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
            torch.func.jvp(total, (inputs[name],), (torch.ones_like(inputs[name]),))
        with flowkernels.backend("reference"):
            assert torch.func.grad(total)(inputs[name]).shape == inputs[name].shape

    @interpretable
    @pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "mixed_fp32_bf16"])
    def test_autocast_changes_nothing(self, dtypes: str):
        inputs = self.inputs(dtypes=dtypes)
        plain, _ = evaluate(self.case, self.case.function, inputs)
        with torch.autocast(self.device, torch.bfloat16):
            cast, grads = evaluate(self.case, self.case.function, inputs)
            peer = yardstick_of(self.case, inputs, grads)
        for name, value in plain.named().items():
            assert cast.named()[name].dtype == value.dtype, name
            assert peer.named()[name].dtype == value.dtype, name
            assert torch.equal(cast.named()[name], value), name

    @pytest.mark.unforced
    def test_names_the_argument_of_a_bad_input(self, bad_input: Bad):
        """One line that names the argument, says what it got and what it needs."""
        inputs = self.inputs(variant=self.case.variants[-1])
        for name, value in bad_input.change.items():
            inputs[name] = value(inputs) if callable(value) else value
        with pytest.raises(bad_input.error, match=bad_input.match) as caught:
            self.case.function(**inputs)
        assert "\n" not in str(caught.value)

    @pytest.mark.unforced
    def test_names_the_argument_that_is_no_float_tensor(self, name: str):
        made = [self.inputs(variant=variant) for variant in self.case.variants]
        given = [inputs for inputs in made if inputs.get(name) is not None]
        inputs = given[0]
        wrongs = [([1.0, 2.0], "list"), (inputs[name].to(torch.int64), "int64")]
        if len(given) == len(made):  # no variant does without it
            wrongs.append((None, "NoneType"))
        for wrong, got in wrongs:
            with pytest.raises(TypeError, match=rf"^{name}: got .*{got}.*need") as caught:
                self.case.function(**{**inputs, name: wrong})
            assert "\n" not in str(caught.value)
