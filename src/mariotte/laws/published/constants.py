"""Single coefficients of laws that no paper tabulates: one row a number, each with its mark."""

from __future__ import annotations

import csv
from pathlib import Path

MARKS = {
    "read": "in the paper's own text",
    "checked": "quotation checked against the paper by a third party",
    "secondary": "from notes about the paper: check it before you quote it",
    "ours": "derived or measured by us on published tables",
}


def constants(law: str | None = None) -> list[dict[str, str]]:
    """The coefficients of one law, or of all.

    Columns: law, parameter (as in the law's formula, or as the note says), value, scope, source (empty for our own),
    mark (a key of `MARKS`), note.
    """
    with (Path(__file__).parent / "constants.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if law in (None, row["law"])]
