"""What a table's own words say where its columns do not: a method's pruning family, a task's chance."""

from __future__ import annotations

import re
from collections.abc import Mapping

# In this order: "Wanda-sp" prunes structures, "Wanda" weights; "SparseGPT" is no "GPTQ".
_FAMILIES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("quantization", re.compile(r"^[^+]*(gguf|gptq|awq|qlora|int8\(\)|smothquant|smoothquant|\brtn)[^+]*$")),
    ("depth", re.compile(r"shortened|sleb|shortgpt|laco|block ?drop|layer ?drop|depth")),
    ("slice", re.compile(r"slicegpt|\bslice\b")),
    ("low-rank", re.compile(r"svd|low[- _]?rank")),
    ("width", re.compile(r"llm[-_ ]?pruner|flap|wanda-sp|glu width|prunenet|neuron|width")),
    ("mixed", re.compile(r"minitron|puzzletron")),
    ("unstructured", re.compile(r"wanda|sparsegpt|magnitude|\bria\b|dsnot|admm|besa|\bowl\b|pruner-zero|unstructured")),
)

_TWO, _FOUR = 0.5, 0.25

CHANCES: Mapping[str, float] = {
    **dict.fromkeys(("boolq", "piqa", "winogrande", "rte", "copa", "wsc", "wic"), _TWO),
    **dict.fromkeys(("arc_c", "arc_e", "arc_challenge", "arc_easy", "hellaswag", "obqa", "openbookqa", "mmlu"), _FOUR),
    "gpqa": _FOUR,
    "mmlu_pro": 0.1,
    # The seven of LLM-Pruner: BoolQ, PIQA, WinoGrande; HellaSwag, ARC-e, ARC-c, OpenBookQA.
    "avg7": round((3 * _TWO + 4 * _FOUR) / 7, 6),
    # The five of SliceGPT: PIQA, WinoGrande; HellaSwag, ARC-e, ARC-c.
    "avg5": round((2 * _TWO + 3 * _FOUR) / 5, 6),
    "avg5_piqa_hs_arce_boolq_rte": round((3 * _TWO + 2 * _FOUR) / 5, 6),
}
"""Scores of a guesser at tasks with a fixed number of answers, and at averages that papers name so."""


def family_of(method: str) -> str | None:
    """The pruning family that a published method's name tells; None where it tells none.

    >>> family_of("SliceGPT (calib Alpaca)"), family_of("Wanda-sp"), family_of("Wanda"), family_of("ours")
    ('slice', 'width', 'unstructured', None)
    """
    name = method.lower().replace("llm_pruner", "llm-pruner")
    return next((family for family, words in _FAMILIES if words.search(name)), None)


def chance_of(metric: str) -> float | None:
    """The score of a guesser at a task, by its name; None for one that is not known.

    >>> chance_of("piqa_norm"), chance_of("mmlu"), chance_of("top1")
    (0.5, 0.25, None)
    """
    name = metric.lower()
    return CHANCES.get(name, CHANCES.get(re.sub(r"(_acc)?(_norm)?$", "", name)))
