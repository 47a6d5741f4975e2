"""Every method of the catalogue on every family that it does not refuse."""

import pytest

from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.testing.methods import MethodConformance, all_steps, cases

VARIANTS = [
    *all_steps(),
    FFN(criterion="activation"),
    FFN(criterion="norm", compensate=False),
    Magnitude(per="layer"),
]


@pytest.mark.parametrize(("step", "family"), cases(VARIANTS), ids=lambda v: v if isinstance(v, str) else str(v.link()))
class TestMethods(MethodConformance):
    pass
