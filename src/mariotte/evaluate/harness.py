"""The tasks of lm-eval, asked of a loaded model: found quickly, loaded once a process, every answer kept by item.

The items come from ``MARIOTTE_DATA/tasks`` where a file there holds them, else from the hub; prompt, choices and
scoring are lm-eval's either way.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mariotte.errors import DataError, ModelError, UnknownNameError
from mariotte.evaluate import choices, offline
from mariotte.models.model import Model
from mariotte.store.record import digest

BATCH = 16
"""Rows in one forward pass; fixed, so that the same model gives the same numbers."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One task or group of lm-eval with its data.

    Parameters
    ----------
    version : as lm-eval numbers it; the version of the group for a group
    leaves : the tasks it consists of, by name
    group : whether it is a group, which may lack some of its tasks where they come from files
    """

    version: str
    leaves: Mapping[str, Any]
    group: bool


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was answered to each item of a task.

    Parameters
    ----------
    correct : whether it was right, by summed log-likelihood of the choice: lm-eval's ``acc``; without choices, whether
        the right text is the likeliest token by token
    normalized : the same by log-likelihood per character, its ``acc_norm``; None where the task does not say
    chosen : index of the choice by sum; None for tasks without choices
    chosen_normalized : index of the choice per character; None with `normalized`
    """

    correct: tuple[bool, ...]
    normalized: tuple[bool, ...] | None
    chosen: tuple[int, ...] | None
    chosen_normalized: tuple[int, ...] | None


def _folder() -> Path:
    """Where lm-eval is, without importing it, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "tasks outside the testbed are asked through lm-eval, which is not installed: "
            "run `pip install 'mariotte[tasks]'`, or measure tasks:testbed"
        )
    return Path(spec.submodule_search_locations[0])


def _module(name: str) -> Any:
    """A module of lm-eval: an optional dependency, and an untyped one."""
    _folder()
    found = importlib.import_module(name)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what we ask for on purpose, such as zero-shot
    return found


@functools.lru_cache(maxsize=4)
def _descriptions(root: Path) -> tuple[Path, ...]:
    return tuple(sorted(root.rglob("*.yaml")))


def _home(name: str, root: Path) -> Path | None:
    """The folder below `root` that describes a task, as far as file names tell; None where only a full index can.

    Of a task its own folder; of a group the one that holds all of its tasks, which may lie in several folders.
    """
    wanted = re.compile(rf"^[\"']?(task|group)[\"']?:\s*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    for path in _descriptions(root):
        likely = path.stem in (name, f"_{name}") or path.parent.name == name
        found = wanted.search(path.read_text(encoding="utf-8", errors="replace")) if likely else None
        if found is not None:
            parts = path.relative_to(root).parts
            return path.parent if found[1] == "task" else root / parts[0] if len(parts) > 1 else root
    return None


def _roots(include: str | None) -> list[Path]:
    """Where descriptions are: lm-eval's own, and before them those of the user."""
    own = _folder() / "tasks"
    if include is None:
        return [own]
    if not Path(include).is_dir():
        raise DataError(f"include must be a folder of lm-eval task descriptions, got {include!r}: name one that exists")
    return [Path(include).resolve(), own]


@functools.lru_cache(maxsize=4)
def _manager(folders: tuple[Path, ...], defaults: bool) -> Any:
    """lm-eval's index of the tasks in some folders; that of all its own takes some fifteen seconds."""
    return _module("lm_eval.tasks").TaskManager(include_path=[*map(str, folders)], include_defaults=defaults)


def _find(name: str, include: str | None) -> Any:
    """An index that has `name`: of one folder where file names tell which, of everything where they do not."""
    roots = _roots(include)
    for root in roots:
        if (home := _home(name, root)) is not None:
            return _manager((home,), False)
    full = _manager(tuple(roots[:-1]), True)
    if name not in full.all_tasks:
        near = difflib.get_close_matches(name, cast("list[str]", full.all_tasks), n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownNameError(
            f"neither the testbed nor lm-eval has a task {name!r}{hint} (`lm-eval ls tasks` lists its own)"
        )
    return full


def check(names: Sequence[str], include: str | None = None) -> None:
    """Refuse names that lm-eval does not know, before anything is loaded; well-known ones cost no index.

    Raises
    ------
    DataError
        When lm-eval is not installed, or `include` is no folder.
    UnknownNameError
        When there is no such task.
    """
    for name in names:
        if all(_home(name, root) is None for root in _roots(include)):
            _find(name, include)


MMLU = ("mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
"""The groups of mmlu, in its order."""


def _sources(name: str, include: str | None) -> tuple[Any, dict[str, offline.Source]]:
    """An index that describes `name`, and the files that hold its items or those of its tasks; no files for the hub's.

    What a user's own folder describes is never taken from a file.
    """
    if offline.folder() is None or (include is not None and _home(name, _roots(include)[0]) is not None):
        return None, {}
    single = None if name in MMLU else offline.find(name)
    if single is None and name != "mmlu" and name not in MMLU:
        return None, {}
    if single is not None:
        return _find(name, None), {name: single}
    # The folder of the task itself: beside it lie a dozen variants of it, which take seconds to index.
    manager = _manager((_folder() / "tasks/mmlu/default",), False)
    subjects = [
        subject
        for group in (MMLU if name == "mmlu" else (name,))
        for subject in sorted(manager.task_index[f"{group}_tasks"].tags)
    ]
    found = {subject: offline.find(subject) for subject in subjects}
    return manager, {subject: source for subject, source in found.items() if source is not None}


@contextlib.contextmanager
def _without_bars() -> Generator[None]:
    """Datasets draws a bar for every look at items that a task rewrites; they are there in a moment."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _prepare_(task: Any) -> None:
    """Let a task rewrite its items once: lm-eval does it again at every look at them, for HellaSwag ten thousand."""
    if task.config.process_docs is not None:
        split = task.config.test_split or task.config.validation_split
        with _without_bars():
            items = task.eval_docs
        task.dataset[split] = items
        task.config.process_docs = None


def _items(source: offline.Source) -> Callable[..., Any]:
    """What lm-eval calls for a task's data, with the task's metadata, which the items do not depend on."""

    def read(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {source.split: Dataset.from_list(source.docs())}

    return read


def _from_files(manager: Any, sources: Mapping[str, offline.Source]) -> dict[str, Any]:
    """lm-eval's own tasks, with the items of files in place of the hub's."""
    overrides = [
        {
            "task": leaf,
            "custom_dataset": _items(source),
            # No other split is there, and nothing is shown before a question.
            "training_split": None,
            "fewshot_split": None,
            "validation_split": source.split if source.split == "validation" else None,
            "test_split": source.split if source.split == "test" else None,
        }
        for leaf, source in sources.items()
    ]
    with _without_bars():
        return manager.load([{"group": "from_files", "task": overrides}])["tasks"]


def _from_hub(name: str, include: str | None) -> Any:
    from datasets.exceptions import DatasetsError

    manager = _find(name, include)
    try:
        return manager.load([name])
    except (OSError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        place = offline.hint(name)
        raise DataError(
            f"the data of the lm-eval task {name!r} cannot be loaded ({type(error).__name__}: {reason}): "
            f"fetch them where there is a network{place and f', or {place}'}"
        ) from error


def _version_of_group(name: str, manager: Any) -> str:
    """As the group's description states it, which is read here because its tasks were loaded without it."""
    description = Path(manager.task_index[name].yaml_path).read_text(encoding="utf-8")
    stated = re.search(r"^\s+version:\s*(\S+)", description, re.MULTILINE)
    return str(stated and stated[1])


def load(name: str, include: str | None = None) -> Loaded:
    """A task with its items, read once a process.

    Raises
    ------
    DataError
        When its items cannot be had, or answers to it are not judged right or wrong by likelihood.
    """
    return _load(name, include, _state(name, include))


def _state(name: str, include: str | None) -> tuple[tuple[str, int, int], ...]:
    """What changes when the items of a task do, on this machine."""
    return tuple(source.state for source in _sources(name, include)[1].values())


@functools.lru_cache(maxsize=64)
def _load(name: str, include: str | None, state: tuple[tuple[str, int, int], ...]) -> Loaded:
    manager, sources = _sources(name, include)
    group = name == "mmlu" or name in MMLU
    if sources:
        leaves = _from_files(manager, sources)
        stated = _version_of_group(name, manager) if group else str(leaves[name].VERSION)
    else:
        found = _from_hub(name, include)
        leaves = cast("dict[str, Any]", found["tasks"])
        group = name in found["groups"]
        if group:
            metadata = cast("dict[str, Any]", found["groups"][name].metadata or {})
            stated = str(metadata.get("version"))
        else:
            stated = ", ".join(sorted({str(task.VERSION) for task in leaves.values()}))
    for leaf, task in leaves.items():
        metrics = [metric["metric"] for metric in task.config.metric_list or ()]
        if task.OUTPUT_TYPE != "multiple_choice" and (task.OUTPUT_TYPE != "loglikelihood" or "acc" not in metrics):
            raise DataError(
                f"{leaf!r} is no multiple-choice task (lm-eval: {task.OUTPUT_TYPE}): name tasks that are, such as piqa"
            )
        _prepare_(task)
        if not len(task.eval_docs):
            raise DataError(f"the lm-eval task {leaf!r} must have items to ask, and has none: mend its data")
    return Loaded(version=stated, leaves=leaves, group=group)


def describe(name: str, items: int | None, include: str | None = None) -> dict[str, Any]:
    """Version, number of items, chance and hash of what is asked: all of a number but the model.

    Of a group also the number of its tasks, for one that is read from files has those whose files are there. Chance is
    0 where there are no choices: a model that knows nothing does not find the right text.
    """
    return dict(_describe(name, items, include, _state(name, include)))


@functools.lru_cache(maxsize=64)
def _describe(
    name: str, items: int | None, include: str | None, state: tuple[tuple[str, int, int], ...]
) -> dict[str, Any]:
    loaded = _load(name, include, state)
    asked: list[Any] = []
    chances: list[float] = []
    for leaf, task in loaded.leaves.items():
        for _, doc in zip(range(items) if items is not None else iter(int, 1), task.eval_docs, strict=False):
            choices = [*map(str, task.doc_to_choice(doc))] if task.OUTPUT_TYPE == "multiple_choice" else []
            chances.append(1 / len(choices) if choices else 0.0)
            asked.append([leaf, task.doc_to_text(doc), choices, task.doc_to_target(doc)])
    return {
        "version": loaded.version,
        "chance": sum(chances) / len(chances),
        "n": len(asked),
        "items_sha256": digest(asked),
        **({"tasks": len(loaded.leaves)} if loaded.group else {}),
    }


def version() -> str:
    """Of lm-eval, as installed."""
    return importlib.metadata.version("lm_eval")


def ask(model: Model, names: Sequence[str], items: int | None, include: str | None = None) -> dict[str, Answers]:
    """Every task's answers of a model, without examples in the prompt.

    Parameters
    ----------
    items : of each task, the first ones; of each task of a group
    """
    loaded = {name: load(name, include) for name in names}
    leaves = {leaf: task for one in loaded.values() for leaf, task in one.leaves.items()}
    if model.kind == "masked":
        for leaf, task in leaves.items():
            if task.OUTPUT_TYPE != "multiple_choice":
                raise DataError(
                    f"{leaf!r} asks for the next word, which the encoder {model.name} does not predict: name tasks of "
                    "multiple choice"
                )
        lm = _pseudo(model)
    else:
        # A copy of the tokenizer: lm-eval gives it a padding token where it has none.
        lm = _module("lm_eval.models.huggingface").HFLM(
            pretrained=model.hf,
            backend=model.kind,
            tokenizer=copy.deepcopy(model.tokenizer),
            batch_size=BATCH,
        )
        lm.loglikelihood = functools.partial(lm.loglikelihood, disable_tqdm=True)
    # Every task is loaded: none is looked for. `simple_evaluate` would spend seconds on asking the system what it is.
    every = _manager((), False).load([*leaves.values()])
    for task in every["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    found = cast(
        "dict[str, Any]",
        _module("lm_eval").evaluate(lm=lm, task_dict=every, limit=items, bootstrap_iters=0, log_samples=True),
    )
    answers: dict[str, Answers] = {}
    for name, one in loaded.items():
        samples = [
            (task, sample)
            for leaf, task in one.leaves.items()
            for sample in sorted(found["samples"][leaf], key=lambda s: s["doc_id"])
        ]
        sums = [[float(value) for value, *_ in sample["filtered_resps"]] for _, sample in samples]
        if not all(math.isfinite(value) for row in sums for value in row):
            raise ModelError(f"accuracy cannot be measured: {model.name} computes non-finite logits")
        offered = [
            [*map(str, task.doc_to_choice(sample["doc"]))] if task.OUTPUT_TYPE == "multiple_choice" else []
            for task, sample in samples
        ]
        per_character = all("acc_norm" in sample for _, sample in samples)
        answers[name] = Answers(
            correct=tuple(bool(sample["acc"]) for _, sample in samples),
            normalized=tuple(bool(sample["acc_norm"]) for _, sample in samples) if per_character else None,
            chosen=tuple(_largest(row[: len(some)]) for row, some in zip(sums, offered, strict=True))
            if all(offered)
            else None,
            chosen_normalized=tuple(
                _largest([value / len(choice) for value, choice in zip(row, some, strict=False)])
                for row, some in zip(sums, offered, strict=True)
            )
            if per_character and all(offered)
            else None,
        )
    return answers


def _pseudo(model: Model) -> Any:
    """What lm-eval asks an encoder through: pseudo-likelihoods in place of likelihoods.

    A context that does not fit into the model's positions loses its beginning, as it does for other models.
    """
    base = _module("lm_eval.api.model").LM
    tokenizer, longest = model.tokenizer, model.longest
    assert tokenizer is not None
    before, after = choices.frame(tokenizer)

    def text(context: str, continuation: str) -> tuple[choices.Tokens, choices.Tokens, choices.Tokens]:
        # Spaces between the two belong to the second, as lm-eval has it.
        kept = context.rstrip()
        read, whole = (
            cast("list[int]", tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
            for part in (kept, context + continuation)
        )
        answer = whole[len(read) :]
        if not answer:
            raise DataError(
                f"every choice must be at least one token, and {continuation!r} is none to the tokenizer of "
                f"{model.name}: leave this task out"
            )
        room = len(read) if longest is None else max(0, longest - len(before) - len(answer) - len(after))
        return (*before, *read[len(read) - room if len(read) > room else 0 :]), tuple(answer), after

    def loglikelihood(_: object, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = choices.pseudo_log_likelihoods(model, [text(*request.args) for request in requests])
        return [(value, False) for value in found]  # greedy text is a matter of causal models

    def refused(_: object, requests: Sequence[Any]) -> Any:
        raise DataError(f"the encoder {model.name} generates no text: name tasks of multiple choice")

    methods = {"loglikelihood": loglikelihood, "loglikelihood_rolling": refused, "generate_until": refused}
    return type("Pseudo", (base,), methods)()


def _largest(values: Sequence[float]) -> int:
    """Index of the largest; the first of equals, as lm-eval takes it."""
    return max(range(len(values)), key=values.__getitem__)
