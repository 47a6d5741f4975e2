"""A study run into a store: only what is missing, every record as soon as it is measured."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mariotte import accounting, architectures
from mariotte import chain as chains
from mariotte.data import corpora
from mariotte.errors import StudyError
from mariotte.evaluate.base import Measure
from mariotte.experiments import identity
from mariotte.experiments.artifacts import Shelf
from mariotte.experiments.branches import Branches
from mariotte.experiments.environment import environment
from mariotte.experiments.pipeline import Outcome, Task, now
from mariotte.experiments.runners.inline import inline
from mariotte.experiments.runners.processes import processes
from mariotte.experiments.runners.ray import check_answers, on_ray
from mariotte.experiments.study import Study, read
from mariotte.experiments.tree import grow
from mariotte.locate import read_config
from mariotte.models.load import find_device, locate, weight_files
from mariotte.models.step import Counters
from mariotte.store import open_store
from mariotte.store.base import Store
from mariotte.store.record import Failure


@dataclass(frozen=True)
class Plan:
    """What a study asks for, before anything of it is done.

    Parameters
    ----------
    models, seeds : how many
    cuts : compressions without recovery, models and seeds counted
    checkpoints : compressed models, recovered ones among them
    experiments : checkpoints, and one dense model each
    evaluations : checkpoints times kinds of measure (loss, tasks, ...): three corpora are one evaluation of the loss
    records : experiments times measures
    loads : models loaded
    preparations, applications : steps prepared, each once a state, and applied
    unshared_loads, unshared_applications : what they would be if every chain were run alone; as many would be prepared
        as applied
    recovery_tokens : seen by all recoveries together, with what each shares with a longer one
    shared_tokens : the same when a longer recovery goes on from a shorter one's trunk
    """

    models: int
    seeds: int
    cuts: int
    checkpoints: int
    experiments: int
    evaluations: dict[str, int]
    records: int
    loads: int
    preparations: int
    applications: int
    unshared_loads: int
    unshared_applications: int
    recovery_tokens: int
    shared_tokens: int


@dataclass
class Summary:
    """What one run did."""

    study: str
    experiments: int = 0
    skipped: int = 0
    failed_before: int = 0
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
    for measure in {text: m for name in study.models for text, (m, _) in _measures(study, name).items()}.values():
        measure.check()
    if study.calibration is not None:
        corpora.find(study.calibration.corpus)
    if study.run.runner != "ray":  # whose workers may have what this machine lacks
        find_device(study.run.device)
    elif study.run.ray_address not in (None, "auto", "local"):
        check_answers(study.run.ray_address)
    if len(set(study.models)) < len(study.models):
        raise StudyError(f"study {study.name!r} names a model twice: name each once")
    for name in study.models:
        folder = locate(name)
        architectures.shape(read_config(folder))
        weight_files(folder)
    return plan(study)


def plan(study: Study) -> Plan:
    """What a study asks for, counted from its file alone: models and text need not be here.

    Raises
    ------
    MariotteError
        For a chain or a measure that nothing defines.
    """
    seeds = len(set(study.seeds))
    cuts = checkpoints = records = preparations = applications = unshared = tokens = shared = 0
    evaluations: dict[str, int] = {}
    for model in study.models:
        measures = [(identity.measure_name(measure), of) for measure, of in _measures(study, model).values()]
        nodes = list(grow(identity.resolve(chain) for chain in study.expanded(model)).walk())
        wanted = [node for node in nodes if node.wanted and node.parts]
        recovered = [node for node in wanted if any(part.recovers for part in node.parts)]
        cuts += seeds * (len(wanted) - len(recovered))
        checkpoints += seeds * len(wanted)
        for name in dict.fromkeys(name for name, _ in measures):
            of_all = (name, "all") in measures
            evaluations[name] = evaluations.get(name, 0) + seeds * (len(wanted) - (0 if of_all else len(recovered)))
        for _, of in measures:
            records += seeds * (len(wanted) - (0 if of == "all" else len(recovered))) + 1
        groups = [group for node in nodes for group in node.groups]
        preparations += seeds * len(groups)
        applications += seeds * (len(nodes) - 1)
        unshared += seeds * sum(len(node.parts) for node in wanted)
        tokens += seeds * sum(int(part.amount) for node in recovered for part in node.parts if part.recovers)
        shared += seeds * sum(
            round(group.step.training_tokens([int(amount) for amount in group.children]))
            for group in groups
            if group.step.family == "recovery"
        )
    return Plan(
        models=len(study.models),
        seeds=seeds,
        cuts=cuts,
        checkpoints=checkpoints,
        experiments=checkpoints + len(study.models),
        evaluations=evaluations,
        records=records,
        loads=len(study.models),
        preparations=preparations,
        applications=applications,
        unshared_loads=checkpoints,
        unshared_applications=unshared,
        recovery_tokens=tokens,
        shared_tokens=shared,
    )


def work_folder(store: Store) -> Path:
    """Where preparations and trunks of a store's studies are kept until they are recorded."""
    name = store.name.removeprefix("sqlite:///")
    return Path(f"{name}.work") if "://" not in name else Path.cwd() / "mariotte.work"


def artifacts_folder(store: Store) -> Path:
    """Where the checkpoints that a store's studies keep are, unless another folder is asked for."""
    return work_folder(store).with_suffix(".artifacts")


def by_size(models: Sequence[str]) -> list[str]:
    """Models with the most weights first: what takes longest must not begin last, with nobody else at work."""
    return sorted(models, key=lambda name: -accounting.count(read_config(locate(name))).n_params)


def run(
    study: Study,
    store: Store,
    *,
    toml: str = "",
    work: Path | None = None,
    artifacts: Path | None = None,
    retry_failed: bool = False,
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
    artifacts : folder of the checkpoints that the study keeps; None puts it beside the store
    retry_failed : try again what failed in an earlier run; without it only models that could not even be begun with
        are
    progress : told the stage and the share of it that is done
    finished : told every experiment when it is stored

    Raises
    ------
    MariotteError
        When the study cannot be run; what was measured before is in the store.
    """
    started, began = now(), time.perf_counter()
    check(study)
    folder = (work or work_folder(store) / study.name).absolute()  # a worker elsewhere may have another one to begin in
    summary = Summary(study.name)
    shelves = (artifacts or artifacts_folder(store)).absolute()
    measures = {name: _measures(study, name) for name in study.models}
    keep = study.run.keep
    # The first measure of a model says which of its checkpoints is the best.
    judges = {name: next(iter(texts.items())) for name, texts in measures.items()}
    failed = frozenset[str]() if retry_failed else _left_alone(store, study)
    asked = [
        Task(
            study=study.name,
            model=name,
            chains=tuple(str(chain) for chain in study.expanded(name)),
            measures={text: of for text, (_, of) in measures[name].items()},
            seeds=tuple(dict.fromkeys(study.seeds)),
            calibration=study.calibration,
            work=folder,
            device=study.run.device,
            dtype=study.run.dtype,
            # Ray's workers have the processors that they ask for, and torch would take all of the machine's.
            threads=study.run.threads or (max(1, int(study.run.cpus)) if study.run.runner == "ray" else None),
            shelf=None
            if keep == "none"
            else Shelf(folder=shelves / study.name, model=name, keep=keep, rising=_rises(judges[name][1][0])),
        )
        for name in by_size(study.models)
    ]

    def standing(tasks: Sequence[Task]) -> list[Task]:
        """Tasks with what the store has of them now, and without what a killed process left half-written."""
        known: dict[str, float] = {}
        if keep == "best":
            for by, (judge, _) in judges.values():
                metric = next(iter(judge.metrics))
                known |= {r.id: r.metrics[metric] for r in store.records(measure=by) if metric in r.metrics}
        for task in tasks:
            if task.shelf is not None:
                task.shelf.sweep()
        done, left_alone = frozenset(store.ids()), _left_alone(store, study)
        dense = {record.id: record for record in store.records(chain=str(chains.Chain()))}
        return [replace(task, done=done, failed=left_alone, dense=dense, known=known) for task in tasks]

    with ExitStack() as held:
        claims = store.claims(study.name)
        if claims is None:
            held.enter_context(_alone(study.name, folder))
        else:
            held.enter_context(claims)
            _made(study.name, folder)
        for failure in store.failures(study=study.name):
            if failure.experiment not in failed:
                store.clear_failures(study=study.name, experiment=failure.experiment)
        branches = (
            Branches(standing(asked), apart=study.run.runner == "ray")
            if claims is None
            else Branches(asked, apart=True, claims=claims, renew=lambda task: standing([task])[0])
        )
        outcomes = _outcomes(study, branches, summary.counters, progress)
        told: set[str] = set()
        for outcome in outcomes:
            summary.experiments += 1
            summary.failed_before += outcome.before
            if outcome.ids:
                summary.records += store.add(outcome.records) if outcome.records else 0
                summary.skipped += not outcome.records
                store.share(study.name, outcome.ids)
            if outcome.failure is not None:
                store.add_failure(outcome.failure)
                summary.failures.append(outcome.failure)
            elif outcome.experiment in failed and not outcome.before:
                # Another study found it meanwhile, or its checkpoint is not asked for any more.
                store.clear_failures(study=study.name, experiment=outcome.experiment)
            branches.heard(outcome)
            told.add(outcome.experiment)
            finished(outcome)
        _forget(store, study, told, {failure.model for failure in summary.failures if failure.stage == "setup"})
        summary.seconds = time.perf_counter() - began
        store.add_run(
            {
                "study": study.name,
                "toml": toml,
                "started": started,
                "finished": now(),
                "counters": asdict(summary.counters),
                "environment": environment("cpu" if study.run.runner == "ray" else study.run.device),
                "cost": {"seconds": round(summary.seconds, 3)},
                "records": summary.records,
                "skipped": summary.skipped,
                "failures": len(summary.failures),
            }
        )
        if not summary.failures and not summary.failed_before:
            _remove(folder)
            if work is None:
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()  # unless another study's work is in it
    broken = {failure.model for failure in summary.failures if failure.stage == "setup"}
    if len(broken) == len(summary.failures) == summary.experiments == len(study.models):
        # Not one model could be begun with: that is the user's to mend, and no study that went on without a part.
        raise StudyError(f"study {study.name!r} cannot be run: {summary.failures[0].error}")
    return summary


def _outcomes(
    study: Study, branches: Branches, counters: Counters, progress: Callable[[str, float], None]
) -> Iterator[Outcome]:
    """What the study's runner makes of its branches."""
    setting = study.run
    if setting.runner == "ray":
        gpus = (0.0 if setting.device == "cpu" else 1.0) if setting.gpus is None else setting.gpus
        return on_ray(
            branches,
            counters,
            progress,
            cpus=setting.cpus,
            gpus=gpus,
            address=setting.ray_address,
            workers=setting.workers if setting.workers > 1 else None,
        )
    workers = min(setting.workers, len(branches))
    if setting.runner == "processes" or (setting.runner is None and workers > 1):
        return processes(branches, counters, progress, workers)
    return inline(branches, counters, progress)


def _left_alone(store: Store, study: Study) -> frozenset[str]:
    """Experiments that failed and are not tried again unless that is asked for."""
    # What stopped a model before its first experiment is the user's to mend, and cheap to try again.
    return frozenset(failure.experiment for failure in store.failures(study=study.name) if failure.stage != "setup")


def _rises(judge: Measure) -> bool:
    """Whether more is better of a measure's first metric."""
    return next(iter(judge.metrics.values())) not in ("loss", "size")


def _measures(study: Study, model: str) -> dict[str, tuple[Measure, str]]:
    """The measures of a study's model by their text, each with the chains that it is for.

    Raises
    ------
    MariotteError
        For a measure that nothing defines, or that is named once for all chains and once for some.
    """
    found: dict[str, tuple[Measure, str]] = {}
    for entry in study.measured(model):
        measure = identity.resolve_measure(entry.measure)
        text = identity.measure_text(measure)
        if found.setdefault(text, (measure, entry.of))[1] != entry.of:
            raise StudyError(f"study {study.name!r} names the measure {text} for all chains and for cuts: name it once")
    return found


def _forget(store: Store, study: Study, told: set[str], broken: set[str]) -> None:
    """Clear failures of what the study does not ask for any more; models that were not begun with keep theirs."""
    for failure in store.failures(study=study.name):
        if failure.experiment not in told and failure.model not in broken:
            store.clear_failures(study=study.name, experiment=failure.experiment)


def _made(study: str, folder: Path) -> Path:
    """The study's folder, where it is sure that something can be written.

    Raises
    ------
    StudyError
        When it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.with_name(f"{folder.name}.lock").open("w").close()
    except OSError as error:
        raise StudyError(f"study {study!r} cannot keep its work in {folder}: {error.strerror}") from error
    return folder


@contextmanager
def _alone(study: str, folder: Path) -> Generator[None]:
    """Hold the study's folder: two processes that prepare the same steps would write over one another.

    Raises
    ------
    StudyError
        When another process runs the study into the same store, or the folder cannot be made.
    """
    with _made(study, folder).with_name(f"{folder.name}.lock").open("w") as lock:
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
    with contextlib.suppress(FileNotFoundError):  # another process that shared the study ended first
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
