"""Tasks of lm-eval on items from files: the same prompts and scores, no network."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mariotte.errors import DataError, ModelError
from mariotte.evaluate import harness, offline
from mariotte.evaluate.measures.tasks import Tasks
from mariotte.models.load import load
from mariotte.models.model import Model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'mariotte[tasks]'"
)

ITEM = {"query": "Question: Which?", "choices": ["this", "that"], "gold": 1}
FOUR = {"query": "Question: Which?", "choices": ["this", "that", "those", "these"], "gold": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MARIOTTE_DATA/tasks."""
    monkeypatch.setenv("MARIOTTE_DATA", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    return tmp_path / "tasks"


@pytest.fixture
def stories(shared: Path) -> Model:
    return load(shared / "data/models/stories260K")


def _jsonl(path: Path, *rows: Any) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def _asked(name: str) -> list[tuple[Any, ...]]:
    """Prompt, choices and target of each item, as lm-eval forms them."""
    (task,) = harness.load(name).leaves.values()
    choices = task.doc_to_choice if task.OUTPUT_TYPE == "multiple_choice" else lambda doc: None
    return [(task.doc_to_text(doc), choices(doc), task.doc_to_target(doc)) for doc in task.eval_docs]


# Prompts written out by hand from lm-eval's descriptions of its tasks.
WRITTEN: dict[str, tuple[str, str, list[tuple[Any, ...]]]] = {
    "piqa": (
        "piqa.jsonl",
        json.dumps({"query": "Question: To sit,\n", "choices": ["use a chair", "use a fork"], "gold": 0}),
        [("Question: To sit,\nAnswer:", ["use a chair", "use a fork"], 0)],
    ),
    "arc_easy": (
        "arc_easy.jsonl",
        json.dumps(FOUR),
        [("Question: Which?\nAnswer:", FOUR["choices"], 2)],
    ),
    "arc_challenge": (
        "arc_challenge.jsonl",
        json.dumps({**FOUR, "gold": 0}),
        [("Question: Which?\nAnswer:", FOUR["choices"], 0)],
    ),
    "openbookqa": (
        "openbook_qa.jsonl",
        json.dumps({**FOUR, "query": "The sun is"}),
        [("The sun is", FOUR["choices"], 2)],
    ),
    "boolq": (
        "boolq.jsonl",
        json.dumps({"query": "Passage: A cat.\nQuestion: is it a cat?", "choices": ["no", "yes"], "gold": 1}),
        [("A cat.\nQuestion: is it a cat?\nAnswer:", ["no", "yes"], 1)],
    ),
    "winogrande": (
        "winogrande.jsonl",
        json.dumps({"context_options": ["Ann saw Bo so Ann", "Ann saw Bo so Bo"], "continuation": "hid.", "gold": 0}),
        [(0, ["Ann saw Bo so Ann", "Ann saw Bo so Bo"], "hid.")],
    ),
    "lambada_openai": (
        "lambada_openai.jsonl",
        json.dumps({"context": "She said", "continuation": "hello"}),
        [("She said", None, " hello")],
    ),
    "hellaswag": (
        "hellaswag/hellaswag_val_full.txt",
        "Cleaning: A man comes. the Man\n1\nsits.\nruns [away].\nflies.\nsings.\n"
        "Home: How to rest. Sit down.\n0\nsit.\nrun.\nfly.\nsing.\n",
        [
            ("Cleaning: A man comes. The man", ["sits.", "runs .", "flies.", "sings."], 1),
            ("Home: How to rest. Sit down.", ["sit.", "run.", "fly.", "sing."], 0),
        ],
    ),
    "mmlu_anatomy": (
        "mmlu/test/anatomy_test.csv",
        'Where is "it"?,here,there,"far, away",nowhere,C\n"Two\nlines?",a,b,c,d,A\n',
        [
            (
                'Where is "it"?\nA. here\nB. there\nC. far, away\nD. nowhere\nAnswer:',
                ["A", "B", "C", "D"],
                2,
            ),
            ("Two\nlines?\nA. a\nB. b\nC. c\nD. d\nAnswer:", ["A", "B", "C", "D"], 0),
        ],
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_prompts_are_lm_evals_own(name: str, folder: Path) -> None:
    file, text, expected = WRITTEN[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    assert _asked(name) == expected
    assert {*WRITTEN} == {*offline.FILES, "mmlu_anatomy"}


def test_piqa_is_read_from_its_original_files_where_they_are(folder: Path) -> None:
    (folder / "piqa_official").mkdir()
    _jsonl(folder / "piqa_official/valid.jsonl", {"goal": "To sit", "sol1": "a chair ", "sol2": "a fork"})
    (folder / "piqa_official/valid-labels.lst").write_text("0\n")
    _jsonl(folder / "piqa.jsonl", ITEM)
    assert _asked("piqa") == [("Question: To sit\nAnswer:", ["a chair ", "a fork"], 0)]
    (folder / "piqa_official/valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(DataError, match=r"must hold one label, 0 or 1, for each of the 1 items .* got 2 labels"):
        offline.Source("validation", *_official(folder)).docs()


def _official(folder: Path) -> tuple[Path, Callable[[Path], offline.Docs]]:
    found = offline.find("piqa")
    assert found is not None
    assert found.file == folder / "piqa_official/valid.jsonl"
    return found.file, found.read


def test_mmlu_asks_the_subjects_that_are_there_and_counts_them(folder: Path, model_folder: Path) -> None:
    (folder / "mmlu/test").mkdir(parents=True)
    (folder / "mmlu/test/virology_test.csv").write_text("question,A,B,C,D,answer\nWhat?,a,b,c,d,B\nWho?,a,b,c,d,D\n")
    (folder / "mmlu/test/anatomy.csv").write_text("Where?,a,b,c,d,A\n")
    stated = harness.describe("mmlu", None)
    assert (stated["n"], stated["tasks"], stated["chance"], stated["version"]) == (3, 2, 0.25, "2")
    assert harness.describe("mmlu_stem", None)["tasks"] == 1
    context = harness.load("mmlu").leaves["mmlu_virology"]
    text = context.fewshot_context(context.eval_docs[0], 0)
    assert text.startswith("The following are multiple choice questions (with answers) about virology.\n\nWhat?\nA. a")
    found = Tasks(on="mmlu").measure(load(model_folder))
    assert found.details["mmlu"]["n"] == len(found.details["mmlu"]["chosen"]) == 3
    assert "normalized" not in found.details["mmlu"]


def test_a_file_that_changed_is_read_again(folder: Path) -> None:
    _jsonl(folder / "arc_easy.jsonl", FOUR)
    before = harness.describe("arc_easy", None)
    _jsonl(folder / "arc_easy.jsonl", FOUR, {**FOUR, "gold": 0})
    after = harness.describe("arc_easy", None)
    assert (before["n"], after["n"]) == (1, 2)
    assert before["items_sha256"] != after["items_sha256"]


def test_what_a_user_describes_goes_before_files(folder: Path, tmp_path: Path) -> None:
    _jsonl(folder / "piqa.jsonl", ITEM)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/piqa.yaml").write_text("task: piqa\ndataset_path: nowhere/none\noutput_type: multiple_choice\n")
    assert harness.load("piqa").version == "1.0"
    with pytest.raises(DataError, match="the data of the lm-eval task 'piqa' cannot be loaded"):
        harness.load("piqa", str(tmp_path / "own"))


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("piqa", "piqa.jsonl", "", "must hold the items of a task, and has none: put the whole file there again"),
        ("piqa", "piqa.jsonl", "{}\n{", r"line 1 must be an object of query, .* got query = None: mend the line"),
        ("arc_easy", "arc_easy.jsonl", json.dumps(FOUR) + '\n{"query', r"line 2 must be .* got no JSON \("),
        ("arc_easy", "arc_easy.jsonl", "[1]", "line 1 must be .* got list: mend the line"),
        ("arc_easy", "arc_easy.jsonl", json.dumps({**FOUR, "gold": 4}), "got gold = 4 for 4 choices"),
        ("arc_easy", "arc_easy.jsonl", json.dumps({**FOUR, "gold": True}), "got gold = True"),
        ("openbookqa", "openbook_qa.jsonl", json.dumps({**FOUR, "choices": ["a", ""]}), r"got choices = \['a', ''\]"),
        ("piqa", "piqa.jsonl", json.dumps(FOUR), "line 1 must be a goal with two solutions, got 4 of them"),
        ("boolq", "boolq.jsonl", json.dumps(ITEM), "line 1 must be 'Passage: ...', 'Question: ...\\?'"),
        (
            "winogrande",
            "winogrande.jsonl",
            json.dumps({"context_options": ["a"], "continuation": "b", "gold": 0}),
            "two context_options, a continuation and gold, 0 or 1, got context_options",
        ),
        (
            "winogrande",
            "winogrande.jsonl",
            json.dumps({"context_options": ["a", "b"], "continuation": "", "gold": 0}),
            "got gold = 0, continuation = ''",
        ),
        ("lambada_openai", "lambada_openai.jsonl", '{"context": "a", "continuation": ""}', "got an empty one"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt", "A: b.\n0\na\nb\nc\n", "line 1 must be the first of six"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt", "b.\n0\na\nb\nc\nd\n", "line 1 must be 'activity: context'"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt.bz2", "no bzip2", "must be readable UTF-8 text, got Invalid"),
        ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", "Q?,a,b,c,d,E\n", "line 1 must be question, A, B, C, D and one"),
        ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", "Q?,a,b,c,d,A\nQ?,a\n", "line 2 must be question, A, B, C, D"),
        ("mmlu_anatomy", "mmlu/test/anatomy_test.csv", 'Q?,a,b,c,d,A\n"Q?,a\n', "line 2 must be .* unexpected end of"),
        ("mmlu", "mmlu/test/anatomy_test.csv", "\n", "anatomy_test.csv must hold the items of a task, and has none"),
    ],
)
def test_broken_files_are_one_sentence(name: str, file: str, text: str, said: str, folder: Path) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        harness.load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("piqa", "put tasks/piqa.jsonl into the folder MARIOTTE_DATA"),
        ("mmlu_anatomy", "put tasks/mmlu/test/SUBJECT_test.csv into the folder MARIOTTE_DATA"),
    ],
)
def test_what_needs_a_network_says_so_and_where_a_file_would_do(name: str, place: str, folder: Path) -> None:
    with pytest.raises(
        DataError, match=f"'{name}' cannot be loaded .* fetch them where there is a network, or {place}"
    ):
        harness.load(name)


def test_a_broken_model_is_said_to_be_broken(folder: Path, model_folder: Path) -> None:
    _jsonl(folder / "arc_easy.jsonl", FOUR)
    model = load(model_folder)
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"accuracy cannot be measured: .* non-finite logits"):
        Tasks(on="arc_easy").measure(model)


def _naive(model: Model, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of a continuation and whether it is the greedy one, one text at a time; the left is cut away."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    before, whole = (list(tokenizer(text)["input_ids"]) for text in (context, context + continuation))
    after = whole[len(before) :]
    longest = model.hf.config.max_position_embeddings
    # The last token is predicted and never read: a window reads as many tokens as the model has positions.
    window = (before + after)[-(longest + 1) :]
    with torch.no_grad():
        logs = model.logits(torch.tensor([window[:-1]]))[0, -len(after) :].float().log_softmax(-1)
    return (
        float(sum(row[token] for row, token in zip(logs, after, strict=True))),
        all(int(row.argmax()) == token for row, token in zip(logs, after, strict=True)),
    )


def _rows(path: Path, count: int) -> list[Any]:
    with path.open() as file:
        return [json.loads(line) for line in islice(file, count)]


def _naive_items(name: str, tasks: Path, count: int) -> list[tuple[list[tuple[str, str]], list[str], int]]:
    """Of each item the texts to score, the choices whose length counts, and the right one: from the files alone."""
    found: list[tuple[list[tuple[str, str]], list[str], int]] = []
    if name == "winogrande":
        for row in _rows(tasks / "winogrande.jsonl", count):
            options = row["context_options"]
            found.append(([(option, f" {row['continuation']}") for option in options], options, row["gold"]))
        return found
    if name == "hellaswag":
        lines = (tasks / "hellaswag/hellaswag_val_first3000.txt").read_text().split("\n")
        for start in range(0, 6 * count, 6):
            context, gold, *endings = lines[start : start + 6]
            if not context.endswith("."):
                head, _, tail = context.rpartition(". ")
                context = f"{head}. {tail.capitalize()}"
            found.append(([(context, f" {ending}") for ending in endings], endings, int(gold)))
        return found
    if name == "piqa":
        labels = (tasks / "piqa_official/valid-labels.lst").read_text().split()
        for row, gold in zip(_rows(tasks / "piqa_official/valid.jsonl", count), labels, strict=False):
            choices = [row["sol1"], row["sol2"]]
            prompt = f"Question: {row['goal']}\nAnswer:"
            found.append(([(prompt, f" {choice}") for choice in choices], choices, int(gold)))
        return found
    for row in _rows(tasks / f"{name}.jsonl", count):
        prompt = row["query"].removeprefix("Passage: ") + "\nAnswer:"
        found.append(([(prompt, f" {choice}") for choice in row["choices"]], row["choices"], row["gold"]))
    return found


def _compare(model: Model, tasks: Path, name: str, count: int) -> None:
    part = Tasks(on=name, items=count).measure(model).details[name]
    for number, (texts, choices, gold) in enumerate(_naive_items(name, tasks, count)):
        sums = [_naive(model, *pair)[0] for pair in texts]
        chosen = int(np.argmax(sums))
        assert int(part["chosen"][number]) == chosen
        assert part["correct"][number] == str(int(chosen == gold))
        if "normalized" in part:
            chosen = int(np.argmax([value / len(choice) for value, choice in zip(sums, choices, strict=True)]))
            assert int(part["chosen_normalized"][number]) == chosen
            assert part["correct_normalized"][number] == str(int(chosen == gold))
    assert part["n"] == len(part["correct"]) == count
    assert ("normalized" in part) == (name in ("piqa", "arc_easy", "hellaswag"))


NAMES = ("piqa", "arc_easy", "winogrande", "hellaswag", "boolq")


@pytest.mark.parametrize("name", NAMES)
def test_choices_equal_those_of_a_naive_loop(name: str, stories: Model, shared: Path, folder: Path) -> None:
    # The first lines of each file: reading whole ones takes longer than asking twenty items.
    for file in ("piqa_official/valid.jsonl", "piqa_official/valid-labels.lst", *(f"{name}.jsonl" for name in NAMES)):
        if (shared / "data/tasks" / file).is_file():
            _head(shared / "data/tasks" / file, folder / file, 20)
    first = "hellaswag/hellaswag_val_first3000.txt"
    _head(shared / "data/tasks" / first, folder / first, 6 * 20)
    _compare(stories, folder, name, 20)


def _head(path: Path, copy: Path, lines: int) -> None:
    copy.parent.mkdir(exist_ok=True)
    with path.open() as file:
        copy.write_text("".join(islice(file, lines)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_choices_equal_those_of_a_naive_loop(
    name: str, stories: Model, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARIOTTE_DATA", str(shared / "data"))
    _compare(stories, shared / "data/tasks", name, 200)


def test_lambada_asks_for_the_likeliest_word(stories: Model, shared: Path, folder: Path) -> None:
    _head(shared / "data/tasks/lambada_openai.jsonl", folder / "lambada_openai.jsonl", 20)
    found = Tasks(on="lambada_openai", items=20).measure(stories)
    part = found.details["lambada_openai"]
    rows = _rows(shared / "data/tasks/lambada_openai.jsonl", 20)
    expected = [_naive(stories, row["context"], f" {row['continuation']}")[1] for row in rows]
    assert part["correct"] == "".join(str(int(one)) for one in expected)
    assert part["chance"] == 0
    assert "chosen" not in part
