"""Several studies, seeds, processes and texts: what they share, and what they must not."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import pytest
from driving import table

from mariotte.errors import StudyError
from mariotte.experiments import run as running
from mariotte.experiments.pipeline import compress_model, measure
from mariotte.experiments.run import Summary, check
from mariotte.experiments.study import parse
from mariotte.models.load import load
from mariotte.models.step import Prepared
from mariotte.store import open_store
from mariotte.testing.tiny import weights_hash

TEXT = """
format = 1
name = "{name}"
models = {models}
measures = ["loss:testbed/all(rows=4)"]
seeds = {seeds}
chains = {chains}
[calibration]
corpus = "testbed/all"
rows = 4
[run]
threads = 1
workers = {workers}
"""


def study(
    models: list[Path], chains: list[str], name: str = "s", seeds: tuple[int, ...] = (0,), workers: int = 1
) -> str:
    return TEXT.format(
        name=name, models=[str(m) for m in models], chains=chains, seeds=list(seeds), workers=workers
    ).replace("'", '"')


def run(text: str, path: Path, **kwargs: object) -> Summary:
    with open_store(path, create=True) as store:
        return running.run(parse(text.replace('\\"', "'")), store, **kwargs)


def chains_of(path: Path, name: str) -> list[str]:
    with open_store(path) as store:
        return [record.chain for record in store.records(study=name)]


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def test_a_study_finds_the_records_that_another_one_made(model_folder: Path, tmp_path: Path) -> None:
    run(study([model_folder], ["magnitude@0.3"], "first"), tmp_path / "s.db")
    summary = run(study([model_folder], ["magnitude@0.3", "magnitude@0.5"], "second"), tmp_path / "s.db")
    assert (summary.records, summary.skipped) == (1, 2)
    assert chains_of(tmp_path / "s.db", "second") == ["dense", "magnitude@0.3", "magnitude@0.5"]
    assert chains_of(tmp_path / "s.db", "first") == ["dense", "magnitude@0.3"]


def test_a_model_is_its_content_whatever_it_is_called(model_folder: Path, copy: Path, tmp_path: Path) -> None:
    run(study([model_folder], ["magnitude@0.3"], "first"), tmp_path / "s.db")
    summary = run(study([copy], ["magnitude@0.3", "magnitude@0.5"], "second"), tmp_path / "s.db")
    assert (summary.records, summary.counters.dense_evaluations) == (1, 0)


def test_other_recovery_text_is_another_experiment(model_folder: Path, tmp_path: Path) -> None:
    words = load(model_folder).tokenizer.convert_ids_to_tokens(list(range(20, 60)))
    corpus = tmp_path / "corpus"
    corpus.mkdir()

    def write(step: int) -> None:
        (corpus / "train.txt").write_text("\n\n".join(" ".join(words[i % 7 :: step]) for i in range(400)))

    text = study([model_folder], [f"lora@1k(corpus=file:{corpus})"])
    write(1)
    run(text, tmp_path / "s.db")
    write(2)
    summary = run(text, tmp_path / "s.db")
    assert summary.records == 1
    with open_store(tmp_path / "s.db") as store:
        lora = [r for r in store.records() if r.recovery]
    assert len({r.id for r in lora}) == len({r.metrics["loss"] for r in lora}) == 2


def test_the_end_of_one_study_leaves_the_work_of_another(model_folder: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: float) -> None:
        if stage.startswith("measuring ffn"):
            raise KeyboardInterrupt

    ffn = study([model_folder], ["ffn@0.3"], "ffn")
    with pytest.raises(KeyboardInterrupt):
        run(ffn, tmp_path / "s.db", progress=stop)
    run(study([model_folder], ["magnitude@0.3"], "magnitude"), tmp_path / "s.db")
    assert run(ffn, tmp_path / "s.db").counters.preparations == 0
    assert not (tmp_path / "s.db.work").exists()


def test_one_study_runs_once_at_a_time(model_folder: Path, tmp_path: Path) -> None:
    text = study([model_folder], ["magnitude@0.3"])
    refused: list[str] = []

    def again(stage: str, done: float) -> None:
        if stage == "loading":
            with pytest.raises(StudyError, match="is being run into this store by another process") as caught:
                run(text, tmp_path / "s.db")
            refused.append(str(caught.value))

    run(text, tmp_path / "s.db", progress=again)
    assert refused


def test_a_preparation_with_a_part_missing_is_none(tmp_path: Path) -> None:
    import torch

    prepared = Prepared(tmp_path)
    for key in ("a", "b"):
        prepared.put(key, {"x": torch.zeros(1)})
    prepared.finish()
    assert Prepared.open(tmp_path) is not None
    (tmp_path / "b.safetensors").unlink()
    assert Prepared.open(tmp_path) is None


@pytest.mark.parametrize(
    "chain",
    [
        "magnitude@0.5:ffn | magnitude@0.5:attention",
        "magnitude@0.5:attention | magnitude@0.5:ffn",
        "magnitude@0.5 | ffn@0.5",
        "magnitude@0.6:ffn",
    ],
)
def test_sparsity_is_of_what_is_there(chain: str, model_folder: Path, tmp_path: Path) -> None:
    run(study([model_folder], [chain]), tmp_path / "s.db")
    with open_store(tmp_path / "s.db") as store:
        (record,) = (r for r in store.records() if r.method)
    model = compress_model(str(model_folder), chain, calibration="testbed/all", rows=4)
    parts = ("ffn",) if chain.endswith(":ffn") and "|" not in chain else ("attention", "ffn")
    weights = [m.weight for b in model.blocks for part in parts for m in getattr(b, part)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert record.sparsity == zeros / sum(w.numel() for w in weights)
    assert record.zeroed == zeros / record.base_params
    assert 0.2 < record.sparsity <= 0.61


def test_what_was_prepared_for_the_base_is_not_used_for_what_came_of_it(model_folder: Path, tmp_path: Path) -> None:
    def cut(work: Path | None) -> str:
        first = compress_model(str(model_folder), "ffn@0.3", calibration="testbed/all", rows=4, work=work)
        return weights_hash(compress_model(first, "ffn@0.3", calibration="testbed/all", rows=4, work=work))

    assert cut(tmp_path / "work") == cut(None)


def test_failures_belong_to_their_study(model_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        summary = run(study([model_folder], ["lora@10", "lora@1k"], name), tmp_path / "s.db")
        assert [f.chain for f in summary.failures] == ["lora@10"]  # and not the larger one beside it
    with open_store(tmp_path / "s.db") as store:
        assert len(store.failures(study="first")) == len(store.failures(study="second")) == 1


def test_a_model_that_cannot_be_measured_does_not_end_the_study(model_folder: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    summary = run(study([copy, model_folder], ["magnitude@0.3"]), tmp_path / "s.db")
    assert [(f.stage, f.model) for f in summary.failures] == [("setup", str(copy))]
    assert summary.records == 2
    with pytest.raises(StudyError, match=r"cannot be run: .*tokenizer"):
        run(study([copy], ["magnitude@0.3"], "alone"), tmp_path / "s.db")


def test_seeds_share_loading_and_the_count_is_right(model_folder: Path, tmp_path: Path) -> None:
    text = study([model_folder], ["ffn@0.5 | lora@1k"], seeds=(0, 1, 2))
    outcomes: list[object] = []
    summary = run(text, tmp_path / "s.db", finished=outcomes.append)
    assert summary.counters.loads == 1
    assert len(outcomes) == summary.experiments == check(parse(text)).experiments == 4
    with open_store(tmp_path / "s.db") as store:
        assert len({r.metrics["loss"] for r in store.records() if r.recovery}) == 3


def test_two_workers_record_what_one_does(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    config = (other / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03')
    (other / "config.json").write_text(config)
    chains = ["ffn@0.5 | lora@1k", "slice@0.5"]
    one = run(study([model_folder, other], chains, workers=1), tmp_path / "one.db")
    two = run(study([model_folder, other], chains, workers=2), tmp_path / "two.db")
    assert table(tmp_path / "one.db") == table(tmp_path / "two.db")
    assert dataclasses.asdict(one.counters) == dataclasses.asdict(two.counters)
    assert two.counters.loads == 2
    assert threading.active_count() < 10


def test_a_worker_that_is_killed_is_said_to_be(model_folder: Path, copy: Path, tmp_path: Path) -> None:
    import multiprocessing
    import os
    import signal

    from mariotte.errors import MariotteError

    (copy / "config.json").write_text((copy / "config.json").read_text().replace("1e-06", "1e-05"))

    def kill(stage: str, done: float) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(
        MariotteError, match="ended with code -9: killed, perhaps for memory; try again with fewer workers"
    ):
        run(study([model_folder, copy], ["slice@0.5"], workers=2), tmp_path / "s.db", progress=kill)
    assert run(study([model_folder, copy], ["slice@0.5"]), tmp_path / "s.db").failures == []


def test_a_measure_of_two_models_agrees_with_its_record(model_folder: Path, tmp_path: Path) -> None:
    run(study([model_folder], ["slice@0.5"]), tmp_path / "s.db")
    cut = compress_model(str(model_folder), "slice@0.5", calibration="testbed/all", rows=4)
    with open_store(tmp_path / "s.db") as store:
        (record,) = store.records(chain="slice@0.5")
    assert measure(cut, "loss:testbed/all(rows=4)").metrics == dict(record.metrics)
