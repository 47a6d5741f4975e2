"""The language of compression: ``slice@0.3 | lora@1M(corpus=wikitext2) | int8``.

::

    chain  := link (" | " link)*
    link   := name [ "@" amount ] [ ":" scope ] [ "(" field=value, ... ")" ]
    value  := 0.3 | 1M | 1% (0.01) | true | a word | a JSON string
    amount := 0.3 | 4 | 1M | auto
    scope  := all | attention | ffn | embeddings | head | layers=3-8 | a corpus, where the link is a measure

A scope or a value that is not one word is a JSON string: ``loss:"file:my text.txt"``.

This module knows only the syntax. Which names exist, which fields they have and what an amount may be is settled where
the classes are at hand (``mariotte.experiments.identity``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mariotte.errors import ChainError

Value = int | float | bool | str

_SUFFIX = {"k": 1_000, "M": 1_000_000, "B": 1_000_000_000}
_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_PERCENT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)%")
_WORD = re.compile(r"[A-Za-z0-9_.+%/~-][A-Za-z0-9_.+%/~:-]*")
_SCOPE = re.compile(r"[A-Za-z0-9_.+%/~:-][A-Za-z0-9_.+%/~:=,-]*")
_CHANGE = re.compile(
    r"\s*(?P<number>[+\-\N{MINUS SIGN}]\s*(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>%|pp)?\s*"
)
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')

AUTO = "auto"
"""The amount that a step chooses itself."""


def parse_number(text: str) -> int | float:
    """The number written as ``0.3``, ``4``, ``64k`` or ``1M`` (decimal: 64k is 64,000); integral ones are ints.

    Raises
    ------
    ChainError
        When `text` is no finite number.
    """
    digits, scale = (text[:-1], _SUFFIX[text[-1]]) if text[-1:] in _SUFFIX else (text, 1)
    if not _NUMBER.fullmatch(digits):
        raise ChainError(f"an amount must be a number such as 0.3, 4 or 1M, got {text!r}")
    value = float(digits) * scale
    if not math.isfinite(value):
        raise ChainError(f"an amount must be finite, got {text!r}")
    if re.fullmatch(r"[+-]?\d+", digits):
        return int(digits) * scale  # exact, however long
    return int(value) if value.is_integer() else value


def print_number(value: int | float) -> str:
    """The canonical text of a number: the largest suffix that leaves an integer; ``parse_number`` reads it back."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        return repr(value)
    for suffix, scale in reversed(_SUFFIX.items()):
        if value and value % scale == 0:
            return f"{value // scale}{suffix}"
    return str(value)


def parse_change(text: str) -> tuple[float, str]:
    """Read a signed change: ``+3%``, ``-2pp`` or ``+0.05``.

    Returns
    -------
    the number, and its unit: ``%`` of a value, ``pp`` percentage points of a share, or nothing

    Raises
    ------
    ChainError
        When the text is none, or its number is not finite.
    """
    found = _CHANGE.fullmatch(text)
    if found is None:
        raise ChainError(
            f"a change is a signed number with %, pp (percentage points) or nothing, got {text!r}: such as +3% or -2pp"
        )
    number = float(re.sub(r"\s", "", found["number"].replace("\N{MINUS SIGN}", "-")))
    if not math.isfinite(number):
        raise ChainError(f"the number of a change must be finite, got {text!r}: write a smaller one")
    return number, found["unit"] or ""


@dataclass(frozen=True)
class Link:
    """One step of a chain, or one measure, as written.

    Parameters
    ----------
    name : lower case, words joined by ``-``
    amount : in the step's own unit; None when the step takes none
    scope : the part of the model, or None for the step's default
    fields : hyperparameters by name, values as written (coerced later to the field's type)
    """

    name: str
    amount: int | float | str | None = None
    scope: str | None = None
    fields: Mapping[str, Value] = field(default_factory=lambda: dict[str, Value]())

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ChainError(
                f"a name is lower-case words joined by '-', such as 'slice' or 'prunenet-random', got {self.name!r}"
            )
        if self.scope is not None and not self.scope.strip():
            raise ChainError("a scope is a word such as all, attention or layers=3-8, got nothing")
        if isinstance(self.amount, str) and self.amount != AUTO:
            raise ChainError(f"an amount must be a number such as 0.3, 4 or 1M, got {self.amount!r}")
        if isinstance(self.amount, float) and self.amount.is_integer():
            object.__setattr__(self, "amount", int(self.amount))
        for name, value in self.fields.items():
            if not _FIELD.fullmatch(name):
                raise ChainError(f"a field is a lower-case word such as 'criterion', got {name!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ChainError(f"field {name!r} must be finite, got {value}")
        # Sorted: the order of writing has no meaning, and equal links must print equally.
        object.__setattr__(self, "fields", dict(sorted(self.fields.items())))

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        amount = (
            ""
            if self.amount is None
            else f"@{self.amount if isinstance(self.amount, str) else print_number(self.amount)}"
        )
        scope = "" if self.scope is None else f":{_quoted_unless(_SCOPE, self.scope)}"
        inside = ", ".join(f"{name}={_print_value(value)}" for name, value in self.fields.items())
        return f"{self.name}{amount}{scope}{f'({inside})' if inside else ''}"


@dataclass(frozen=True)
class Chain:
    """Links applied from left to right; the empty chain is the dense model and prints as ``dense``."""

    links: tuple[Link, ...] = ()

    def __str__(self) -> str:
        return " | ".join(map(str, self.links)) or "dense"


def parse(text: str) -> Chain:
    """Read a chain; ``parse(str(chain)) == chain`` for every chain.

    Raises
    ------
    ChainError
        Saying where the text stops being a chain and what was expected there.
    """
    if text.strip() == "dense":
        return Chain()
    reader = _Reader(text)
    links = [reader.link()]
    while not reader.at_end():
        reader.expect("|", "'|' or the end of the chain")
        links.append(reader.link())
    return Chain(tuple(links))


def parse_link(text: str) -> Link:
    """Read a single link, such as a measure ``loss:wikitext2(block=512)``.

    Raises
    ------
    ChainError
        When `text` is not exactly one link.
    """
    reader = _Reader(text)
    link = reader.link()
    if not reader.at_end():
        raise reader.error("the end of the text")
    return link


def _print_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return print_number(value)
    # A word that reads as a number or a truth value is quoted, or it would come back as one.
    return json.dumps(value, ensure_ascii=True) if _read_word(value) != value else _quoted_unless(_WORD, value)


def _quoted_unless(plain: re.Pattern[str], text: str) -> str:
    return text if plain.fullmatch(text) else json.dumps(text, ensure_ascii=True)


def _read_word(word: str) -> Value:
    if word in ("true", "false"):
        return word == "true"
    try:
        return _hundredths(word[:-1]) if _PERCENT.fullmatch(word) else parse_number(word)
    except ChainError:
        return word


def _hundredths(digits: str) -> int | float:
    return parse_number(f"{digits}e-2")  # read at once: 0.7 / 100 is not 0.007


class _Reader:
    """A cursor over a chain's text that knows what it expected when it fails."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def error(self, expected: str) -> ChainError:
        rest = self.text[self.position :]
        came = f"{rest[:20]!r}" if rest.strip() else "the end"
        return ChainError(f"chain {self.text!r}: expected {expected} at position {self.position}, got {came}")

    def spaces(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def at_end(self) -> bool:
        self.spaces()
        return self.position == len(self.text)

    def accept(self, mark: str) -> bool:
        self.spaces()
        found = self.text.startswith(mark, self.position)
        self.position += len(mark) * found
        return found

    def expect(self, mark: str, expected: str) -> None:
        if not self.accept(mark):
            raise self.error(expected)

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        found = pattern.match(self.text, self.position)
        if not found:
            raise self.error(expected)
        self.position = found.end()
        return found.group()

    def link(self) -> Link:
        self.spaces()
        name = self.match(_NAME, "the name of a step such as slice or ffn")
        amount: int | float | str | None = None
        scope: str | None = None
        if self.accept("@"):
            word = self.match(re.compile(r"[^\s:|()]+"), "an amount such as 0.3, 4 or 1M")
            try:
                amount = AUTO if word == AUTO else parse_number(word)
            except ChainError as error:
                raise ChainError(f"chain {self.text!r}: {error}") from None
        if self.accept(":"):
            scope = self.string("the scope") or self.match(_SCOPE, "a scope such as all, attention or ffn")
        fields: dict[str, Value] = {}
        if self.accept("("):
            while True:
                self.spaces()
                key = self.match(_FIELD, "a field such as criterion=obs")
                self.expect("=", f"'=' and a value for {key!r}")
                self.spaces()
                if key in fields:
                    raise ChainError(f"chain {self.text!r}: field {key!r} is given twice; give it once")
                fields[key] = self.value(key)
                if self.accept(")"):
                    break
                self.expect(",", "',' or ')'")
        return Link(name, amount, scope, fields)

    def string(self, what: str) -> str | None:
        """A quoted string, if one begins here."""
        if not self.text.startswith('"', self.position):
            return None
        text = self.match(_STRING, f"a closing quote after {what}")
        try:
            return str(json.loads(text))
        except json.JSONDecodeError:
            raise ChainError(f"chain {self.text!r}: {what} must be a JSON string, got {text}") from None

    def value(self, key: str) -> Value:
        text = self.string(f"the value of {key!r}")
        return (
            _read_word(self.match(_WORD, f"a value for {key!r}, quoted if it is not one word"))
            if text is None
            else text
        )
