"""Facts kept, lost and gained: for a record, for people and as a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from mariotte.errors import DataError
from mariotte.evaluate.base import Measure, Measurement
from mariotte.models.model import Model

Outcome = Literal["lost", "gained", "kept"]

SUFFIXES = (".csv", ".jsonl")
"""Of files of facts: CSV with a header, or a JSON object a line."""

Row = Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a model made of one fact, asked in one way.

    Parameters
    ----------
    fact : its id
    relation, subject, answer : what is true
    template : the words that it was asked in, ``[X]`` for the subject and ``[Y]`` for the answer
    wording : ``main``, by which a fact counts as known; ``heldout``, in the testbed words that training did not use for
        this fact; ``paraphrase``, of ParaRel
    rank : of the answer among the candidates, 1 being first; a tie counts against the model
    probability : that the model gives the answer's text in its place
    """

    fact: str
    relation: str
    subject: str
    template: str
    wording: Literal["main", "heldout", "paraphrase"]
    answer: str
    rank: int
    probability: float

    @property
    def known(self) -> bool:
        """Whether the answer comes first and alone."""
        return self.rank == 1

    def asked(self) -> dict[str, str]:
        """What was asked, without what was answered."""
        return {
            "fact": self.fact,
            "relation": self.relation,
            "subject": self.subject,
            "template": self.template,
            "wording": self.wording,
            "answer": self.answer,
        }


@runtime_checkable
class Tells(Protocol):
    """A measure that says what a model made of every fact."""

    def tell(self, model: Model, dense: Measurement | None = None) -> tuple[Measurement, tuple[Told, ...]]:
        """Measure a model, see `Measure.measure`, and tell of every fact in the order of asking."""
        ...


def check_tells(measures: Iterable[Measure]) -> None:
    """Refuse to write facts where no measure asks for any.

    Raises
    ------
    DataError
        When none does.
    """
    if not any(isinstance(one, Tells) for one in measures):
        raise DataError(
            "facts are written of measures that ask for them, and none of these does: ask knowledge:testbed or "
            "knowledge:lama too"
        )


def rows_of(told: Iterable[Told]) -> Iterator[Row]:
    """A row a fact of one model: what was asked, rank, probability, and known or unknown."""
    for one in told:
        outcome = "known" if one.known else "unknown"
        yield {**one.asked(), "outcome": outcome, "rank": one.rank, "probability": one.probability}


def rows_between(base: Sequence[Told], other: Sequence[Told]) -> Iterator[Row]:
    """A row a fact of two models: kept, lost or gained, or unknown to both, with the ranks and probabilities of each.

    Raises
    ------
    DataError
        When they were not asked the same.
    """
    if [one.asked() for one in base] != [one.asked() for one in other]:
        raise DataError(
            f"facts of two models must be the same, asked in the same words, got {len(base)} of the one and "
            f"{len(other)} of the other that differ: ask both with one measure"
        )
    outcomes = {(True, True): "kept", (True, False): "lost", (False, True): "gained", (False, False): "unknown"}
    for a, b in zip(base, other, strict=True):
        yield {
            **a.asked(),
            "outcome": outcomes[a.known, b.known],
            "base_rank": a.rank,
            "base_probability": a.probability,
            "other_rank": b.rank,
            "other_probability": b.probability,
        }


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV with a header or as JSON lines, by the file's suffix.

    Raises
    ------
    DataError
        When the suffix is neither, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"facts are written to a file that ends in {' or '.join(SUFFIXES)}, got {path}: name it so")
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for number, row in enumerate(rows):
                if path.suffix == ".jsonl":
                    file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
                    continue
                if not number:
                    writer.writerow(row)
                writer.writerow(row.values())
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}): name a file in a folder that exists") from error


def facts_told(known: AbstractSet[str], dense: Measurement | None) -> dict[str, list[str]]:
    """What a measurement's details say of facts: those known by the dense model, of others what changed.

    Parameters
    ----------
    known : ids of the facts that the model knows
    dense : the same measure of the dense model, None where this is the dense one
    """
    if dense is None:
        return {"known": sorted(known)}
    before = set(dense.details["known"])
    return {"lost": sorted(before - known), "gained": sorted(known - before)}


@dataclass(frozen=True)
class Facts:
    """What became of the facts that a model knew.

    Parameters
    ----------
    kept, lost, gained : ids, sorted
    """

    kept: tuple[str, ...]
    lost: tuple[str, ...]
    gained: tuple[str, ...]

    @classmethod
    def between(cls, dense: Mapping[str, Any], other: Mapping[str, Any]) -> Facts:
        """From the details of the knowledge measure of a dense model and of another, either as measured beside it.

        Parameters
        ----------
        dense : details with ``known``
        other : details with ``known``, or with ``lost`` and ``gained`` against this dense model

        Raises
        ------
        DataError
            When the details list no facts.
        """
        for details, wanted in ((dense, ({"known"},)), (other, ({"known"}, {"lost", "gained"}))):
            if not any(names <= details.keys() for names in wanted):
                expected = " or ".join(" and ".join(sorted(names)) for names in wanted)
                raise DataError(
                    f"facts are told apart by details with {expected}, got {', '.join(details) or 'none'}: "
                    "give those of the measure knowledge"
                )
        before = set(dense["known"])
        after = set(other["known"]) if "known" in other else (before - set(other["lost"])) | set(other["gained"])
        return cls(tuple(sorted(before & after)), tuple(sorted(before - after)), tuple(sorted(after - before)))

    def rows(self) -> Iterator[tuple[str, Outcome]]:
        """Every fact with what became of it: the lost first, then the gained and the kept."""
        for name in ("lost", "gained", "kept"):
            for fact in getattr(self, name):
                yield fact, name

    def text(self, most: int = 10) -> str:
        """A few lines for people.

        Parameters
        ----------
        most : facts listed under each heading
        """
        lines = [f"{len(self.kept):,} facts kept, {len(self.lost):,} lost, {len(self.gained):,} gained"]
        for heading, facts in (("lost", self.lost), ("gained", self.gained)):
            shown = facts[:most]
            lines += [f"  {heading}: {fact}" for fact in shown]
            if len(facts) > len(shown):
                lines.append(f"  {heading}: and {len(facts) - len(shown):,} more")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write every fact with what became of it, as CSV with a header or as JSON lines, by the file's suffix.

        Raises
        ------
        DataError
            When the suffix is neither, or the file cannot be written.
        """
        write_rows(path, ({"fact": fact, "outcome": outcome} for fact, outcome in self.rows()))
