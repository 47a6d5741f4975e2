"""A study run into a store: only what is missing, every record as soon as it is measured."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mariotte import architectures
from mariotte import chain as chains
from mariotte.data import corpora
from mariotte.errors import StudyError
from mariotte.experiments import identity
from mariotte.experiments.environment import environment
from mariotte.experiments.pipeline import Outcome, Task, now
from mariotte.experiments.runners.inline import inline
from mariotte.experiments.runners.processes import processes
from mariotte.experiments.study import Study, read
from mariotte.experiments.tree import grow
from mariotte.models.load import find_device, locate, read_config, weight_files
from mariotte.models.step import Counters
from mariotte.store import open_store
from mariotte.store.base import Store
from mariotte.store.record import Failure


@dataclass(frozen=True)
class Plan:
    """What a study asks for, before anything of it is done.

    Parameters
    ----------
    models, chains, seeds, measures : how many of each
    experiments : chains on models, seeds counted, and one dense model each
    records : experiments times measures
    preparations : steps prepared, each once a state
    applications : steps applied
    """

    models: int
    chains: int
    seeds: int
    measures: int
    experiments: int
    records: int
    preparations: int
    applications: int


@dataclass
class Summary:
    """What one run did."""

    study: str
    experiments: int = 0
    skipped: int = 0
    records: int = 0
    failures: list[Failure] = field(default_factory=lambda: list[Failure]())
    counters: Counters = field(default_factory=Counters)
    seconds: float = 0.0


def check(study: Study) -> Plan:
    """Resolve everything that a study names, without loading a weight.

    Raises
    ------
    MariotteError
        For the first thing that is not there or not possible; better now than after an hour.
    """
    expanded = study.expanded()
    root = grow(identity.resolve(chain) for chain in expanded)
    for text in study.measures:
        identity.resolve_measure(text).check()
    if study.calibration is not None:
        corpora.find(study.calibration.corpus)
    find_device(study.run.device)
    if len(set(study.models)) < len(study.models):
        raise StudyError(f"study {study.name!r} names a model twice: name each once")
    for name in study.models:
        folder = locate(name)
        architectures.shape(read_config(folder))
        weight_files(folder)
    nodes = list(root.walk())
    times = len(study.models) * len(set(study.seeds))
    experiments = len(study.models) + times * sum(node.wanted for node in nodes if node.parts)
    return Plan(
        models=len(study.models),
        chains=len(expanded),
        seeds=len(set(study.seeds)),
        measures=len(study.measures),
        experiments=experiments,
        records=experiments * len(study.measures),
        preparations=times * sum(len(node.groups) for node in nodes),
        applications=times * (len(nodes) - 1),
    )


def work_folder(store: Store) -> Path:
    """Where preparations and trunks of a store's studies are kept until they are recorded."""
    name = store.name.removeprefix("sqlite:///")
    return Path(f"{name}.work") if "://" not in name else Path.cwd() / "mariotte.work"


def run(
    study: Study,
    store: Store,
    *,
    toml: str = "",
    work: Path | None = None,
    progress: Callable[[str, float], None] = lambda stage, done: None,
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> Summary:
    """Run what is missing of a study and add every record to the store when it is measured.

    Parameters
    ----------
    study : what to run
    store : where records go; those that it has are not measured again
    toml : text of the study file, kept with the run
    work : folder of preparations and trunks, which an interrupted run leaves and the next one goes on from; None puts
        it beside the store. It is removed when the study is complete
    progress : told the stage and the share of it that is done
    finished : told every experiment when it is stored

    Raises
    ------
    MariotteError
        When the study cannot be run; what was measured before is in the store.
    """
    started, began = now(), time.perf_counter()
    check(study)
    folder = work or work_folder(store) / study.name
    summary = Summary(study.name)
    texts = tuple(str(chain) for chain in study.expanded())
    measures = tuple(identity.measure_text(identity.resolve_measure(text)) for text in study.measures)
    tasks = [
        Task(
            study=study.name,
            model=name,
            chains=texts,
            measures=measures,
            seeds=tuple(dict.fromkeys(study.seeds)),
            calibration=study.calibration,
            work=folder,
            device=study.run.device,
            dtype=study.run.dtype,
            threads=study.run.threads,
            done=frozenset(store.ids()),
            dense={record.id: record for record in store.records(chain=str(chains.Chain()))},
        )
        for name in study.models
    ]
    workers = min(study.run.workers, len(tasks))
    with _alone(study.name, folder):
        store.clear_failures(study=study.name)
        outcomes = (
            processes(tasks, summary.counters, progress, workers)
            if workers > 1
            else inline(tasks, summary.counters, progress)
        )
        for outcome in outcomes:
            summary.experiments += 1
            if outcome.failure is not None:
                store.add_failure(outcome.failure)
                summary.failures.append(outcome.failure)
            else:
                summary.records += store.add(outcome.records) if outcome.records else 0
                summary.skipped += not outcome.records
                store.share(study.name, outcome.ids)
            finished(outcome)
        summary.seconds = time.perf_counter() - began
        store.add_run(
            {
                "study": study.name,
                "toml": toml,
                "started": started,
                "finished": now(),
                "counters": asdict(summary.counters),
                "environment": environment(study.run.device),
                "cost": {"seconds": round(summary.seconds, 3)},
                "records": summary.records,
                "skipped": summary.skipped,
                "failures": len(summary.failures),
            }
        )
        if not summary.failures:
            _remove(folder)
            if work is None:
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()  # unless another study's work is in it
    if all(failure.stage == "setup" for failure in summary.failures) and len(summary.failures) == len(tasks):
        # Not one model could be begun with: that is the user's to mend, and no study that went on without a part.
        raise StudyError(f"study {study.name!r} cannot be run: {summary.failures[0].error}")
    return summary


@contextmanager
def _alone(study: str, folder: Path) -> Generator[None]:
    """Hold the study's folder: two processes that prepare the same steps would write over one another.

    Raises
    ------
    StudyError
        When another process runs the study into the same store, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError as error:
        raise StudyError(f"study {study!r} cannot keep its work in {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(
                f"study {study!r} is being run into this store by another process: wait for it, or end it first"
            ) from None
        yield


def _remove(folder: Path) -> None:
    """Remove a study's folder; a kill half-way leaves nothing that looks whole."""
    going = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def run_study(path: str | Path, store: str | Path | None = None) -> Summary:
    """Run what is missing of a study file into a store.

    Parameters
    ----------
    path : the study file
    store : a path or URL; None takes ``mariotte.db`` here, or what ``MARIOTTE_STORE`` names

    Raises
    ------
    MariotteError
        When the study cannot be read or run, or the store not be opened.
    """
    study = read(path)
    with open_store(store, create=True) as opened:
        return run(study, opened, toml=Path(path).read_text(encoding="utf-8"))
