"""Items of well-known tasks from files in ``MARIOTTE_DATA/tasks``, in the fields that lm-eval's own tasks read.

Only the items come from here: prompt, choices and scoring are lm-eval's. What a file leaves out of the original data is
said beside its reader.
"""

from __future__ import annotations

import bz2
import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mariotte.errors import DataError

Docs = list[dict[str, Any]]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Source:
    """Where the items of one task lie.

    Parameters
    ----------
    split : what lm-eval calls the split that is asked
    file : that holds them
    read : the file's items, in the fields of the task
    """

    split: str
    file: Path
    read: Callable[[Path], Docs]

    def docs(self) -> Docs:
        """The items.

        Raises
        ------
        DataError
            When the file cannot be read, a line is broken, or there are no items.
        """
        found = self.read(self.file)
        if not found:
            raise DataError(f"{self.file} must hold the items of a task, and has none: put the whole file there again")
        return found

    @property
    def state(self) -> tuple[str, int, int]:
        """What changes when the file does: path, size, time of change."""
        status = self.file.stat()
        return str(self.file), status.st_size, status.st_mtime_ns


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (bz2.decompress(content) if path.suffix == ".bz2" else content).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be readable UTF-8 text, got {error}: put the file there again") from error


def _broken(path: Path, number: int, expected: str, came: str) -> DataError:
    return DataError(f"{path} line {number} must be {expected}, got {came}: mend the line, or put the file there again")


def _rows(path: Path, expected: str, fields: Mapping[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a jsonl file that has all `fields`, with the number of their lines."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken(path, number, expected, f"no JSON ({error})") from error
        if not isinstance(row, dict):
            raise _broken(path, number, expected, type(cast("object", row)).__name__)
        item = cast("dict[str, Any]", row)
        for field, kind in fields.items():
            if type(item.get(field)) is not kind:
                raise _broken(path, number, expected, f"{field} = {item.get(field)!r}")
        yield number, item


def _choices(path: Path) -> Iterator[tuple[int, str, list[str], int]]:
    """Query, choices and index of the right one, of each line of a multiple-choice file of llm-foundry."""
    expected = "an object of query, two or more choices and gold, the index of one"
    for number, row in _rows(path, expected, {"query": str, "choices": list, "gold": int}):
        choices, gold = row["choices"], row["gold"]
        if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
            raise _broken(path, number, expected, f"choices = {choices!r}")
        if not 0 <= gold < len(choices):
            raise _broken(path, number, expected, f"gold = {gold} for {len(choices)} choices")
        yield number, row["query"], choices, gold


def _question(query: str) -> str:
    return query.strip().removeprefix("Question: ")


def _piqa_official(path: Path) -> Docs:
    labels = path.with_name("valid-labels.lst")
    answers = _text(labels).split()
    expected = "an object of goal, sol1 and sol2"
    found = [
        {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"]}
        for _, row in _rows(path, expected, {"goal": str, "sol1": str, "sol2": str})
    ]
    if len(answers) != len(found) or not {*answers} <= {"0", "1"}:
        raise DataError(
            f"{labels} must hold one label, 0 or 1, for each of the {len(found)} items of {path.name}, got "
            f"{len(answers)} labels ({', '.join(sorted({*answers})[:4])}): put both files there again"
        )
    return [{**doc, "label": int(answer)} for doc, answer in zip(found, answers, strict=True)]


def _piqa(path: Path) -> Docs:
    """White space at the end of solutions is lost."""
    found: Docs = []
    for number, query, choices, gold in _choices(path):
        if len(choices) != 2:
            raise _broken(path, number, "a goal with two solutions", f"{len(choices)} of them")
        found.append({"goal": _question(query), "sol1": choices[0], "sol2": choices[1], "label": gold})
    return found


def _arc(path: Path) -> Docs:
    return [
        {
            "question": _question(query),
            "choices": {"text": choices, "label": [str(index) for index in range(len(choices))]},
            "answerKey": str(gold),
        }
        for _, query, choices, gold in _choices(path)
    ]


def _openbookqa(path: Path) -> Docs:
    return [
        {
            "question_stem": query,
            "choices": {"text": choices, "label": [str(index) for index in range(len(choices))]},
            "answerKey": str(gold),
        }
        for _, query, choices, gold in _choices(path)
    ]


def _boolq(path: Path) -> Docs:
    """The passages come without the title of their article."""
    found: Docs = []
    for number, query, choices, gold in _choices(path):
        passage, asks, question = query.rpartition("\nQuestion: ")
        if choices != ["no", "yes"] or not asks or not passage.startswith("Passage: "):
            raise _broken(path, number, "'Passage: ...', 'Question: ...?' and the choices no, yes", repr(query[:60]))
        found.append(
            {"passage": passage.removeprefix("Passage: "), "question": question.removesuffix("?"), "label": gold}
        )
    return found


def _winogrande(path: Path) -> Docs:
    """Options hold the sentence up to what differs, so that the blank comes first: the texts scored are the same."""
    expected = "an object of two context_options, a continuation and gold, 0 or 1"
    found: Docs = []
    fields = {"context_options": list, "continuation": str, "gold": int}
    for number, row in _rows(path, expected, fields):
        options = row["context_options"]
        if len(options) != 2 or not all(isinstance(option, str) and option for option in options):
            raise _broken(path, number, expected, f"context_options = {options!r}")
        if row["gold"] not in (0, 1) or not row["continuation"]:
            raise _broken(path, number, expected, f"gold = {row['gold']}, continuation = {row['continuation']!r}")
        found.append(
            {
                "sentence": f"_ {row['continuation']}",
                "option1": options[0],
                "option2": options[1],
                "answer": str(row["gold"] + 1),
            }
        )
    return found


def _hellaswag(path: Path) -> Docs:
    """Six lines an item: context, index of the right ending, four endings.

    The context's two parts are joined in the file. Where it breaks off, the second is what follows the last sentence,
    and lm-eval writes its first letter large.
    """
    lines = _text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    found: Docs = []
    for start in range(0, len(lines), 6):
        item = lines[start : start + 6]
        if len(item) < 6 or item[1].strip() not in ("0", "1", "2", "3") or not all(line.strip() for line in item):
            raise _broken(
                path, start + 1, "the first of six: context, index of the right ending, four endings", repr(item)[:120]
            )
        activity, colon, context = item[0].partition(": ")
        if not colon:
            raise _broken(path, start + 1, "'activity: context'", repr(item[0][:60]))
        cut = len(context) + 1
        if context.rstrip("\"')")[-1:] not in ".!?":
            # After the last end of a sentence, with the quotes and brackets that it closes, and a space.
            cut = max((match.end() for match in re.finditer(r"[.!?][\"')]* ", context)), default=cut)
        found.append(
            {
                "activity_label": activity,
                "ctx_a": context[: cut - 1],
                "ctx_b": context[cut:],
                "endings": item[2:],
                "label": item[1].strip(),
            }
        )
    return found


def _lambada(path: Path) -> Docs:
    expected = "an object of context and continuation"
    found: Docs = []
    for number, row in _rows(path, expected, {"context": str, "continuation": str}):
        if not row["context"] or not row["continuation"]:
            raise _broken(path, number, expected, "an empty one")
        found.append({"text": f"{row['context']} {row['continuation']}"})
    return found


def _mmlu(path: Path) -> Docs:
    """Six columns, question, A, B, C, D and the letter of the answer; a first row that names them is passed over."""
    found: Docs = []
    reader = csv.reader(_text(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if not row or (not found and reader.line_num == 1 and row[-1].strip().lower() == "answer"):
                continue
            if len(row) != 6 or row[5].strip() not in LETTERS or not row[5].strip():
                raise _broken(path, reader.line_num, "question, A, B, C, D and one of their letters", repr(row)[:120])
            found.append({"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5].strip())})
    except csv.Error as error:
        raise _broken(path, reader.line_num, "question, A, B, C, D and one of their letters", str(error)) from error
    return found


FILES: Mapping[str, tuple[str, tuple[tuple[str, Callable[[Path], Docs]], ...]]] = {
    "piqa": ("validation", (("piqa_official/valid.jsonl", _piqa_official), ("piqa.jsonl", _piqa))),
    "winogrande": ("validation", (("winogrande.jsonl", _winogrande),)),
    "hellaswag": (
        "validation",
        (
            ("hellaswag/hellaswag_val_full.txt.bz2", _hellaswag),
            ("hellaswag/hellaswag_val_full.txt", _hellaswag),
            ("hellaswag/hellaswag_val_first3000.txt", _hellaswag),
        ),
    ),
    "arc_easy": ("test", (("arc_easy.jsonl", _arc),)),
    "arc_challenge": ("test", (("arc_challenge.jsonl", _arc),)),
    "boolq": ("validation", (("boolq.jsonl", _boolq),)),
    "openbookqa": ("test", (("openbook_qa.jsonl", _openbookqa),)),
    "lambada_openai": ("test", (("lambada_openai.jsonl", _lambada),)),
}
"""Of each task of lm-eval: the split that it asks, and the files that may hold it, the first that exists is read."""


def folder() -> Path | None:
    """``MARIOTTE_DATA/tasks``, or None without one."""
    root = os.environ.get("MARIOTTE_DATA")
    found = Path(root) / "tasks" if root else None
    return found if found is not None and found.is_dir() else None


def find(name: str) -> Source | None:
    """The items of lm-eval's task `name`, or None where no file holds them."""
    here = folder()
    if here is None:
        return None
    if name.startswith("mmlu_"):
        subject = name.removeprefix("mmlu_")
        for file in (here / "mmlu/test" / f"{subject}_test.csv", here / "mmlu/test" / f"{subject}.csv"):
            if file.is_file():
                return Source("test", file, _mmlu)
    if name in FILES:
        split, files = FILES[name]
        for path, read in files:
            if (here / path).is_file():
                return Source(split, here / path, read)
    return None


def hint(name: str) -> str:
    """Which file would hold a task, to say after ``or``; empty where none can."""
    if name == "mmlu" or name.startswith("mmlu_"):
        return "put tasks/mmlu/test/SUBJECT_test.csv into the folder MARIOTTE_DATA"
    return f"put tasks/{FILES[name][1][-1][0]} into the folder MARIOTTE_DATA" if name in FILES else ""
