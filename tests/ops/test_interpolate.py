from tests.checks import OpChecks
from tests.checks.cases import interpolate as cases


class TestInterpolate(OpChecks):
    case = cases.INTERPOLATE
