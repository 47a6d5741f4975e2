"""One model through its tree: loaded once, measured dense once, and what was found at each state written down."""

from __future__ import annotations

import datetime
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mariotte import chain as chains
from mariotte.data.tokens import Blocks
from mariotte.errors import MariotteError
from mariotte.evaluate.base import Measure, Measurement
from mariotte.experiments import foresight, identity
from mariotte.experiments.artifacts import Shelf
from mariotte.experiments.bench import Bench, Broken, Built, read_calibration
from mariotte.experiments.environment import environment
from mariotte.experiments.study import Calibration
from mariotte.experiments.tree import Node, grow
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.step import Counters, silent
from mariotte.store.record import Failure, Record, digest


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One model of a study: what a runner hands to a worker; plain values only.

    Parameters
    ----------
    study : which study asks
    model, device, dtype, threads : what to load and how to compute
    chains : canonical texts
    measures : canonical texts, each with the chains that it is for: all, or cuts
    seeds : of everything random; each goes through all chains
    calibration : text that steps may look at
    work : folder of preparations
    done : ids of the records that exist
    failed : ids of experiments that are not tried again
    settled : ids of experiments whose outcome was told already, and is not told again
    shelf : where compressed checkpoints are kept, None for nowhere
    dense : records of the dense model that exist, by id
    known : values by which the best checkpoints are chosen, as far as they are in the store, by the record's id
    branch : names the part of the study that this is, the same in every process that runs it
    """

    study: str
    model: str
    chains: tuple[str, ...]
    measures: Mapping[str, str]
    seeds: tuple[int, ...]
    calibration: Calibration | None
    work: Path
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    done: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    shelf: Shelf | None = None
    dense: Mapping[str, Record] = field(default_factory=lambda: dict[str, Record]())
    known: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    branch: str = ""


class Held:
    """The dense model that was loaded last and its calibration text, for the next task of the same model.

    No step changes either.
    """

    def __init__(self) -> None:
        self._of: tuple[str, str, str | None] | None = None
        self._model: Model | None = None
        self._text: Calibration | None = None
        self._blocks: Blocks | None = None

    def load(self, task: Task, counters: Counters) -> Model:
        """The dense model of a task."""
        of = task.model, task.device, task.dtype
        if self._model is None or self._of != of:
            self._of = self._model = None  # before the next one: two at once may be more than memory holds
            self._text = self._blocks = None
            self._model, self._of = load(*of), of
            counters.loads += 1
        return self._model

    def calibration(self, task: Task, model: Model) -> Blocks | None:
        """The calibration blocks of a task, as tokens of its model, which was loaded just before."""
        if self._text != task.calibration:
            self._text, self._blocks = task.calibration, read_calibration(task.calibration, model)
        return self._blocks


@dataclass(frozen=True)
class Serving:
    """An experiment that work is being done for: what is lost when the process that does it is killed."""

    experiment: str
    chain: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of one experiment: records, or a failure, or neither when all its records existed.

    Parameters
    ----------
    model, chain, experiment : which experiment, in words and by its id
    ids : of all its records, new and old
    records : the new ones
    failure : why there are none; beside records, why its checkpoint was not kept
    before : whether it failed in an earlier run and was not tried again
    """

    model: str
    chain: str
    experiment: str
    ids: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()
    failure: Failure | None = None
    before: bool = False


def nobody(served: tuple[Serving, ...]) -> None:
    """Told what is being worked on; nobody listens."""


def perform(
    task: Task,
    counters: Counters,
    progress: Callable[[str, float], None] = silent,
    serving: Callable[[tuple[Serving, ...]], None] = nobody,
    held: Held | None = None,
) -> Iterator[Outcome]:
    """Do what is missing of a task; the caller stores what comes back.

    A model that cannot be loaded or measured is one failure, of the stage ``setup``: the study's other models go on.
    A caller with several tasks of one model holds it between them.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    progress("loading", 0.0)
    try:
        held = held or Held()
        model = held.load(task, counters)
        calibration = held.calibration(task, model)
        measures = {text: identity.resolve_measure(text) for text in task.measures}
        protocols = {text: measure.protocol(model) for text, measure in measures.items()}
        root = grow(identity.resolve(chains.parse(text)) for text in task.chains)
        benches = [Bench(model, seed, calibration, task.work, counters, progress) for seed in task.seeds]
        recorders = [_Recorder(task, bench, measures, protocols) for bench in benches]
        for node in root.walk():
            recorders[0].bench.experiment_id(node.parts)  # now, so that text which is missing is missed before the work
        dense, measured = recorders[0].measure_dense(root)
    except Exception as error:  # memory among them; the study goes on without this model, and the store says so
        failure = _failure(task, digest([task.study, task.model]), str(chains.Chain()), task.seeds[0], "setup", error)
        yield Outcome(task.model, str(chains.Chain()), failure.experiment, failure=failure)
        return
    if measured.experiment not in task.settled:
        yield measured
    best = _best_that_lack(task.shelf, root, recorders) if task.shelf is not None else frozenset[str]()
    for bench, recorder in zip(benches, recorders, strict=True):
        missing: dict[int, list[str]] = {}
        lacking: set[int] = set()
        for node in root.walk():
            if not node.wanted or not node.parts:
                continue
            experiment = bench.experiment_id(node.parts)
            if experiment in task.settled:
                continue
            ids = recorder.record_ids(node)
            missing[id(node)] = [text for text, key in ids.items() if key not in task.done]
            if experiment in best or (task.shelf is not None and task.shelf.lacks(experiment)):
                lacking.add(id(node))
            if experiment in task.failed and (missing[id(node)] or id(node) in lacking):
                missing[id(node)] = []
                lacking.discard(id(node))
                yield Outcome(task.model, str(node.chain), experiment, before=True)
            elif not missing[id(node)] and id(node) not in lacking:
                yield Outcome(task.model, str(node.chain), experiment, tuple(ids.values()))
            else:
                try:
                    foresight.check(model.name, model.config, node.parts, model.rounded, device=model.device)
                except MariotteError as error:
                    missing[id(node)] = []
                    lacking.discard(id(node))
                    yield recorder.failed(Broken(node, "check", error))

        def needed(
            node: Node, missing: Mapping[int, list[str]] = missing, lacking: frozenset[int] = frozenset(lacking)
        ) -> bool:
            return bool(missing.get(id(node))) or id(node) in lacking

        def at(nodes: Sequence[Node], bench: Bench = bench) -> None:
            serving(tuple(Serving(bench.experiment_id(n.parts), str(n.chain), bench.seed) for n in nodes))

        bench.at = at
        for reached in bench.walk(root, model, needed):
            if isinstance(reached, Broken):
                yield recorder.failed(reached)
                continue
            try:
                yield recorder.measured(reached, missing[id(reached.node)], dense)
            except Exception as error:  # the study goes on without this experiment, and the store says so
                yield recorder.failed(Broken(reached.node, "measure", error))


def _best_that_lack(shelf: Shelf, root: Node, recorders: Sequence[_Recorder]) -> frozenset[str]:
    """Experiments that were the best of their amount when they were measured, and whose checkpoint is not there."""
    found: dict[float, tuple[float, str]] = {}
    for recorder in recorders:
        for node in root.walk():
            if not node.wanted or not node.parts or (value := recorder.known(node)) is None:
                continue
            amount, sign = float(node.parts[0].amount), -1 if shelf.rising else 1
            found.setdefault(amount, (value, recorder.bench.experiment_id(node.parts)))
            if sign * value < sign * found[amount][0]:
                found[amount] = (value, recorder.bench.experiment_id(node.parts))
    return frozenset(experiment for amount, (value, experiment) in found.items() if shelf.lacks_best(amount, value))


def _failure(task: Task, experiment: str, chain: str, seed: int, stage: str, error: Exception) -> Failure:
    said = str(error) if isinstance(error, MariotteError) else f"{type(error).__name__}: {error}"
    return Failure(
        experiment=experiment,
        study=task.study,
        model=task.model,
        chain=chain,
        seed=seed,
        stage=stage,
        error=" ".join(said.split()),
        traceback="".join(traceback.format_exception(error)),
        created=now(),
    )


@dataclass
class _Recorder:
    """Measures states and writes down what was found."""

    task: Task
    bench: Bench
    measures: Mapping[str, Measure]
    protocols: Mapping[str, Mapping[str, Any]]

    def record_ids(self, node: Node) -> dict[str, str]:
        """The id of the record of each measure of one state, by the measure's text."""
        experiment = self.bench.experiment_id(node.parts)
        recovered = any(part.recovers for part in node.parts)
        return {
            text: identity.record_id(experiment, measure, self.protocols[text])
            for text, measure in self.measures.items()
            if not (recovered and self.task.measures[text] == "cuts")
        }

    def known(self, node: Node) -> float | None:
        """What the store has of the study's first measure of one state, which the best checkpoints are chosen by."""
        return self.task.known.get(self.record_ids(node).get(next(iter(self.measures)), ""))

    def measure_dense(self, root: Node) -> tuple[dict[str, Measurement], Outcome]:
        """The dense model's measurements, from the store where it has them."""
        found: dict[str, Measurement] = {}
        records: list[Record] = []
        for text, key in self.record_ids(root).items():
            if key in self.task.dense:
                known = self.task.dense[key]
                found[text] = Measurement(metrics=known.metrics, protocol=known.protocol, details=known.details)
                continue
            self.bench.progress("measuring dense", 0.0)
            started = time.perf_counter()
            found[text] = self.measures[text].measure(self.bench.model)
            self.bench.counters.dense_evaluations += 1
            cost = {"measure_s": round(time.perf_counter() - started, 4)}
            records.append(self._record(Built(root, self.bench.model, cost), text, key, found[text], found[text]))
        ids = tuple(self.record_ids(root).values())
        return found, Outcome(self.task.model, str(root.chain), self.bench.experiment_id(()), ids, tuple(records))

    def measured(self, built: Built, missing: Sequence[str], dense: Mapping[str, Measurement]) -> Outcome:
        """Measure what is missing of one state."""
        ids = self.record_ids(built.node)
        records: list[Record] = []
        for text in missing:
            self.bench.progress(f"measuring {built.node.chain}", 0.0)
            started = time.perf_counter()
            found = self.measures[text].compare(built.model, self.bench.model, dense[text])
            self.bench.counters.evaluations += 1
            cost = {**built.cost, "measure_s": round(time.perf_counter() - started, 4)}
            records.append(self._record(Built(built.node, built.model, cost), text, ids[text], found, dense[text]))
        failure = self._shelve(built, records)
        experiment = self.bench.experiment_id(built.node.parts)
        return Outcome(self.task.model, str(built.node.chain), experiment, tuple(ids.values()), tuple(records), failure)

    def _shelve(self, built: Built, records: Sequence[Record]) -> Failure | None:
        """Keep the checkpoint if it is wanted; what stands in the way of that loses no record."""
        if self.task.shelf is None:
            return None
        first, by = next(iter(self.measures.items()))
        found = [record.metrics.get(next(iter(by.metrics))) for record in records if record.measure == first]
        value = found[0] if found else self.known(built.node)
        experiment = self.bench.experiment_id(built.node.parts)
        try:
            self.task.shelf.offer(built.model, experiment, built.node.parts, value, self.bench.model)
        except Exception as error:
            return self.failed(Broken(built.node, "keep", error)).failure
        return None

    def failed(self, broken: Broken) -> Outcome:
        """Write down a failure."""
        experiment, chain = self.bench.experiment_id(broken.node.parts), str(broken.node.chain)
        failure = _failure(self.task, experiment, chain, self.bench.seed, broken.stage, broken.error)
        return Outcome(self.task.model, chain, experiment, failure=failure)

    def _record(self, built: Built, text: str, key: str, found: Measurement, base: Measurement) -> Record:
        parts, model, dense = built.node.parts, built.model, self.bench.model
        first = next((part for part in parts if not part.recovers), None)
        recovery = next((part for part in reversed(parts) if part.recovers), None)
        counts, base_params = model.counts, dense.counts.n_params
        assert counts.n_params == model.measured_params(), (
            f"{built.node.chain}: the config accounts for {counts.n_params} parameters, "
            f"the model holds {model.measured_params()}"
        )
        # What the dense model's own checkpoint says was done to it is no part of this experiment.
        own = model.done[len(dense.done) :]
        scopes = sorted({done.scope for done in own if done.in_scope})
        zeros = model.zeros(*scopes) if scopes else 0
        in_scope = sum(matrix.weight.numel() for matrix in model.matrices(*scopes))
        done = None if first is None else own[parts.index(first)]
        return Record(
            id=key,
            experiment=self.bench.experiment_id(parts),
            study=self.task.study,
            model=self.task.model,
            model_type=model.entry.model_type,
            model_hash=dense.fingerprint,
            chain=str(built.node.chain),
            seed=self.bench.seed if parts else 0,
            measure=text,
            metrics=dict(found.metrics),
            base=dict(base.metrics if found.base is None else found.base),
            protocol=dict(found.protocol),
            details=dict(found.details),
            n_params=counts.n_params,
            n_params_non_embedding=counts.n_params_non_embedding,
            base_params=base_params,
            n_bytes=counts.n_bytes,
            flops_per_token=counts.flops_per_token,
            method=None if first is None else first.step.name(),
            family=None if first is None else first.step.family,
            unit=None if first is None else first.step.counts,
            amount=None if first is None else float(first.amount),
            obtained=None if done is None else done.obtained,
            ratio=1 - counts.n_params / base_params,
            sparsity=zeros / in_scope if scopes else 0.0,
            zeroed=zeros / base_params,
            recovery=None if recovery is None else recovery.step.name(),
            # As the history says: a recovery may have chosen its amount itself.
            recovery_tokens=sum(int(done.amount or 0) for part, done in zip(parts, own, strict=True) if part.recovers),
            tokens_seen=sum(done.tokens for done in own),
            steps=tuple(asdict(done) for done in own),
            cost=dict(built.cost),
            environment=environment(model.device),
            created=now(),
        )


def compress_model(
    model: Model | str,
    chain: str | chains.Chain,
    *,
    calibration: str | None = None,
    rows: int = 128,
    block: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    work: Path | None = None,
    stream: Path | None = None,
    progress: Callable[[str, float], None] = silent,
) -> Model:
    """Compress a model by one chain.

    Parameters
    ----------
    model : a loaded model, or what `mariotte.load` takes; stays as it is
    chain : such as ``slice@0.3 | lora@1M``
    calibration : corpus whose calibration split the steps may look at; None for steps that need none
    rows, block : how much of it: blocks, and tokens a block (None takes the corpus' own)
    seed : of every random choice
    device, dtype : as for `mariotte.load`
    work : folder where preparations are kept for the next call; None keeps none. A model that something was done to
        since it was loaded is not what its files say, so nothing of it is kept
    stream : for a named model larger than memory: its weights stay in its files, and what the steps make of them goes
        to this folder, where the result needs it for as long as it is in use; see `mariotte.load`

    Returns
    -------
    Model
        Its ``done`` says what each step did.

    Raises
    ------
    MariotteError
        When the chain, the model or the text is not what a step needs.
    """
    parts = identity.resolve(chains.parse(chain) if isinstance(chain, str) else chain)
    if stream is not None or (isinstance(model, Model) and model.streamed):
        for part in parts:
            part.step.refuse_streamed()
    dense = load(model, device, dtype, stream=stream) if isinstance(model, str) else model
    foresight.check(dense.name, dense.config, parts, dense.rounded, device=dense.device)
    spec = None if calibration is None else Calibration(corpus=calibration, rows=rows, block=block)
    blocks = read_calibration(spec, dense)
    with ExitStack() as stack:
        kept = None if dense.derived else work
        # Beside the weights of a streamed model, and not where temporary files may lie in memory.
        place = None if stream is None else stack.enter_context(tempfile.TemporaryDirectory(dir=_made(stream)))
        folder = kept or Path(place or stack.enter_context(tempfile.TemporaryDirectory(prefix="mariotte-")))
        bench = Bench(dense, seed, blocks, folder, progress=progress)
        root = grow([parts])
        if not parts:
            return dense.copy()
        for reached in bench.walk(root, dense, lambda node: node.wanted and bool(node.parts)):
            if isinstance(reached, Broken):
                raise reached.error
            return reached.model
    raise AssertionError(f"the chain {chain} led nowhere")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure(
    model: Model, what: str, dense: Measurement | None = None, *, reference: Model | None = None
) -> Measurement:
    """Measure a model.

    Parameters
    ----------
    model : what to measure
    what : such as ``loss:wikitext2(block=512)`` or ``knowledge:testbed``
    dense : the same measure of the dense model, for what was lost and gained; None for none
    reference : the dense model itself, for what is only measured side by side, such as ``speed``; None for none

    Raises
    ------
    MariotteError
        When there is no such measure, or what it is measured on cannot be had.
    """
    found = identity.resolve_measure(what)
    if reference is None:
        return found.measure(model, dense)
    return found.compare(model, reference, found.measure(reference) if dense is None else dense)
