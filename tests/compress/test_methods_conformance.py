"""Every method of the catalogue on two families, its variants on one, and some methods on families of other kinds."""

import pytest

from mariotte.compress import METHODS
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.magnitude import Magnitude
from mariotte.compress.methods.shortgpt import ShortGPT
from mariotte.compress.methods.slice import Slice
from mariotte.compress.methods.sparsegpt import SparseGPT
from mariotte.compress.methods.wanda import Wanda
from mariotte.testing.methods import OTHER_FAMILIES, FamilyConformance, MethodConformance, all_steps, cases

CASES = [
    *cases(METHODS.find(name)() for name in METHODS.names()),
    *cases([step for step in all_steps() if step.scope != step.scopes[0]], ["llama"]),
    *cases([FFN(criterion="activation"), Slice(compensate=False), Magnitude(per="layer")], ["qwen2"]),
    *cases([FFN(criterion="norm", compensate=False)], ["llama"]),
    # Families of other kinds: what works on all of them on each, what works on some on the one most unlike Llama.
    *cases([Magnitude()], ["gpt2", "opt", "bert", "albert", "t5", "bart"]),
    *cases([FFN(), ShortGPT(), Wanda()], ["gpt_neox"]),
    *cases([SparseGPT()], ["opt"]),
]


@pytest.mark.parametrize(("step", "family"), CASES, ids=lambda v: v if isinstance(v, str) else str(v.link()))
class TestMethods(MethodConformance):
    pass


@pytest.mark.parametrize(
    ("step", "family"),
    cases(all_steps(), OTHER_FAMILIES),
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestFamilies(FamilyConformance):
    pass
