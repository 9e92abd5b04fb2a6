from tests.checks import OpChecks
from tests.checks.cases import step as cases


class TestEulerStep(OpChecks):
    case = cases.EULER_STEP
