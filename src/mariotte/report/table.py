"""A table of the page, and its cells."""

from __future__ import annotations

from dataclasses import dataclass

MINUS = "\u2212"
DASH = "\u2013"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Text of a cell, a smaller second line, whether it is stressed, and a badge's class (``yes``, ``no`` ...)."""

    text: str
    below: str = ""
    strong: bool = False
    badge: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page.

    Parameters
    ----------
    columns : headings; one that starts with ``#`` is of numbers, set to the right
    rows : as many cells as columns
    caption : a sentence above, or empty
    fold : heading under which the table is folded away, or empty to show it
    prose : cells are sentences: on narrow screens they stand below one another instead of beside
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    fold: str = ""
    prose: bool = False


def row_of(*cells: str | Cell) -> tuple[Cell, ...]:
    """The cells of a row; plain text is a cell without more."""
    return tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in cells)
