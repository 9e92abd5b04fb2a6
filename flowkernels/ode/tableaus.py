"""Butcher tableaus of the explicit solvers, as values.

A step of s stages from (t, y) over dt is

    k_i = f(t + c_i·dt, y + dt·Σ_j a_ij·k_j),    y₁ = y + dt·Σ_i b_i·k_i

and an embedded pair adds the weights e of its error estimate, ``dt·Σ_i e_i·k_i``, and the weights m
of the state in the middle of the step, ``y + dt·Σ_i m_i·k_i``. From y, y₁, the middle and the
slopes at both ends follows the quartic that interpolates the step, of weights polynomial in
x = (t - t₀)/dt: ``y(t) = y + dt·Σ_i (Σ_m interpolant[m][i]·x^(m+1))·k_i``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method.

    Attributes:
        name: the solver's, as its warnings say it.
        order: of the solution.
        nodes: c of the stages after the first (whose c is 0).
        rows: a of the stages after the first; row i has i weights.
        solution: b, one weight a stage.
        error: e; empty for a method without an error estimate.
        middle: m; empty likewise.
    """

    name: str
    order: int
    nodes: Row
    rows: tuple[Row, ...]
    solution: Row
    error: Row = ()
    middle: Row = ()

    @cached_property
    def ends_with_solution(self) -> bool:
        """Whether the last stage is taken at y₁ itself: its sum serves twice."""
        return len(self.rows) > 0 and self.solution[-1] == 0 and self.solution[:-1] == self.rows[-1]

    @cached_property
    def interpolant(self) -> tuple[Row, Row, Row, Row]:
        """Weights of the stages at x, x², x³ and x⁴: slopes fitted at both ends, three values."""
        stages = len(self.solution)
        first = [1.0] + [0.0] * (stages - 1)
        last = [0.0] * (stages - 1) + [1.0]
        columns = list(zip(first, last, self.solution, self.middle, strict=True))
        return (
            tuple(f0 for f0, _, _, _ in columns),
            tuple(-4 * f0 + f1 - 5 * b + 16 * m for f0, f1, b, m in columns),
            tuple(5 * f0 - 3 * f1 + 14 * b - 32 * m for f0, f1, b, m in columns),
            tuple(-2 * f0 + 2 * f1 - 8 * b + 16 * m for f0, f1, b, m in columns),
        )

    def weights_at(self, x: float) -> list[float]:
        """The interpolant's weights at x in [0, 1]."""
        return [
            x * (a + x * (b + x * (c + x * d)))
            for a, b, c, d in zip(*self.interpolant, strict=True)
        ]


# Fixed step -------------------------------------------------------------------------------------

EULER = Tableau("Euler", 1, (), (), (1.0,))
MIDPOINT = Tableau("Midpoint", 2, (1 / 2,), ((1 / 2,),), (0.0, 1.0))
HEUN2 = Tableau("Heun2", 2, (1.0,), ((1.0,),), (1 / 2, 1 / 2))
HEUN3 = Tableau("Heun3", 3, (1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
# Kutta's 3/8 rule: a smaller error than the classic rule's for the same four stages.
RK4 = Tableau(
    "RK4",
    4,
    (1 / 3, 2 / 3, 1.0),
    ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
)

FIXED = {"euler": EULER, "midpoint": MIDPOINT, "heun2": HEUN2, "heun3": HEUN3, "rk4": RK4}
"""The methods that have no error estimate, by name."""

# Embedded pairs ---------------------------------------------------------------------------------


def _hermite_middle(solution: Row) -> Row:
    """(y + y₁)/2 + dt/8·(k_first - k_last): the cubic's, where a method has no better one."""
    ends = (1 / 8, *(0.0 for _ in solution[2:]), -1 / 8)
    return tuple(b / 2 + end for b, end in zip(solution, ends, strict=True))


ADAPTIVE_HEUN = Tableau(
    "AdaptiveHeunSolver", 2, (1.0,), ((1.0,),), (0.5, 0.5), error=(0.5, -0.5), middle=(0.5, 0.0)
)

# Fehlberg 1969, RKF1(2).
FEHLBERG2 = Tableau(
    "Fehlberg2",
    2,
    (1 / 2, 1.0),
    ((1 / 2,), (1 / 256, 255 / 256)),
    (1 / 512, 255 / 256, 1 / 512),
    error=(-1 / 512, 0.0, 1 / 512),
    middle=_hermite_middle((1 / 512, 255 / 256, 1 / 512)),
)

# Bogacki and Shampine 1989.
BOSH3 = Tableau(
    "Bosh3Solver",
    3,
    (1 / 2, 3 / 4, 1.0),
    ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    middle=_hermite_middle((2 / 9, 1 / 3, 4 / 9, 0.0)),
)

# Dormand and Prince 1980; the middle is Shampine's (1986).
DOPRI5 = Tableau(
    "Dopri5Solver",
    5,
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    error=(
        35 / 384 - 1951 / 21600,
        0.0,
        500 / 1113 - 22642 / 50085,
        125 / 192 - 451 / 720,
        -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300,
        -1 / 60,
    ),
    middle=(
        6025192743 / 30085553152 / 2,
        0.0,
        51252292925 / 65400821598 / 2,
        -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2,
        -1776094331 / 19743644256 / 2,
        11237099 / 235043384 / 2,
    ),
)

_TSIT5_SOLUTION = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)

# Tsitouras 2011. Its free interpolant is a quartic, C¹ across steps: its value in the middle says
# all that the ends do not.
TSIT5 = Tableau(
    "Tsit5Solver",
    5,
    (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (
            5.86145544294642,
            -12.92096931784711,
            8.159367898576159,
            -0.071584973281401,
            -0.028269050394068383,
        ),
        _TSIT5_SOLUTION,
    ),
    (*_TSIT5_SOLUTION, 0.0),
    error=(
        -0.0017800110522257714,
        -0.0008164344596567469,
        0.007880878010261996,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    middle=(
        0.10741235230096058,
        0.011356250000030689,
        0.3956090305604209,
        -0.3447521435257924,
        1.3161853649576518,
        -1.0170608542932558,
        0.031249999999984134,
    ),
)

# Prince and Dormand 1981, RK8(7)13M.
_DOPRI8_SOLUTION = (
    14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731,
    561292985 / 797845732, -1041891430 / 1371343529, 760417239 / 1151165299,
    118820643 / 751138087, -528747749 / 2220607170, 1 / 4,
)  # fmt: skip
_DOPRI8_SEVENTH = (
    13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321,
    656045339 / 265891186, -3867574721 / 1518517206, 465885868 / 322736535,
    53011238 / 667516719, 2 / 45, 0.0,
)  # fmt: skip
DOPRI8 = Tableau(
    "Dopri8Solver",
    8,
    (1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
     1201146811 / 1299019798, 1.0, 1.0, 1.0),
    (
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000,
         23124283 / 1800000000),
        (16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777,
         545815736 / 2771057229, -180193667 / 1043307555),
        (39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301,
         100302831 / 723423059, 790204164 / 839813087, 800635310 / 3783071287),
        (246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803,
         -12992083 / 490766935, 6005943493 / 2108947869, 393006217 / 1396673457,
         123872331 / 1001029789),
        (-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823,
         -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649,
         -45442868181 / 3398467696, 3065993473 / 597172653),
        (185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517,
         -703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563,
         -4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083),
        (403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805,
         652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034,
         3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0.0),
        _DOPRI8_SOLUTION,
    ),
    (*_DOPRI8_SOLUTION, 0.0),
    error=(*(b - c for b, c in zip(_DOPRI8_SOLUTION, _DOPRI8_SEVENTH, strict=True)), 0.0),
    middle=(
        0.04103130360739393, 0.0, 0.0, 0.0, 0.0, 0.05100562801991382, 0.2388930677412202,
        0.3096870143996103, -0.2172325471755352, 0.07833405679331928, -0.0018614369715579948,
        0.007072844202678841, 0.00690847373200576, -0.013838404349047373,
    ),
)  # fmt: skip
