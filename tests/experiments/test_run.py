"""A study into a store: shared work once, failures stored, interruptions harmless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from driving import run, table

from mariotte.errors import MariotteError
from mariotte.experiments.pipeline import compress_model, measure
from mariotte.experiments.run import check
from mariotte.experiments.study import parse
from mariotte.models.load import load
from mariotte.store import open_store
from mariotte.testing.tiny import weights_hash

TEXT = """
format = 1
name = "small"
models = ["{model}"]
measures = ["loss:testbed/all(rows=6)", "knowledge:testbed(facts=20)"]
chains = [
  {{ chain = "{{method}}@{{amount}}", method = ["slice", "ffn", "magnitude"], amount = {amounts} }},
  {{ chain = "ffn@0.5 | lora@{{tokens}}(batch=2)", tokens = [1280, 2560] }},
]
[calibration]
corpus = "testbed/all"
rows = 8
[run]
threads = 1
"""
NINE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def toml(model: Path, amounts: list[float] = [0.25, 0.5]) -> str:  # noqa: B006
    return TEXT.format(model=model, amounts=amounts)


@pytest.fixture(scope="module")
def reference(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "whole.db"
    run(parse(toml(model_folder)), path)
    return path


def test_shared_work_is_done_once(model_folder: Path, tmp_path: Path) -> None:
    study = parse(toml(model_folder, NINE))
    plan = check(study)
    assert (plan.experiments, plan.records, plan.preparations, plan.applications) == (30, 60, 4, 29)
    summary = run(study, tmp_path / "s.db")
    c = summary.counters
    assert (c.loads, c.dense_evaluations) == (1, 2)
    assert c.preparations == 4  # slice, ffn, magnitude, and one trunk: nine amounts each prepare once
    assert c.applications == 29
    assert c.evaluations == 29 * 2
    # D counts every token: the trunk goes to 0.9 of the larger one, each decay takes the last tenth of its own.
    assert c.trunks == 1
    assert c.trunk_tokens + 256 == pytest.approx(2560, abs=128)
    assert summary.records == 60
    assert not summary.failures


def test_records_say_what_was_asked_and_what_was_obtained(reference: Path) -> None:
    with open_store(reference) as store:
        records = store.records(measure="loss")
        dense = next(r for r in records if r.chain == "dense")
        by_chain = {r.chain: r for r in records}
    assert (dense.ratio, dense.method, dense.metrics) == (0.0, None, dense.base)
    ffn = by_chain["ffn@0.5"]
    assert (ffn.method, ffn.family, ffn.unit, ffn.amount, ffn.obtained) == ("ffn", "width", "neurons", 0.5, 0.5)
    assert ffn.ratio == 1 - ffn.n_params / ffn.base_params > 0
    assert ffn.base == dense.metrics
    magnitude = by_chain["magnitude@0.5"]
    assert (magnitude.ratio, magnitude.sparsity) == (0.0, 0.5)
    assert magnitude.removed == magnitude.zeroed > 0.1
    lora = by_chain["ffn@0.5 | lora@1280(batch=2)"]
    assert (lora.recovery, lora.recovery_tokens, lora.tokens_seen) == ("lora", 1280, 1280)
    assert lora.n_params == ffn.n_params
    assert [step["name"] for step in lora.steps] == ["ffn", "lora"]
    assert {"prepare_s", "apply_s", "measure_s"} <= set(lora.cost)
    assert lora.environment["threads"] == 1
    assert ffn.metrics["loss_se"] > 0


def test_a_rerun_does_nothing(model_folder: Path, reference: Path) -> None:
    summary = run(parse(toml(model_folder)), reference)
    assert (summary.records, summary.skipped) == (0, 9)  # eight chains and the dense model
    assert summary.counters.preparations == summary.counters.dense_evaluations == summary.counters.trunks == 0


def test_a_larger_study_does_only_what_is_new(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    run(parse(toml(model_folder, [0.25])), path)
    before = table(path)
    summary = run(parse(toml(model_folder)), path)
    assert summary.counters.evaluations == 2 * 3  # each method at 0.5: the recoveries after ffn@0.5 are there
    assert table(path) == table(reference)
    assert before.items() <= table(reference).items()


@pytest.mark.parametrize("after", [1, 3, 5, 8, 12, 20])
def test_interrupted_and_run_again_equals_uninterrupted(
    after: int, model_folder: Path, reference: Path, tmp_path: Path
) -> None:
    path, left = tmp_path / "s.db", after
    study = parse(toml(model_folder))

    def interrupt(stage: str, done: float) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study, path, progress=interrupt)
    run(study, path)
    assert table(path) == table(reference)
    assert not Path(f"{path}.work").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"s.db", "s.db-wal", "s.db-shm"}


def killed_after(seconds: float, study: Path, store: Path) -> bool:
    """Start `mariotte run` and kill it; whether it was still running."""
    command = [
        sys.executable,
        "-c",
        "from mariotte.cli.main import main; main()",
        "run",
        str(study),
        "--store",
        str(store),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def test_killed_and_run_again_equals_uninterrupted(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    """Once, as soon as the store holds something; `test_killed_at_fifty_random_moments` is the whole of it."""
    study, path = tmp_path / "s.toml", tmp_path / "s.db"
    study.write_text(toml(model_folder))
    command = [
        sys.executable,
        "-c",
        "from mariotte.cli.main import main; main()",
        "run",
        str(study),
        "--store",
        str(path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(set(table_or_empty(path))) >= 4:
            process.kill()
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    run(parse(study.read_text()), path)
    assert table(path) == table(reference)


def table_or_empty(path: Path) -> dict[str, str]:
    try:
        return table(path)
    except MariotteError:  # the writer is between making the file and its tables
        return {}


@pytest.mark.slow
def test_killed_at_fifty_random_moments(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    import random

    study, path = tmp_path / "s.toml", tmp_path / "s.db"
    study.write_text(toml(model_folder))
    moments = random.Random(0)
    kills = 0
    while kills < 50:
        if not killed_after(moments.uniform(3, 9), study, path):
            assert table(path) == table(reference)
            path.unlink()  # it finished: begin anew, so that all fifty kills hit work
            continue
        kills += 1
    run(parse(study.read_text()), path)
    assert table(path) == table(reference)


def test_a_failure_is_stored_and_the_study_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mariotte.compress.methods.slice import Slice

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(Slice, "prepare", broken)
        summary = run(parse(toml(model_folder)), tmp_path / "s.db")
    assert [f.chain for f in summary.failures] == ["slice@0.25", "slice@0.5"]
    assert summary.failures[0].error == "RuntimeError: no such luck"
    assert "Traceback" in summary.failures[0].traceback
    with open_store(tmp_path / "s.db") as store:
        assert len(store.failures()) == 2
        assert len(store.records()) == (9 - 2) * 2
    # Run again, what failed is left alone, until it is asked for; what was stored is not measured twice.
    again = run(parse(toml(model_folder)), tmp_path / "s.db")
    assert (again.records, again.failed_before, again.failures) == (0, 2, [])
    assert again.counters.preparations == 0
    with open_store(tmp_path / "s.db") as store:
        assert len(store.failures()) == 2
    retried = run(parse(toml(model_folder)), tmp_path / "s.db", retry_failed=True)
    assert (retried.records, retried.failed_before) == (4, 0)
    with open_store(tmp_path / "s.db") as store:
        assert not store.failures()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"slice"', '"slcie"', "no method named 'slcie'"),
        ("loss:", "los:", "no measure named 'los'"),
        ('corpus = "testbed/all"', 'corpus = "testbed/al"', "no corpus named 'testbed/al'"),
        ("0.25", "1.5", "must be in [0, 1), got 1.5"),
    ],
)
def test_what_cannot_run_is_said_before_any_work(
    old: str, new: str, said: str, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MariotteError) as caught:
        run(parse(toml(model_folder).replace(old, new)), tmp_path / "s.db")
    assert said in str(caught.value)
    assert table(tmp_path / "s.db") == {}


def test_two_seeds_share_the_dense_model(model_folder: Path, tmp_path: Path) -> None:
    text = toml(model_folder, [0.5]).replace("name =", "seeds = [0, 1]\nname =")
    summary = run(parse(text), tmp_path / "s.db")
    assert summary.counters.dense_evaluations == 2
    assert summary.records == 2 * (1 + 2 * 5)


def test_compress_model_is_what_a_study_does(model_folder: Path, reference: Path) -> None:
    model = load(model_folder)
    before = weights_hash(model)
    found = compress_model(model, "ffn@0.5 | lora@1280(batch=2)", calibration="testbed/all", rows=8)
    assert weights_hash(model) == before
    with open_store(reference) as store:
        (record,) = store.records(chain="ffn@0.5 | lora@1280(batch=2)", measure="loss")
    assert measure(found, "loss:testbed/all(rows=6)").metrics == dict(record.metrics)


def test_compress_model_raises_what_went_wrong(model_folder: Path) -> None:
    with pytest.raises(MariotteError, match="slice needs calibration text, got none"):
        compress_model(str(model_folder), "slice@0.5")
    assert compress_model(str(model_folder), "dense").done == ()
