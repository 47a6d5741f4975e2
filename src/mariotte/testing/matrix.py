"""Which method works on which family, and why not on the others: asked of every method, on every tiny model.

``python -m mariotte.testing.matrix`` prints the page ``docs/families.md``. A method that claims a family here is tried
on it by the conformance suite (`mariotte.testing.methods`), and a test compares the page with what the code says now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from mariotte.architectures import FAMILIES, Architecture
from mariotte.compress import METHODS
from mariotte.models.model import Model
from mariotte.models.step import Step
from mariotte.testing.tiny import to_ask

PLAIN, OWN, REFUSED = "●", "○", "·"
"""An ordinary checkpoint of the family; one of a class of ours, which goes beside the weights; refused by name."""

GROUPS = {
    "Smaller models": ("width", "slice", "depth", "low-rank"),
    "Weights set to zero": ("unstructured",),
    "Fewer bits": ("quantization",),
}
"""Tables of the page, by the families of methods that stand in each."""

HEAD = f"""# Methods and families

Which method works on which family of models. {PLAIN} gives an ordinary checkpoint, which transformers loads without
Mariotte; {OWN} one whose class goes beside the weights, which transformers loads with `trust_remote_code=True` (for
`int8-dynamic`: with `import mariotte.models.dynamic`); {REFUSED} is refused by name, for the reason below. Asked of the
default fields and scope of each method; other fields can make a result plain, or be refused where the defaults are not.
So can other sizes: of eight blocks and more `llm-pruner` spares some, and its result is {OWN}.

`int4` needs an NVIDIA GPU, and is refused where there is none; of it the suite tries, on any machine, all but the GPU's
own kernel.

This page is what `python -m mariotte.testing.matrix` prints. The conformance suite tries every {PLAIN} and {OWN} on a
tiny random model of the family, and a test compares this page with the code.
"""


def steps() -> list[Step]:
    """Every method of the catalogue with its default fields."""
    return [cast("type[Step]", METHODS.find(name))() for name in METHODS.names()]


def cell(step: Step, model: Model) -> tuple[str, str]:
    """What a method makes of a family, one of the three marks, and the reason where it refuses it."""
    if reason := step.refuse(model):
        return REFUSED, reason.replace(model.name, "the model")
    return (PLAIN if step.makes_plain(model) else OWN), ""


def kind(entry: Architecture) -> str:
    """What a family is, in the words of the page."""
    if entry.kind == "causal":
        return "mixture" if entry.experts else "decoder"
    return {"masked": "encoder", "seq2seq": "encoder-decoder"}[entry.kind]


def page(families: Sequence[str] = tuple(FAMILIES), methods: Iterable[Step] | None = None) -> str:
    """The page: a table for each group of methods, and the reasons of what is refused.

    Parameters
    ----------
    families : those that are asked, rows in this order
    methods : those that are asked; None takes all
    """
    asked = sorted(steps() if methods is None else methods, key=lambda step: step.name())
    kinds = list(dict.fromkeys(kind(FAMILIES[family]) for family in families))
    order = sorted(families, key=lambda family: kinds.index(kind(FAMILIES[family])))
    found = {(step.name(), family): cell(step, to_ask(family, step)) for step in asked for family in order}
    parts = [HEAD]
    for title, of in GROUPS.items():
        names = [step.name() for step in asked if step.family in of]
        if not names:
            continue
        lines = [
            f"\n## {title}\n",
            f"| | | {' | '.join(names)} |",
            f"|---|---|{':-:|' * len(names)}",
            *(
                f"| `{family}` | {kind(FAMILIES[family])} | {' | '.join(found[name, family][0] for name in names)} |"
                for family in order
            ),
        ]
        parts.append("\n".join(lines) + "\n")
    parts.append("\n## Why not\n")
    for step in asked:
        # The same reason in other families' names is the same reason.
        reasons: dict[str, list[str]] = {}
        for family in order:
            mark, reason = found[step.name(), family]
            if mark == REFUSED:
                reasons.setdefault(reason.replace(family, "it"), []).append(family)
        if reasons:
            told = [f"    * {', '.join(f'`{f}`' for f in some)}: {reason}" for reason, some in reasons.items()]
            parts.append(f"* `{step.name()}`\n" + "\n".join(told) + "\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


if __name__ == "__main__":
    print(page(), end="")
