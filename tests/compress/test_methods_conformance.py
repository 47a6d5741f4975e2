"""Every method of the catalogue on every family that it does not refuse, and its variants on one family each."""

import pytest

from mariotte.compress import METHODS
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.slice import Slice
from mariotte.testing.methods import MethodConformance, all_steps, cases

CASES = [
    *cases(METHODS.find(name)() for name in METHODS.names()),
    *cases([step for step in all_steps() if step.scope != step.scopes[0]], ["llama"]),
    *cases([FFN(criterion="activation"), Slice(compensate=False), Magnitude(per="layer")], ["qwen2"]),
    *cases([FFN(criterion="norm", compensate=False)], ["llama"]),
]


@pytest.mark.parametrize(("step", "family"), CASES, ids=lambda v: v if isinstance(v, str) else str(v.link()))
class TestMethods(MethodConformance):
    pass
