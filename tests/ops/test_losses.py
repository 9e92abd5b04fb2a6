from tests.checks import OpChecks
from tests.checks.cases import losses as cases


class TestFlowMatching(OpChecks):
    case = cases.FLOW_MATCHING


class TestFGM(OpChecks):
    case = cases.FGM
