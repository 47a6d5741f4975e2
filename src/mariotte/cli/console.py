"""What commands print with: text, tables, JSON and progress, for a person at a terminal and for a pipe alike."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_LINE_EVERY_S = 10.0
"""Shortest time between two progress lines where there is no terminal: a log of a night stays readable."""

_PLAIN_BOX = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""A rule under the headings and nothing else, as `rich.box.Box` wants it: chains have vertical bars of their own."""


def say(text: str) -> None:
    """Print text on stdout: no markup, no colour, no wrapping; lines are kept, other control characters are escaped."""
    if sys.stdout is not None:
        print("\n".join(map(one_line, text.split("\n"))), file=sys.stdout)


def warn(text: str) -> None:
    """Print one line on stderr, for what the user should know although the command goes on."""
    if sys.stderr is not None:
        print(f"mariotte: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Text in which nothing can command the terminal: spaces of all kinds are plain, control characters are escaped.

    Names in a store, a table or on a command line may come from anyone.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str | None = None) -> None:
    """Print a table on stdout: fitted to a terminal, without wrapping or colour elsewhere.

    Parameters
    ----------
    title : printed above; empty for none
    columns : their headings
    rows : one cell a column, printed by `format_cell`; columns of numbers are aligned to the right
    note : a line below
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = _out()
    terminal = out.isatty()
    cells = [list(row) for row in rows]
    texts = [[format_cell(cell) for cell in row] for row in cells]
    widths = [max(len(name), *(len(row[i]) for row in texts), 0) for i, name in enumerate(columns)]
    # On a terminal the widest columns are wrapped and the others are not: rich would break ids and names to keep prose.
    room = 2 * _rich(out).width // 3 if terminal else 0
    whole: set[int] = set()
    for i in sorted(range(len(columns)), key=lambda i: widths[i]):
        room -= widths[i] + 2
        if room >= 0:
            whole.add(i)
    table = Table(
        box=box.SIMPLE_HEAD if terminal else box.Box(_PLAIN_BOX, ascii=True), padding=(0, 1, 0, 0), pad_edge=False
    )
    for i, name in enumerate(columns):
        kinds = [row[i] for row in cells if row[i] is not None]
        numeric = bool(kinds) and all(_is_number(cell) for cell in kinds)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold", no_wrap=i in whole)
    for row in texts:
        assert len(row) == len(columns), f"a row must have {len(columns)} cells, got {len(row)}: {row}"
        table.add_row(*map(Text, row))
    if title:
        say(one_line(title))
    if terminal:
        _rich(out).print(table)
    else:
        say(_unwrapped(table))
    if note:
        say(one_line(note))


def print_json(value: object) -> None:
    """Print JSON on stdout, indented, for other programs.

    Parameters
    ----------
    value : JSON values, and within them dataclasses, paths, numpy numbers and arrays; NaN and infinities become null
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    # JSON escapes the control characters below a space, and leaves those that `say` would change.
    say("".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text))


def format_cell(value: object) -> str:
    """A cell's text: four significant digits of a float, ``-`` for None and NaN, one line of anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:.0f}"
    return one_line(str(value))


class Update(Protocol):
    """What `progress` hands to the work: call it when something is done."""

    def __call__(
        self,
        advance: float = 1,
        *,
        completed: float | None = None,
        total: float | None = None,
        text: str | None = None,
    ) -> None:
        """Report progress.

        Parameters
        ----------
        advance : how much was done since the last call; ignored when `completed` is given
        completed : how much is done altogether
        total : how much there is to do, when that changed
        text : what is being done now
        """
        ...


@contextmanager
def progress(description: str, total: float | None = None) -> Generator[Update]:
    """Show on stderr how far the work is: a bar with the time left on a terminal, plain lines elsewhere.

    Parameters
    ----------
    description : what is done, such as the study's name
    total : how much there is to do, in any unit; None when that is not known

    Notes
    -----
    Plain lines come when the work starts and ends and at most every `PLAIN_LINE_EVERY_S` seconds in between. stdout is
    left to results, so that ``--json`` can be piped while the bar runs.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        with _bar(description, total, sys.stderr) as update:
            yield update
    else:
        with _lines(description, total) as update:
            yield update


@contextmanager
def _bar(description: str, total: float | None, stream: TextIO) -> Generator[Update]:
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=_rich(stream)) as bar:
        task = bar.add_task(escape(one_line(description)), total=total, text="")

        def update(
            advance: float = 1,
            *,
            completed: float | None = None,
            total: float | None = None,
            text: str | None = None,
        ) -> None:
            if text is not None:
                bar.update(task, text=escape(one_line(text)))
            if total is not None:
                bar.update(task, total=total)
            if completed is not None:
                bar.update(task, completed=completed)
            else:
                bar.advance(task, advance)

        yield update


@contextmanager
def _lines(description: str, total: float | None) -> Generator[Update]:
    started = printed = time.monotonic()
    done, goal = 0.0, total

    def line(text: str) -> None:
        if sys.stderr is not None:
            print(one_line(f"{description}: {text}"), file=sys.stderr, flush=True)

    def amount() -> str:
        """How much is done; nothing where there is neither an end nor a count."""
        if goal is None:
            return f"{done:g}" if done else ""
        return f"{done:g} of {goal:g}"

    def update(
        advance: float = 1,
        *,
        completed: float | None = None,
        total: float | None = None,
        text: str | None = None,
    ) -> None:
        nonlocal done, goal, printed
        done = completed if completed is not None else done + advance
        goal = goal if total is None else total
        now = time.monotonic()
        if now - printed < PLAIN_LINE_EVERY_S:
            return
        printed = now
        parts = [*filter(None, [amount()]), f"{duration(now - started)} so far"]
        if goal is not None and 0 < done < goal:
            parts.append(f"about {duration((now - started) * (goal - done) / done)} left")
        line(", ".join(parts) + (f" ({text})" if text else ""))

    line("started" if goal is None else f"started, {goal:g} to do")
    try:
        yield update
    except BaseException:
        line(f"stopped{f' at {amount()}' if amount() else ''} after {duration(time.monotonic() - started)}")
        raise
    line(f"done{f', {amount()}' if amount() else ''} in {duration(time.monotonic() - started)}")


@contextmanager
def stopped_cleanly() -> Generator[None]:
    """Let SIGTERM, which queues and shells send, end the work as Ctrl-C does, so that no scratch files are left."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``8 s``, ``3:05 min``, ``2:41 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _out() -> TextIO:
    """Stdout, or nowhere when the shell closed it."""
    return sys.stdout if sys.stdout is not None else io.StringIO()


def _rich(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False)


def _unwrapped(table: Table) -> str:
    """A table's text at its natural width, without colour and trailing spaces."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=100_000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def _json_escape(character: str) -> str:
    return json.dumps(character)[1:-1]  # ensure_ascii: \u00xx, in two halves where it must be


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: object) -> object:
    """JSON values of whatever `print_json` accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in cast("Iterable[Any]", value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if hasattr(value, "tolist"):  # numpy numbers and arrays, without importing numpy
        return _plain(cast("Any", value).tolist())
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")
