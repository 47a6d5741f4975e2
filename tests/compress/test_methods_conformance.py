"""Every method of the catalogue on two families, its variants on one, and some methods on families of other kinds."""

import pytest

from mariotte.compress import METHODS
from mariotte.compress.methods.expert_ffn import ExpertFFN
from mariotte.compress.methods.experts import Experts
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.gptq import GPTQ
from mariotte.compress.methods.heads import Heads
from mariotte.compress.methods.int4 import Int4
from mariotte.compress.methods.int8_dynamic import Int8Dynamic
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
    *cases([SparseGPT()], ["opt", "gpt2"]),
    *cases([GPTQ(), Wanda(), Int8Dynamic()], ["gpt_oss"]),
    *cases([SparseGPT()], ["mixtral", "albert"]),
    *cases([GPTQ()], ["bert"]),
    *cases([Heads()], ["gpt2", "falcon", "olmo2"]),
    *cases([Heads(), FFN()], ["phi3"]),
    *cases([Experts(), ExpertFFN()], ["mixtral", "gpt_oss"]),
    *cases([ShortGPT(), Heads(), Magnitude()], ["gpt_oss"]),
]


@pytest.mark.parametrize(("step", "family"), CASES, ids=lambda v: v if isinstance(v, str) else str(v.link()))
class TestMethods(MethodConformance):
    pass


WHOLE = [step for step in all_steps() if step.scope == step.scopes[0]]
PARTS = [step for step in all_steps() if step.scope != step.scopes[0]]
LIKE_LLAMA = ("mistral", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "phi", "mixtral", "qwen3_moe")
"""Where a part of the model is what it is in Llama, or in another family that is tried anyway."""


@pytest.mark.parametrize(
    ("step", "family"),
    [
        *cases(WHOLE, OTHER_FAMILIES, wide=True),
        *cases(PARTS, [family for family in OTHER_FAMILIES if family not in LIKE_LLAMA], wide=True),
        *cases([Int4()], ["llama", "qwen2"], wide=True),
    ],
    ids=lambda v: v if isinstance(v, str) else str(v.link()),
)
class TestFamilies(FamilyConformance):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "family"), cases(PARTS, LIKE_LLAMA, wide=True), ids=lambda v: v if isinstance(v, str) else str(v.link())
)
class TestPartsOfFamilies(FamilyConformance):
    pass
