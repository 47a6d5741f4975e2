"""What the classes say of every method and recovery, written into its page.

python docs/generate.py [--check]

A page is ``docs/methods/<name>.md``: advice written by hand around two generated blocks, ``head`` and ``details``. What
stands between their marks comes from the class, its docstring, ``references.bib``, and from tiny random models of every
family that are asked whether the method refuses them. A page that does not exist is begun. With --check nothing is
written, and pages that are stale or missing are named; ``tests/test_method_pages.py`` does the same.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

import mariotte
from mariotte import architectures
from mariotte.experiments.identity import find_step, step_names
from mariotte.models.model import Model
from mariotte.models.step import Step, prepare_once
from mariotte.testing.methods import context_of, middle, reads_text
from mariotte.testing.tiny import to_ask

PAGES = Path(__file__).parent / "methods"
BIBLIOGRAPHY = Path(inspect.getfile(mariotte)).parent / "references.bib"

OPEN, CLOSE = "<!-- generated: {} (python docs/generate.py) -->", "<!-- end of what is generated -->"

BY_HAND = ("When to use it", "What it costs", "What we measured", "Pitfalls")
"""Sections that every page has, written by people."""

UNITS: Mapping[str, str] = {
    "neurons": "share of the feed-forward neurons of each block",
    "hidden": "share of the hidden size",
    "blocks": "share of the blocks",
    "heads": "share of the query heads",
    "experts": "share of the experts of each block",
    "weights": "share of the weights in scope",
    "bits": "bits a weight",
    "tokens": "tokens seen",
    "parameters": "share of the dense model's parameters",
}
"""What an amount counts, by unit."""


def methods() -> dict[str, type[Step]]:
    """The methods and recoveries of this package by name; those of installed plug-ins have pages elsewhere."""
    found = {name: find_step(name) for name in step_names()}
    return {name: kind for name, kind in found.items() if kind.__module__.startswith("mariotte.")}


def _tiny(step: Step, family: str) -> Model:
    return to_ask(family, step, tied=True)


@functools.cache
def references() -> dict[str, str]:
    """Author, title and year of every source, as Markdown, by key."""
    text = BIBLIOGRAPHY.read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for key, entry in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", text, flags=re.M | re.S):
        fields = {
            name: re.sub(r"\\\W*", "", value).replace("{", "").replace("}", "")
            for name, value in re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", entry, flags=re.M)
        }
        people = [person.partition(",")[0].strip() for person in fields.get("author", "").split(" and ")]
        who = people[0] + (" and others" if len(people) > 2 else f" and {people[1]}" if len(people) == 2 else "")
        said = f"{who}{', ' * bool(who)}*{fields['title']}*, {fields.get('year', 'no year')}"
        url = fields.get("url") or (f"https://arxiv.org/abs/{fields['eprint']}" if "eprint" in fields else "")
        found[key] = f"[{said}]({url})" if url else said
    return found


# -- what docstrings say ----------------------------------------------------------------------------------------------


def sections(kind: type) -> dict[str, str]:
    """The parts of a docstring: ``summary``, and what is under each heading."""
    lines = inspect.cleandoc(kind.__doc__ or "").splitlines()
    heads = [i for i in range(1, len(lines)) if re.fullmatch(r"-{3,}", lines[i]) and lines[i - 1].strip()]
    ends = [*(i - 1 for i in heads), len(lines)]
    found = {"summary": "\n".join(lines[: ends[0]]).strip()}
    for place, line in enumerate(heads):
        found[lines[line - 1].strip()] = "\n".join(lines[line + 1 : ends[place + 1]]).strip()
    return found


def markdown(text: str, of: str) -> str:
    """A text of the docstring of a method as Markdown: one kind of code, sources and other methods as links."""
    names = set(methods()) - {of}
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"\[(\w+)\]_", lambda m: references().get(m.group(1), m.group(0)), text)
    text = re.sub(r"(?<![`\[\w])`([a-z0-9-]+)`", lambda m: _linked(m.group(1), names), text)
    return text.replace("see Notes", "see above").replace("<", "&lt;")


def _linked(name: str, names: set[str]) -> str:
    return f"[`{name}`]({name}.md)" if name in names else f"`{name}`"


def told_of_fields(kind: type[Step]) -> dict[str, str]:
    """What docstrings say of fields, a class's own before those that it comes from."""
    found: dict[str, str] = {}
    for one in kind.__mro__:
        if "__doc__" not in vars(one):
            continue
        for names, said in re.findall(
            r"^([\w, ]+?) : (.*(?:\n[ ]+.*)*)", sections(one).get("Parameters", ""), flags=re.M
        ):
            text = " ".join(said.split())
            for name in names.split(","):
                if not text.startswith("see `"):
                    found.setdefault(name.strip(), text)
    return found


# -- blocks -----------------------------------------------------------------------------------------------------------


def head(name: str, kind: type[Step]) -> str:
    """What the method is, in a line and a table."""
    step = kind()
    recovery = kind.family == "recovery"
    plain = sorted({step.makes_plain(_tiny(step, family)) for family in works_on(step)})
    with tempfile.TemporaryDirectory() as folder:
        reads = not recovery and reads_text(step, _tiny(step, works_on(step)[0]), Path(folder))
    text = "trains on it" if recovery else "yes" if reads else "no"
    amount = f"none: write `{name}`" if kind.fixed is not None else UNITS.get(kind.unit, kind.unit)
    if kind.removes is not Step.removes:
        amount += "; with `of=model`, share of the dense model's parameters"
    result = {
        (True,): "an ordinary transformers checkpoint of the same family",
        (False,): "no ordinary checkpoint: `mariotte.load` reads it, and its card says what transformers needs for it",
    }.get(tuple(plain), "an ordinary checkpoint of some families, a class of ours of others, see below")
    rows = [
        ("Amount", amount),
        ("Pruning family", kind.family),
        ("Scopes", ", ".join(f"`{scope}`" for scope in kind.scopes)),
        ("Looks at text", text),
        ("Prepared", prepared(step)),
        ("Result", result),
        ("Models larger than memory", "a few blocks at a time" if kind.streams else "no: the whole model in memory"),
        *_device(step),
        ("Source", references()[kind.reference] if kind.reference else "ours"),
    ]
    return "\n".join(
        [
            f"# `{name}`",
            "",
            markdown(sections(kind)["summary"], name),
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {said} |" for what, said in rows),
        ]
    )


def _device(step: Step) -> list[tuple[str, str]]:
    reason = step.refuse_device(torch.device("cpu"))
    return [] if reason is None else [("Device", reason.split(", and this ")[0])]


def prepared(step: Step) -> str:
    """What one preparation serves, found by making one."""
    kind = type(step)
    if kind.family == "recovery":
        return "one trunk for all D of a cut on one text; each D leaves it for a decay of its own"
    with tempfile.TemporaryDirectory() as folder:
        model = _tiny(step, works_on(step)[0])
        context = context_of(model, Path(folder) / "p")
        made = prepare_once(step, model, context, [middle(step) if step.fixed is None else step.fixed])
        kept = any(path.suffix == ".safetensors" for path in made.folder.rglob("*"))
        kept = kept or any(isinstance(fact, list | dict) and fact for fact in made.facts.values())
    if not kept:
        return "nothing: all work is done when it is applied"
    if kind.covers is not Step.covers:
        return "once, as far as the amounts asked for need it; for more it goes on"
    return "once, for all amounts"


def works_on(step: Step) -> list[str]:
    """Families of which a tiny model is not refused."""
    return [family for family in architectures.FAMILIES if step.refuse(_tiny(step, family)) is None]


def details(name: str, kind: type[Step]) -> str:
    """How it works, its fields, and the families it works on, with the reason where it does not."""
    parts = sections(kind)
    found: list[str] = []
    if notes := parts.get("Notes"):
        found += ["## How it works", "", markdown(notes, name), ""]
    told = told_of_fields(kind)
    fields = [f for f in dataclasses.fields(kind) if f.name not in ("scope", "of")]
    if fields:
        found += ["## Fields", "", "| field | type | default | |", "|---|---|---|---|"]
        for field in fields:
            kind_of = str(field.type).replace(" | None", "").replace("|", "or")
            default = (
                ""
                if field.default is None
                else f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
            )
            assert field.name in told, f"{name}: the docstring does not say what {field.name} is"
            said = markdown(told[field.name], name).replace("|", "\\|")
            found.append(f"| `{field.name}` | {kind_of} | {default} | {said} |")
        found.append("")
    found += ["## Families", ""]
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for scope in kind.scopes:
        alike.setdefault(tuple(_reasons(kind(scope=scope)).items()), []).append(f"`{scope}`")
    for refused, scopes in alike.items():
        where = f" in the scope{'s' * (len(scopes) > 1)} {', '.join(scopes)}" if len(alike) > 1 else ""
        taken = [family for family in architectures.FAMILIES if family not in dict(refused)]
        found += [f"Works{where} on {'' if refused else 'all: '}{_named(taken)}.", ""]
        reasons: dict[str, list[str]] = {}
        for family, reason in refused:
            reasons.setdefault(reason, []).append(family)
        if reasons:
            found += ["| refused | since it |", "|---|---|"]
            found += [f"| {_named(families)} | {markdown(reason, name)} |" for reason, families in reasons.items()]
            found.append("")
    step = kind()
    ours = [family for family in works_on(step) if not step.makes_plain(_tiny(step, family))]
    if ours and len(ours) < len(works_on(step)):
        found += [f"The result is an ordinary checkpoint, but of {_named(ours)} a class of ours.", ""]
    return "\n".join(found).rstrip()


def _named(families: Iterable[str]) -> str:
    return ", ".join(f"`{family}`" for family in families) or "none"


def _reasons(step: Step) -> dict[str, str]:
    """Why families are refused, with the family's name left out, so that equal reasons are equal."""
    found: dict[str, str] = {}
    for family in architectures.FAMILIES:
        reason = step.refuse(_tiny(step, family))
        if reason is not None:
            clause = re.split(r": (?=take |compress |do |put |use )", reason)[0]
            clause = re.sub(rf"\bthis {re.escape(family)}\b", "the model", clause)
            found[family] = re.sub(rf"\b(?:tiny-)?{re.escape(family)}\b", "the family", clause)
    return found


# -- pages ------------------------------------------------------------------------------------------------------------


def page(name: str, kind: type[Step], before: str | None) -> str:
    """A page with its generated blocks as they are now; one that does not exist is begun."""
    blocks = {"head": head(name, kind), "details": details(name, kind)}
    if before is None:
        by_hand = "\n\n".join(f"## {title}\n\nTo be written." for title in BY_HAND)
        before = f"{OPEN.format('head')}\n{CLOSE}\n\n{by_hand}\n\n{OPEN.format('details')}\n{CLOSE}\n"
    for block, text in blocks.items():
        pattern = re.escape(OPEN.format(block)) + r"\n.*?" + re.escape(CLOSE)
        if len(re.findall(pattern, before, flags=re.S)) != 1:
            raise SystemExit(f"docs/methods/{name}.md needs one block {OPEN.format(block)} ... {CLOSE}")
        made = f"{OPEN.format(block)}\n{text}\n{CLOSE}"
        before = re.sub(pattern, lambda _, made=made: made, before, flags=re.S)
    return before


def stale() -> dict[str, str]:
    """What pages should be, by file name, of those that are otherwise or missing; empty where one is too many."""
    found: dict[str, str] = {}
    known = methods()
    for name, kind in known.items():
        file = PAGES / f"{name}.md"
        before = file.read_text(encoding="utf-8") if file.is_file() else None
        if (now := page(name, kind, before)) != before:
            found[file.name] = now
    found |= {file.name: "" for file in PAGES.glob("*.md") if file.stem not in known}
    return found


def main() -> None:
    """Write what is stale, or with --check name it."""
    found = stale()
    if sys.argv[1:] == ["--check"]:
        if found:
            raise SystemExit(f"stale or missing: {', '.join(sorted(found))}; run python docs/generate.py")
        return
    for name, text in found.items():
        if not text:
            raise SystemExit(f"docs/methods/{name} is of no method: remove it, or name the method")
        (PAGES / name).write_text(text, encoding="utf-8")
        print(f"docs/methods/{name}")


if __name__ == "__main__":
    main()
