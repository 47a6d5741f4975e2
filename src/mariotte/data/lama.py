"""LAMA's facts and templates, and ParaRel's paraphrases, as they lie in ``MARIOTTE_DATA/lama`` and ``.../pararel``.

The files are those that were published: ``TREx/P19.jsonl``, ``Google_RE/place_of_birth_test.jsonl``,
``Squad/test.jsonl``, ``ConceptNet/test.jsonl``, ``relations.jsonl``, ``common_vocab_cased.txt`` in ``lama``, and
``patterns/P19.jsonl`` in ``pararel``. Their licence forbids handing them on: nothing here contains any of them.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mariotte.errors import DataError

SUBSETS = ("trex", "google_re", "squad", "conceptnet")
"""As LAMA names its four parts."""

SUBJECT, ANSWER, MASK = "[X]", "[Y]", "[MASK]"

TREX = tuple(
    f"P{number}"
    for number in (
        *(17, 19, 20, 27, 30, 31, 36, 37, 39, 47, 101, 103, 106, 108, 127, 131, 136, 138, 140, 159, 176),
        *(178, 190, 264, 276, 279, 361, 364, 407, 413, 449, 463, 495, 527, 530, 740, 937, 1001, 1303, 1376, 1412),
    )
)
"""The 41 relations of LAMA's T-REx."""

GOOGLE_RE: Mapping[str, str] = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}
"""The three relations of Google-RE with the templates of LAMA's own program, which no data file states."""

WHOLE: Mapping[str, str] = {"squad": "Squad", "conceptnet": "ConceptNet"}
"""Subsets of sentences in one file, ``test.jsonl`` in this folder: each fact brings its own masked sentence."""


@dataclass(frozen=True)
class Probe:
    """One fact with the sentence that asks for it.

    Parameters
    ----------
    id : readable and unique: subset, relation, subject, answer
    before, after : the text around the answer
    answer : what is true
    subject : what it is true of; empty where it is not told
    """

    id: str
    before: str
    after: str
    answer: str
    subject: str = ""

    def sentence(self, filler: str) -> str:
        """The text with something in the place of the answer."""
        return f"{self.before}{filler}{self.after}"


@dataclass(frozen=True)
class Relation:
    """What is asked of one relation.

    Parameters
    ----------
    subset, name : as LAMA calls them
    pairs : subject, answer and own sentence, None where the relation's template makes it; each once
    templates : LAMA's, then ParaRel's in their order; none for a subset whose facts bring their sentences
    """

    subset: str
    name: str
    pairs: tuple[tuple[str, str, str | None], ...]
    templates: tuple[str, ...]

    @property
    def label(self) -> str:
        """The subset and the name."""
        return self.subset if self.name == self.subset else f"{self.subset}/{self.name}"

    @property
    def answers(self) -> tuple[str, ...]:
        """Every answer of the relation, each once, sorted."""
        return tuple(sorted({answer for _, answer, _ in self.pairs}))

    def probes(self, pairs: Sequence[tuple[str, str, str | None]], template: str | None) -> list[Probe]:
        """Facts in the words of a template, or in their own."""
        found: list[Probe] = []
        for subject, answer, own in pairs:
            # The slot of the answer first: a subject may hold anything, "[Y]" too.
            before, after = (own or "").split(MASK) if template is None else template.split(ANSWER)
            if template is not None:
                before, after = before.replace(SUBJECT, subject), after.replace(SUBJECT, subject)
            name = subject if own is None else before.strip()
            found.append(Probe(f"{self.label}/{name}/{answer}", before, after, answer, subject))
        return found


@dataclass(frozen=True)
class Subset:
    """A part of LAMA: the relations that are here, and the names of those that are not."""

    name: str
    relations: tuple[Relation, ...]
    missing: tuple[str, ...]


def home(*parts: str) -> Path:
    """A path in ``MARIOTTE_DATA``.

    Raises
    ------
    DataError
        When the variable is not set.
    """
    root = os.environ.get("MARIOTTE_DATA")
    if not root:
        raise DataError(
            "LAMA is read from MARIOTTE_DATA/lama, and MARIOTTE_DATA is not set: point it to the folder that holds lama"
        )
    return Path(root, *parts)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}): put LAMA's file there") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} must be a JSON object, and cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} must be a JSON object, got {type(row).__name__}: correct the line")
        yield cast("dict[str, Any]", row)


def _text(row: Mapping[str, Any], key: str, path: Path) -> str:
    found = row.get(key)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"every row of {path} must have {key!r} as text, got {found!r}: correct or leave out the row")
    return found


def _checked(template: str, relation: str, path: Path | str) -> str:
    if template.count(SUBJECT) != 1 or template.count(ANSWER) != 1:
        raise DataError(
            f"a template must hold {SUBJECT} and {ANSWER} once each, got {template!r} for {relation} in {path}: "
            "correct it"
        )
    return template


def _templates(wanted: Sequence[str]) -> dict[str, str]:
    path = home("lama", "relations.jsonl")
    if not path.is_file():
        raise DataError(f"LAMA's templates must be in {path}, and there is no such file: put relations.jsonl there")
    found = {_text(row, "relation", path): str(row.get("template") or "") for row in _rows(path)}
    return {name: _checked(found[name], name, path) for name in wanted if name in found}


def _paraphrases(name: str, template: str) -> Iterator[str]:
    """ParaRel's patterns of a relation but the one that is LAMA's own template; none where it has no file."""
    path = home("pararel", "patterns", f"{name}.jsonl")
    if not path.is_file():
        return
    known = {"".join(template.split())}
    for row in _rows(path):
        pattern = _checked(_text(row, "pattern", path), name, path)
        if (squeezed := "".join(pattern.split())) not in known:
            known.add(squeezed)
            yield pattern


def path(subset: str, name: str) -> Path:
    """Where the facts of a relation must be."""
    match subset:
        case "trex":
            return home("lama", "TREx", f"{name}.jsonl")
        case "google_re":
            return home("lama", "Google_RE", f"{name}_test.jsonl")
        case _:
            return home("lama", WHOLE[subset], "test.jsonl")


def names(subset: str) -> tuple[str, ...]:
    """The relations of a subset as they were published; a subset of sentences counts as one."""
    return {"trex": TREX, "google_re": tuple(GOOGLE_RE)}.get(subset, (subset,))


def find(subset: str, relations: Sequence[str] | None = None) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Where the files of a subset are, and the names of the relations that have none.

    Parameters
    ----------
    relations : those wanted; None takes all that are here

    Raises
    ------
    DataError
        When a relation that is wanted, or every one of the subset, is missing.
    """
    known = names(subset)
    paths = {name: path(subset, name) for name in known if relations is None or name in relations}
    missing = tuple(name for name, path in paths.items() if not path.is_file())
    if missing and relations is not None:
        raise DataError(
            f"the relation {missing[0]} of LAMA must be in {paths[missing[0]]}, and there is no such file: "
            "put it there or leave the relation out"
        )
    return {name: path for name, path in paths.items() if name not in missing}, missing


@functools.lru_cache(maxsize=8)
def _read(subset: str, paths: tuple[tuple[str, Path, int], ...], root: str) -> tuple[Relation, ...]:
    del root
    found: list[Relation] = []
    templates = _templates([name for name, *_ in paths]) if subset == "trex" else dict(GOOGLE_RE)
    for name, path, _ in paths:
        if subset in WHOLE:
            found += _sentences(subset, path)
            continue
        if name not in templates:
            raise DataError(f"LAMA's relations.jsonl must have a template for {name}, and has none: add it")
        pairs = {(_text(row, "sub_label", path), _text(row, "obj_label", path), None): None for row in _rows(path)}
        _refuse_empty(pairs, path)
        written = [templates[name], *(_paraphrases(name, templates[name]) if subset == "trex" else ())]
        found.append(Relation(subset, name, tuple(pairs), tuple(written)))
    return tuple(found)


def _refuse_empty(pairs: Mapping[Any, Any], path: Path) -> None:
    if not pairs:
        raise DataError(f"a relation must have at least one fact, and {path} has none: put LAMA's file there")


def _sentences(subset: str, path: Path) -> Iterator[Relation]:
    """Facts that bring their sentences, by relation where a row names one."""
    groups: defaultdict[str, dict[tuple[str, str, str | None], None]] = defaultdict(dict)
    for row in _rows(path):
        masked = row.get("masked_sentences")
        text = " ".join(cast("list[str]", masked)) if isinstance(masked, list) else str(masked)
        if text.count(MASK) != 1:
            raise DataError(f"masked_sentences must hold {MASK} once, got {text!r} in {path}: correct the row")
        groups[str(row.get("pred") or subset)][str(row.get("sub_label") or ""), _text(row, "obj_label", path), text] = (
            None
        )
    _refuse_empty(groups, path)
    for name, pairs in sorted(groups.items()):
        yield Relation(subset, name, tuple(pairs), ())


def read(subset: str, relations: Sequence[str] | None = None) -> Subset:
    """A part of LAMA, read once a process while its files stay as they are.

    Parameters
    ----------
    subset : one of `SUBSETS`
    relations : only these; None takes all that are here and names the others as missing

    Raises
    ------
    DataError
        When a file that is wanted is missing, empty or malformed, or a template lacks a slot.
    """
    paths, missing = find(subset, relations)
    stamped = tuple((name, path, path.stat().st_mtime_ns) for name, path in paths.items())
    return Subset(subset, _read(subset, stamped, str(home())), missing)


def common_vocabulary() -> tuple[str, ...]:
    """The words that LAMA's models have in common, which it ranks answers among.

    Raises
    ------
    DataError
        When the file is missing or empty.
    """
    path = home("lama", "common_vocab_cased.txt")
    if not path.is_file():
        raise DataError(f"LAMA's common vocabulary must be in {path}, and there is no such file: put it there")
    words = tuple(dict.fromkeys(line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()))
    if not words:
        raise DataError(f"LAMA's common vocabulary must hold at least one word, and {path} holds none: put it there")
    return words
