"""Facts kept, lost and gained: for a record, for people and as a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mariotte.errors import DataError
from mariotte.evaluate.base import Measurement

Outcome = Literal["lost", "gained", "kept"]


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
        if path.suffix not in (".csv", ".jsonl"):
            raise DataError(f"facts are written to a file that ends in .csv or .jsonl, got {path}: name it so")
        try:
            with path.open("w", encoding="utf-8", newline="") as file:
                if path.suffix == ".csv":
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(("fact", "outcome"))
                    writer.writerows(self.rows())
                else:
                    for fact, outcome in self.rows():
                        file.write(json.dumps({"fact": fact, "outcome": outcome}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error}): name a file in a folder that exists") from error
