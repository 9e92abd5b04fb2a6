"""gelu_tanh and swiglu: the checks that every op passes, and what is theirs alone."""

from __future__ import annotations

from tests.checks import OpChecks
from tests.checks.cases import activation


class TestGeluTanh(OpChecks):
    case = activation.GELU_TANH


class TestSwiGLU(OpChecks):
    case = activation.SWIGLU
