"""The tasks of lm-eval, asked of a loaded model: found quickly, loaded once a process, every answer kept by item."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mariotte.errors import DataError, UnknownNameError
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
    """

    version: str
    leaves: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Which items of a task were answered rightly.

    Parameters
    ----------
    correct : by summed log-likelihood of the choice, lm-eval's ``acc``
    normalized : by log-likelihood per byte, its ``acc_norm``; None where the task does not say
    """

    correct: tuple[bool, ...]
    normalized: tuple[bool, ...] | None


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
    """The folder below `root` that describes a task, as far as file names tell; None where only a full index can."""
    wanted = re.compile(rf"^(?:task|group):\s*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    for path in _descriptions(root):
        likely = path.stem in (name, f"_{name}") or path.parent.name == name
        if likely and wanted.search(path.read_text(encoding="utf-8", errors="replace")):
            parts = path.relative_to(root).parts
            return root / parts[0] if len(parts) > 1 else root
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


@functools.lru_cache(maxsize=64)
def load(name: str, include: str | None = None) -> Loaded:
    """A task with its data, read once a process.

    Raises
    ------
    DataError
        When its data cannot be had, or it is not multiple choice.
    """
    from datasets.exceptions import DatasetsError

    manager = _find(name, include)
    try:
        found = manager.load([name])
    except (OSError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(
            f"the data of the lm-eval task {name!r} cannot be loaded ({type(error).__name__}: {reason}): "
            "fetch them where there is a network"
        ) from error
    leaves = cast("dict[str, Any]", found["tasks"])
    for leaf, task in leaves.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise DataError(
                f"{leaf!r} is no multiple-choice task (lm-eval: {task.OUTPUT_TYPE}): name tasks that are, such as piqa"
            )
    if name in found["groups"]:
        metadata = cast("dict[str, Any]", found["groups"][name].metadata or {})
        stated = str(metadata.get("version"))
    else:
        stated = ", ".join(sorted({str(task.VERSION) for task in leaves.values()}))
    return Loaded(version=stated, leaves=leaves)


@functools.lru_cache(maxsize=64)
def describe(name: str, items: int | None, include: str | None = None) -> dict[str, Any]:
    """Version, number of items, chance and hash of what is asked: all of a number but the model."""
    loaded = load(name, include)
    asked: list[Any] = []
    chances: list[float] = []
    for leaf, task in loaded.leaves.items():
        for _, doc in zip(range(items) if items is not None else iter(int, 1), task.eval_docs, strict=False):
            choices = [*map(str, task.doc_to_choice(doc))]
            chances.append(1 / len(choices))
            asked.append([leaf, task.doc_to_text(doc), choices, task.doc_to_target(doc)])
    return {
        "version": loaded.version,
        "chance": sum(chances) / len(chances),
        "n": len(asked),
        "items_sha256": digest(asked),
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
    # A copy of the tokenizer: lm-eval gives it a padding token where it has none.
    lm = _module("lm_eval.models.huggingface").HFLM(
        pretrained=model.hf,
        tokenizer=copy.deepcopy(model.tokenizer),
        batch_size=BATCH,
    )
    lm.loglikelihood = functools.partial(lm.loglikelihood, disable_tqdm=True)
    found = cast(
        "dict[str, Any]",
        _module("lm_eval").simple_evaluate(
            model=lm,
            tasks=[*leaves.values()],
            task_manager=_find(names[0], include),
            num_fewshot=0,
            limit=items,
            bootstrap_iters=0,
            log_samples=True,
            # None leaves torch's generator as it is: lm-eval seeds it by default.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        ),
    )
    answers: dict[str, Answers] = {}
    for name, one in loaded.items():
        samples = [
            sample for leaf in one.leaves for sample in sorted(found["samples"][leaf], key=lambda s: s["doc_id"])
        ]
        answers[name] = Answers(
            correct=tuple(bool(sample["acc"]) for sample in samples),
            normalized=tuple(bool(sample["acc_norm"]) for sample in samples)
            if all("acc_norm" in sample for sample in samples)
            else None,
        )
    return answers
