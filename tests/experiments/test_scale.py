"""Studies at scale: parts of the chains, checkpoints that stay, workers that die, what a dry run says."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from driving import run, table
from typer.testing import CliRunner

from mariotte.architectures import shape
from mariotte.cli.main import app
from mariotte.errors import StoreError, StudyError
from mariotte.experiments import pipeline
from mariotte.experiments.artifacts import Shelf
from mariotte.experiments.estimate import estimate
from mariotte.experiments.pipeline import Outcome, Serving, Task
from mariotte.experiments.run import plan
from mariotte.experiments.runners.processes import _buried, _Worker
from mariotte.experiments.study import Measured, Study, embedded, parse, read, with_run
from mariotte.locate import read_config
from mariotte.models import checkpoint
from mariotte.models.load import load, quiet_transformers
from mariotte.models.model import Model
from mariotte.store import open_store
from mariotte.testbed import zoo
from mariotte.testbed.world import World
from mariotte.testing.tiny import tiny

TEXT = """
format = 1
name = "scale"
models = {models}
measures = ["loss:testbed/all(rows=4)", {{ measure = "knowledge:testbed(facts=10)", of = "cuts" }}]
chains = [
  {{ chain = "magnitude@{{amount}}", amount = [0.25, 0.5] }},
  {{ chain = "ffn@0.5 | lora@{{tokens}}(batch=2)", tokens = [640, 1280] }},
  {{ chain = "ffn@0.25", models = {some} }},
]
[calibration]
corpus = "testbed/all"
rows = 4
[run]
threads = 1
"""


def study(models: list[Path], some: list[Path] | None = None) -> Study:
    def names(paths: list[Path]) -> str:
        return json.dumps([str(path) for path in paths])

    return parse(TEXT.format(models=names(models), some=names(some or models[:1])))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape as the other one, with other weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-other"
    with quiet_transformers():
        tiny("qwen2", vocab=len(World().vocabulary), tied=True, seed=1).hf.save_pretrained(folder)
    zoo.save_tokenizer(folder)
    return folder


def test_a_measure_of_cuts_leaves_recoveries_out(model_folder: Path, tmp_path: Path) -> None:
    summary = run(study([model_folder]), tmp_path / "s.db")
    assert summary.failures == []
    with open_store(tmp_path / "s.db") as store:
        chains = {name: [r.chain for r in store.records() if r.measure.startswith(name)] for name in ("loss", "know")}
    assert len(chains["loss"]) == 6
    assert sorted(chains["know"]) == ["dense", "ffn@0.25", "magnitude@0.25", "magnitude@0.5"]


def test_chains_can_be_for_some_models(model_folder: Path, other: Path) -> None:
    found = study([model_folder, other], [other])
    assert len(found.expanded(str(model_folder))) == 4
    assert len(found.expanded(str(other))) == len(found.expanded()) == 5
    with pytest.raises(StudyError, match="no model of this study named"):
        study([model_folder], [other])


def test_a_plan_counts_what_a_run_does(model_folder: Path, other: Path, tmp_path: Path) -> None:
    found = study([model_folder, other])
    planned = plan(found)
    assert (planned.cuts, planned.checkpoints, planned.evaluations) == (5, 9, {"loss": 9, "knowledge": 5})
    assert planned.recovery_tokens == 2 * (640 + 1280)
    summary = run(found, tmp_path / "s.db")
    c = summary.counters
    assert (summary.experiments, summary.records) == (planned.experiments, planned.records)
    assert (c.loads, c.preparations, c.applications) == (planned.loads, planned.preparations, planned.applications)
    rows = 64 * 2  # of a batch: what is seen is rounded to whole rows, the trunk to whole batches
    assert c.trunk_tokens + c.decay_tokens == pytest.approx(planned.shared_tokens, abs=2 * 3 * rows)


@pytest.mark.parametrize("keep", ["all", "best"])
def test_checkpoints_stay_as_the_study_says(keep: str, model_folder: Path, tmp_path: Path) -> None:
    found = with_run(study([model_folder]), keep=keep)
    run(found, tmp_path / "s.db", artifacts=tmp_path / "kept")
    folders = [path.parent for path in (tmp_path / "kept" / "scale").glob("*/*/config.json")]
    # Best of each asked amount: 0.25 of magnitude and ffn, 0.5 of magnitude and two recoveries.
    assert len(folders) == (5 if keep == "all" else 2)
    with open_store(tmp_path / "s.db") as store:
        records = {r.experiment[:16]: r for r in store.records(measure="loss")}
    for folder in folders:
        assert load(folder).counts.n_params == records[folder.name].n_params
    if keep == "best":
        for amount in (0.25, 0.5):
            best = min((r for r in records.values() if r.amount == amount), key=lambda r: r.metrics["loss"])
            assert best.experiment[:16] in {folder.name for folder in folders}
        return
    (lost,) = [folder for folder in folders if records[folder.name].chain == "magnitude@0.5"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*/*/*/config.json")}
    for file in lost.iterdir():
        file.unlink()
    lost.rmdir()
    again = run(found, tmp_path / "s.db", artifacts=tmp_path / "kept")
    assert (again.records, again.counters.evaluations) == (0, 0)  # made anew, not measured anew
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} == {lost / "config.json"}


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    shelf = Shelf(folder=tmp_path, model="some/model", keep="best", rising=False)
    names = ("a" * 16, "b" * 16, "c" * 16, ".half-1a2b", "notes of mine")
    whole, _, torn, _, _ = folders = [tmp_path / "some-model" / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
    (whole / "artifact.json").write_text('{"amount": "0.5", "value": 1.0}')
    (torn / "artifact.json").write_text('{"amount": ')
    shelf.sweep()
    assert sorted(path.name for path in (tmp_path / "some-model").iterdir()) == [whole.name, "notes of mine"]
    assert not shelf.lacks_best(0.5, 1.0)
    assert shelf.lacks_best(0.5, 0.9)
    assert shelf.lacks_best(0.25, 1.0)


@pytest.mark.parametrize("name", [".", "./", "~", "x" * 300, "a b"])
def test_every_model_has_a_folder_of_its_own(name: str, tmp_path: Path) -> None:
    shelf = Shelf(folder=tmp_path, model=name, keep="best", rising=False)
    place = shelf.place("0" * 64)
    place.mkdir(parents=True)
    assert place.parent.parent == tmp_path


def kept(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("scale/*/*/config.json")}


def best(path: Path) -> set[str]:
    with open_store(path) as store:
        records = [r for r in store.records(measure="loss") if r.amount is not None]
    amounts = {r.amount for r in records}
    return {
        min((r for r in records if r.amount == a), key=lambda r: r.metrics["loss"]).experiment[:16] for a in amounts
    }


def test_the_best_are_kept_of_what_was_measured_before(model_folder: Path, tmp_path: Path) -> None:
    found = study([model_folder]).model_copy(update={"seeds": [0, 1]})
    run(found, tmp_path / "s.db")
    again = run(with_run(found, keep="best"), tmp_path / "s.db", artifacts=tmp_path / "kept")
    assert (again.records, again.counters.evaluations, again.failures) == (0, 0, [])
    assert kept(tmp_path / "kept") == best(tmp_path / "s.db")
    third = run(with_run(found, keep="best"), tmp_path / "s.db", artifacts=tmp_path / "kept")
    assert third.counters.applications == 0


def test_a_best_checkpoint_that_could_not_be_kept_is_kept_when_asked_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    found = with_run(study([model_folder]), keep="best")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", full)
        summary = run(found, tmp_path / "s.db", artifacts=tmp_path / "kept")
    assert {failure.stage for failure in summary.failures} == {"keep"}
    left = run(found, tmp_path / "s.db", artifacts=tmp_path / "kept")
    assert (left.failed_before, left.failures) == (2, [])
    again = run(found, tmp_path / "s.db", artifacts=tmp_path / "kept", retry_failed=True)
    assert (again.failures, again.failed_before, again.records) == ([], 0, 0)
    assert kept(tmp_path / "kept") == best(tmp_path / "s.db")


def test_a_store_that_was_cut_off_is_refused_in_a_sentence(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    run(study([model_folder]), path)
    content = path.read_bytes()
    for left in (len(content) // 2, 1500, 60):
        path.write_bytes(content[:left])
        with pytest.raises(StoreError) as caught:
            table(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(path.read_bytes()) == left  # nothing was written to what is left


def test_a_checkpoint_that_cannot_be_kept_loses_no_record(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Shelf, "offer", full)
    summary = run(with_run(study([model_folder]), keep="all"), tmp_path / "s.db")
    assert {failure.stage for failure in summary.failures} == {"keep"}
    assert "No space left on device" in summary.failures[0].error
    with open_store(tmp_path / "s.db") as store:
        assert len(store.records(measure="loss")) == 6


@pytest.mark.parametrize("error", [MemoryError("no more"), OSError(28, "No space left on device")])
def test_one_branch_without_memory_or_disk_is_survived(
    error: Exception, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mariotte.compress.methods.ffn import FFN

    def broken(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(FFN, "prepare", broken)
        summary = run(study([model_folder]), tmp_path / "s.db")
    assert {f.chain.split(" ")[0] for f in summary.failures} == {"ffn@0.5", "ffn@0.25"}
    assert str(error) in summary.failures[0].error
    assert len(table(tmp_path / "s.db")) == 2 + 4  # dense and magnitude, each measured twice
    assert run(study([model_folder]), tmp_path / "s.db", retry_failed=True).failures == []


def test_a_killed_worker_costs_what_it_was_doing(model_folder: Path, other: Path, tmp_path: Path) -> None:
    found = study([model_folder, other])
    reference = run(found, tmp_path / "whole.db")
    killed: list[int] = []

    begun: set[str] = set()

    def kill_once(outcome: Outcome) -> None:
        if outcome.chain != "dense":
            begun.add(outcome.model)
        workers = multiprocessing.active_children()
        if len(begun) == 2 and not killed and workers:
            killed.append(workers[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    summary = run(with_run(found, workers=2), tmp_path / "s.db", finished=kill_once)
    assert killed
    assert {failure.stage for failure in summary.failures} <= {"killed"}, summary.failures
    assert all("code -9: killed, perhaps for memory" in failure.error for failure in summary.failures)
    assert summary.experiments == reference.experiments
    assert summary.records >= reference.records - 2 * len(summary.failures)
    run(found, tmp_path / "s.db", retry_failed=True)
    assert table(tmp_path / "s.db") == table(tmp_path / "whole.db")


def worker_of(task: Task) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    worker = _Worker(process, ours)
    theirs.close()
    worker.begin(task)  # to nobody: it died before
    return worker


def test_a_dead_worker_costs_nothing_that_it_told_of(tmp_path: Path) -> None:
    task = Task(
        study="s",
        model="m",
        chains=(),
        measures={},
        seeds=(0,),
        calibration=None,
        work=tmp_path,
        settled=frozenset("x"),
    )
    worker = worker_of(task)
    assert worker.heard() is None
    rest, lost = _buried(worker)
    assert rest is None
    assert [outcome.failure and outcome.failure.stage for outcome in lost] == ["setup"]

    worker.work.settled, worker.work.serving = {"a"}, (Serving("a", "ffn@0.1", 0), Serving("b", "ffn@0.2", 0))
    rest, lost = _buried(worker)
    assert [outcome.experiment for outcome in lost] == ["b"]
    assert rest is not None
    assert rest.settled == {"x", "a", "b"}

    worker.work.serving = ()  # between the dense model and the first step
    rest, lost = _buried(worker)
    assert (rest is None, lost) == (False, [])


def test_a_worker_that_dies_in_the_middle_of_a_word_is_dead() -> None:
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), (1000).to_bytes(4, "big") + b"half of it")
    theirs.close()
    assert _Worker(multiprocessing.get_context("spawn").Process(), ours).heard() is None


def test_failures_do_not_outlive_what_they_are_of(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mariotte.compress.methods.ffn import FFN

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such luck")

    def failures() -> set[str]:
        with open_store(tmp_path / "s.db") as store:
            return {failure.chain for failure in store.failures(study="scale")}

    found = study([model_folder])
    with monkeypatch.context() as patched:
        patched.setattr(FFN, "prepare", broken)
        run(found, tmp_path / "s.db")
    assert len(failures()) == 3
    fewer = found.model_copy(update={"chains": found.chains[:2]})
    assert run(fewer, tmp_path / "s.db").failed_before == 2
    assert len(failures()) == 2  # ffn@0.25 is not asked for any more
    run(found.model_copy(update={"name": "another"}), tmp_path / "s.db")
    assert run(found, tmp_path / "s.db").failed_before == 0
    assert failures() == set()


def test_a_model_too_large_for_the_memory_is_one_failure(
    model_folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(name: str, *args: object) -> Model:
        if name == str(other):
            raise MemoryError("no more")
        return load(name)

    monkeypatch.setattr(pipeline, "load", limited)
    summary = run(study([model_folder, other]), tmp_path / "s.db")
    assert [(f.stage, f.model, f.error) for f in summary.failures] == [("setup", str(other), "MemoryError: no more")]
    assert summary.records == 6 + 4


def test_a_measure_of_all_and_of_cuts_is_refused(model_folder: Path) -> None:
    twice = ["knowledge:testbed(facts=10)", *study([model_folder]).measures]
    with pytest.raises(StudyError, match=r"names the measure knowledge:.* for all chains and for cuts: name it once"):
        plan(study([model_folder]).model_copy(update={"measures": twice}))


def test_models_are_measured_by_what_is_for_them(model_folder: Path, other: Path, tmp_path: Path) -> None:
    both = study([model_folder, other])
    measures = [
        Measured(measure="loss:testbed/all(rows=4)", models=[str(model_folder)]),
        Measured(measure="tasks:testbed/reverse(items=8)", models=[str(other)]),
        Measured(measure="knowledge:testbed(facts=10)", of="cuts"),
    ]
    found = with_run(both.model_copy(update={"measures": measures}), keep="best")
    planned = plan(found)
    # Five and four chains of the two models, two of each recovered; each by its own measure, and knowledge of its cuts.
    assert planned.evaluations == {"loss": 5, "knowledge": 3 + 2, "tasks": 4}
    assert planned.records == (5 + 1) + (4 + 1) + (3 + 1) + (2 + 1)
    summary = run(found, tmp_path / "s.db", artifacts=tmp_path / "kept")
    assert (summary.records, summary.failures) == (planned.records, [])
    with open_store(tmp_path / "s.db") as store:
        records = list(store.records())
    by = {
        name: {r.measure.partition(":")[0] for r in records if r.model == str(name)} for name in (model_folder, other)
    }
    assert by == {model_folder: {"loss", "knowledge"}, other: {"tasks", "knowledge"}}
    # Of each model and amount, that one stays which its own first measure likes best: less loss, more accuracy.
    kept = {path.parent.name for path in (tmp_path / "kept").rglob("config.json")}
    best: set[str] = set()
    for name, metric, chosen in ((model_folder, "loss", min), (other, "accuracy", max)):
        of_model = [r for r in records if r.model == str(name) and r.chain != "dense" and metric in r.metrics]
        for amount in {r.amount for r in of_model}:
            rivals = [r for r in of_model if r.amount == amount]
            best.add(chosen(rivals, key=lambda r: r.metrics[metric]).experiment[:16])
    assert kept == best


def test_an_estimate_grows_with_the_work_and_learns_from_records(model_folder: Path, tmp_path: Path) -> None:
    found = study([model_folder])
    configs = {str(model_folder): read_config(model_folder)}
    before = estimate(found, configs)
    assert before.seconds is not None
    assert before.unshared_seconds is not None
    assert before.unshared_seconds > 0
    assert before.memory_bytes >= 3 * 4 * shape(configs[str(model_folder)]).hidden
    assert before.disk_bytes > 0
    assert not before.measured
    assert estimate(found, {}).unknown == (str(model_folder),)
    run(found, tmp_path / "s.db")
    with open_store(tmp_path / "s.db") as store:
        after = estimate(found, configs, store.records())
    assert after.measured
    assert after.seconds != before.seconds


def test_a_study_for_a_device_that_is_not_here_is_estimated_but_for_its_time(
    model_folder: Path, tmp_path: Path
) -> None:
    found = study([model_folder])
    configs = {str(model_folder): read_config(model_folder)}
    here, away = (estimate(with_run(found, device=device), configs) for device in ("cpu", "hpu"))
    assert here.flops == away.flops
    assert here.flops is not None
    # Five chains and the dense model read at least the loss's rows of 64 tokens, two operations a weight.
    assert here.flops > 6 * 4 * 64 * 2 * load(model_folder).counts.n_params_non_embedding
    assert (away.seconds, away.unshared_seconds) == (None, None)
    assert (away.memory_bytes, away.disk_bytes) == (here.memory_bytes, here.disk_bytes)
    assert here.disk_bytes > estimate(found.model_copy(update={"calibration": None}), configs).disk_bytes


def test_a_dry_run_for_a_device_that_is_not_here_says_so(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    text = TEXT.format(models=json.dumps([str(model_folder)]), some=json.dumps([str(model_folder)]))
    file.write_text(text.replace("threads = 1", 'threads = 1\ndevice = "hpu"'))
    told = CliRunner().invoke(app, ["run", str(file), "--dry-run", "--store", str(tmp_path / "s.db")])
    assert told.exit_code == 0
    assert "floating-point operations" in told.output
    assert "not known: no hpu here" in told.output


def test_the_paper_s_grid_is_550_checkpoints_and_1100_evaluations() -> None:
    for path in (embedded("compression-laws"), embedded("testbed/compression-laws")):
        planned = plan(read(path))
        assert (planned.models, planned.cuts, planned.checkpoints) == (8, 55, 550)
        assert planned.evaluations["loss"] + planned.evaluations["tasks"] == 1100
        assert planned.evaluations["speed"] == 55


def test_a_dry_run_says_what_a_study_takes(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(embedded("quickstart")), "--dry-run"])
    assert result.exit_code == 0, result.output
    for said in ("models loaded", "alone", "time, 2 workers", "disk while it runs", "checkpoints that stay"):
        assert said in result.output
    assert list(tmp_path.iterdir()) == []
