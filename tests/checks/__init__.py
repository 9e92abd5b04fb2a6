"""The op test helper: describe a public op once, and every check of the house runs on it.

How a family uses it, in two files.

1. ``tests/checks/cases/<family>.py`` describes its public functions::

       from tests.checks.case import OpCase, bad, draw

       def _inputs(shape, dtype, device, variant):
           x = draw(shape, dtype, device)
           return {"x": x, "bias": draw(shape[-1:], dtype, device) if variant == "bias" else None}

       def _truth(x, bias=None):                      # plain PyTorch, called with float64 tensors
           return torch.nn.functional.gelu(x if bias is None else x + bias, approximate="tanh")

       GELU_TANH = OpCase(
           name="gelu_tanh",
           function=flowkernels.ops.gelu_tanh,        # called as function(**inputs)
           reference=_truth,                          # called as reference(**inputs)
           make_inputs=_inputs,
           differentiable=("x", "bias"),              # the arguments that may ask for a gradient
           variants=("plain", "bias"),                # what make_inputs takes; first = default
           bad_inputs={"bias shape": bad(ValueError, "bias: got shape", bias=torch.ones(2))},
       )
       CASES = (GELU_TANH,)

   ``case.OpCase`` documents every field (shapes, fixed dtypes, benchmark shapes, ...).

2. ``tests/<room>/test_<family>.py`` runs them::

       from tests.checks import OpChecks
       from tests.checks.cases import activation

       class TestGeluTanh(OpChecks):
           case = activation.GELU_TANH

       # plus what only this family needs

What that gives, with no more lines:

- here, on the native C++ kernels: every ``test_*`` of ``values.ValueChecks`` (float64 agreement,
  dtypes, mixed dtypes, strides, empty, NaN, poisoned memory, repeatability, threads, hypothesis),
  ``gradients.GradientChecks`` (float64 autograd, partial, odd grad_outputs, second backward, second
  order, gradcheck) and ``framework.FrameworkChecks`` (opcheck, torch.compile, torch.func, autocast,
  errors);
- the same checks on the Triton kernels through the interpreter: ``tests/ops/test_interpreter.py``
  finds every test module that names ``OpChecks`` and runs it in a process of its own;
- ahead-of-time compilation of every Triton kernel that the case launches, for sm_80, sm_90 and
  sm_100: ``tests/ops/test_aot.py`` (a small set) and ``python -m tests.checks.aot`` (all);
- the same checks on a GPU: ``tests/gpu/test_ops.py``.

The last two find cases by themselves: each module of ``tests.checks.cases`` lists its in ``CASES``.
"""

import pytest

# Its assertions are explained like those of a test module.
pytest.register_assert_rewrite(
    "tests.checks.compare",
    "tests.checks.framework",
    "tests.checks.gradients",
    "tests.checks.values",
)

from tests.checks.case import OpCase, all_cases, bad, draw  # noqa: E402
from tests.checks.framework import FrameworkChecks  # noqa: E402
from tests.checks.gradients import GradientChecks  # noqa: E402
from tests.checks.values import ValueChecks  # noqa: E402


class OpChecks(ValueChecks, GradientChecks, FrameworkChecks):
    """Every check on one :class:`OpCase`; a subclass sets ``case``."""


__all__ = ["OpCase", "OpChecks", "all_cases", "bad", "draw"]
