"""The modulate family: the checks that every op passes, and what is its alone."""

from __future__ import annotations

from tests.checks import OpChecks
from tests.checks.cases import modulate


class TestModulatedNorm(OpChecks):
    case = modulate.MODULATED_NORM


class TestGatedResidual(OpChecks):
    case = modulate.GATED_RESIDUAL


class TestGatedResidualNorm(OpChecks):
    case = modulate.GATED_RESIDUAL_NORM
