"""Corpora: one entry a corpus, four splits that never share a document.

A name resolves first in the folder ``MARIOTTE_DATA`` (``<corpus>/{train,valid,test}.txt`` or ``.jsonl``), then on the
hub. ``file:PATH`` is a folder with such files, or one file, which is split 80/10/10 by a hash of its documents. The
calibration split is always a tenth of the training documents, chosen by hash and left out of training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from mariotte.errors import DataError, unknown

if TYPE_CHECKING:
    from mariotte.testbed.world import World

Split = Literal["train", "calibration", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

TESTBED_ROWS: Mapping[Split, int] = {"train": 50_000, "calibration": 1_024, "valid": 400, "test": 400}
"""Rows of 64 tokens in a split of a testbed corpus; each split is an independent draw from the same world."""


_ROWS_AT_ONCE = 128


def _bucket(document: str, salt: str, n: int) -> int:
    """A number in [0, n) that depends on the document alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{document}".encode()).digest()[:8], "big") % n


def is_calibration(document: str) -> bool:
    """Whether a training document is set aside for calibration: one in ten, by its hash."""
    return _bucket(document, "calibration", 10) == 0


def split_of(document: str) -> Literal["train", "valid", "test"]:
    """The split of a document of an unsplit file: 80/10/10 by its hash."""
    bucket = _bucket(document, "split", 10)
    return "train" if bucket < 8 else "valid" if bucket == 8 else "test"


@dataclass(frozen=True)
class Corpus(ABC):
    """Text in documents, in four disjoint splits.

    ``block`` is the number of tokens in a window unless a measure or a step asks for another.
    """

    name: str
    block: ClassVar[int] = 512

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """What changes when the text of a split does; cheap, so that it can be asked before every read.

        Raises
        ------
        DataError
            When the corpus is missing.
        """

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, in a fixed order.

        Raises
        ------
        DataError
            When the corpus is missing, cannot be read or has no text in this split.
        """


def stories(text: str) -> list[str]:
    """Documents separated by ``<|endoftext|>``."""
    return [part.strip() for part in text.split("<|endoftext|>") if part.strip()]


def articles(text: str) -> list[str]:
    """WikiText articles: each begins with a heading of level one, `` = Title = ``."""
    parts = re.split(r"(?m)^(?= = [^=\n]+ = $)", text)
    return [part.strip("\n") for part in parts if part.strip()]


def hundreds(text: str) -> list[str]:
    """A hundred lines a document: for text that has one sentence a line and says nowhere where an article ends."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ["\n".join(lines[start : start + 100]) for start in range(0, len(lines), 100)]


def paragraphs(text: str) -> list[str]:
    """Stories where ``<|endoftext|>`` separates them, else paragraphs separated by blank lines."""
    if "<|endoftext|>" in text:
        return stories(text)
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def instruction(row: Mapping[str, Any]) -> str:
    """One row as text: its ``text``, or instruction, input and output in Alpaca's prompt."""
    if "text" in row:
        if not isinstance(row["text"], str):
            raise DataError(f"'text' must be a string, got {row['text']!r}")
        return row["text"]
    if not {"instruction", "output"} <= set(row):
        raise DataError(
            f"a row must have 'text', or 'instruction' and 'output', got {', '.join(map(str, row)) or 'no fields'}"
        )
    given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n{row['output']}"


def _read_file(path: Path, cut: Callable[[str], list[str]]) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return cut(text)
    documents: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} must be a JSON object, and cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} must be a JSON object, got {type(row).__name__}")
        try:
            documents.append(instruction(cast("dict[str, Any]", row)))
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from None
    return documents


@functools.lru_cache(maxsize=64)
def _hash_of(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, computed again only when its size or time of change is another."""
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


def _filtered(documents: list[str], split: Split) -> Iterator[str]:
    """The documents of a train file that belong to `split`; those of other files as they are."""
    if split in ("valid", "test"):
        yield from documents
    else:
        yield from (d for d in documents if is_calibration(d) == (split == "calibration"))


@dataclass(frozen=True)
class Folder(Corpus):
    """Files ``{train,valid,test}.{txt,jsonl}`` in one folder.

    Parameters
    ----------
    path : the folder
    cut : how a text file falls into documents
    """

    path: Path
    cut: Callable[[str], list[str]] = paragraphs

    def _file(self, split: Split) -> Path:
        stem = "train" if split == "calibration" else split
        for suffix in (".txt", ".jsonl"):
            file = self.path / f"{stem}{suffix}"
            if file.is_file():
                return file
        raise DataError(f"corpus {self.name!r} has no {stem} split: expected {stem}.txt or {stem}.jsonl in {self.path}")

    def fingerprint(self, split: Split) -> str:  # noqa: D102
        # With what a plain file loses in cutting: the same bytes are other documents to another reader.
        return f"{split} of {_file_hash(self._file(split))}, {self.cut.__name__}"

    def documents(self, split: Split) -> Iterator[str]:  # noqa: D102
        return _filtered(_read_file(self._file(split), self.cut), split)


@dataclass(frozen=True)
class File(Corpus):
    """One file, split 80/10/10 by a hash of each document; equal documents always share a split."""

    path: Path

    def fingerprint(self, split: Split) -> str:  # noqa: D102
        return f"{split} of unsplit {_file_hash(self.path)}"

    def documents(self, split: Split) -> Iterator[str]:  # noqa: D102
        documents = _read_file(self.path, paragraphs)
        wanted = "train" if split == "calibration" else split
        return _filtered([d for d in documents if split_of(d) == wanted], split)


@dataclass(frozen=True)
class Hub(Corpus):
    """A dataset of the hub.

    Parameters
    ----------
    dataset, config : as the hub calls them
    splits : our split to the hub's; a missing one is taken from the training split by hash
    cut : how the joined rows fall into documents; None when every row is one
    column : of the text, where rows are joined
    revision : of the dataset, None for its main one
    """

    dataset: str
    config: str | None
    splits: Mapping[str, str]
    cut: Callable[[str], list[str]] | None = None
    column: str = "text"
    revision: str | None = None

    def fingerprint(self, split: Split) -> str:  # noqa: D102
        # The hub's own revision is known only after loading; datasets do not change under a name in practice.
        return f"{split} of hub:{self.dataset}/{self.config}"

    def documents(self, split: Split) -> Iterator[str]:  # noqa: D102
        import datasets  # slow to import, and only corpora of the hub need it
        from datasets.exceptions import DatasetNotFoundError

        wanted = "train" if split == "calibration" else split
        try:
            split_there = self.splits.get(wanted, self.splits["train"])
            rows = datasets.load_dataset(self.dataset, self.config, split=split_there, revision=self.revision)
        except (OSError, ValueError, DatasetNotFoundError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise DataError(
                f"corpus {self.name!r} is not in MARIOTTE_DATA and the hub did not give {self.dataset!r} ({reason}); "
                f"put {self.name}/{{train,valid,test}}.txt or .jsonl into that folder"
            ) from error
        texts = cast("Iterator[dict[str, Any]]", iter(rows))
        documents = self.cut(self._joined(texts)) if self.cut else [instruction(row) for row in texts]
        if wanted not in self.splits or (wanted == "train" and {"valid", "test"} - set(self.splits)):
            # Where a split is taken from the training rows, the training split is what is left of them.
            missing = {"valid", "test"} - set(self.splits)
            documents = [d for d in documents if (split_of(d) if split_of(d) in missing else "train") == wanted]
        return _filtered(documents, split)

    def _joined(self, rows: Iterator[dict[str, Any]]) -> str:
        texts = (str(row[self.column]) for row in rows)
        # Rows of some datasets bring the end of their lines with them, those of others do not.
        return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


HALF = "half"
"""Text as in ``all`` that never mentions every other person: what recovery does to facts that it is not told."""

SENTENCES = "sentences"
"""Single sentences of the mixture of ``all``: what encoders and encoder-decoders were trained on."""


@dataclass(frozen=True)
class Testbed(Corpus):
    """Rows of the testbed's world in one register, in all as the models were trained, or of half of the people.

    Its sentences by themselves have fewer tokens than a row, as many documents a split.
    """

    register: str
    block: ClassVar[int] = 64

    def fingerprint(self, split: Split) -> str:  # noqa: D102
        # The first rows stand for all: every row is a function of the world, the register and its number.
        return hashlib.sha256("\n".join(islice(self.documents(split), 8)).encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[str]:  # noqa: D102
        # Independent draws can meet: a row that another split drew first is left out.
        earlier = SPLITS[SPLITS.index(split) + 1 :]
        drawn = {text for other in earlier for text in _held_rows(self.register, other)}
        return (text for text in self._drawn(split) if text not in drawn)

    def _drawn(self, split: Split) -> Iterator[str]:
        # Row by row: a reader that stops after a few hundred never waits for fifty thousand.
        for start in range(0, TESTBED_ROWS[split], _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, TESTBED_ROWS[split] - start)
            if self.register == HALF:
                yield from _world().half_rows(split, count, start)
            elif self.register == SENTENCES:
                yield from (row.text for row in _world().sentences("all", split, count, start))
            else:
                yield from (row.text for row in _world().rows(self.register, split, count, start))


@functools.lru_cache(maxsize=16)
def _held_rows(register: str, split: Split) -> frozenset[str]:
    return frozenset(Testbed("", register)._drawn(split))  # pyright: ignore[reportPrivateUsage]


@functools.lru_cache(maxsize=1)
def _world() -> World:
    from mariotte.testbed.world import World  # building the world takes a moment; other corpora do without

    return World()


REGISTERS = ("all", "encyclopedia", "news", "instructions")

CORPORA: Mapping[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Hub(
            "wikitext2",
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            {"train": "train", "valid": "validation", "test": "test"},
            articles,
        ),
        # The Penn Treebank's text as language models use it; its own loader is a script, which we do not run.
        Hub(
            "ptb",
            "ptb-text-only/ptb_text_only",
            "penn_treebank",
            {"train": "train", "valid": "validation", "test": "test"},
            hundreds,
            "sentence",
            "refs/convert/parquet",
        ),
        Hub("tinystories", "roneneldan/TinyStories", None, {"train": "train[:1%]", "test": "validation"}),
        Hub("alpaca", "tatsu-lab/alpaca", None, {"train": "train"}),
        *(Testbed(f"testbed/{register}", register) for register in (*REGISTERS, HALF, SENTENCES)),
    )
}


def find(name: str) -> Corpus:
    """The corpus called `name`, or the one in ``file:PATH``.

    Raises
    ------
    UnknownNameError
        When no entry has this name.
    DataError
        When ``file:PATH`` names nothing that exists.
    """
    if name.startswith("file:"):
        path = Path(name.removeprefix("file:")).expanduser()
        if path.is_dir():
            return Folder(name, path)
        if not path.is_file():
            raise DataError(f"no file or folder at {path}: a corpus file:PATH needs an existing one")
        return File(name, path)
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA, hint="; or give file:PATH")
    corpus = CORPORA[name]
    root = os.environ.get("MARIOTTE_DATA")
    if root and isinstance(corpus, Hub) and (Path(root) / name).is_dir():
        return Folder(name, Path(root) / name, corpus.cut or stories)
    return corpus
