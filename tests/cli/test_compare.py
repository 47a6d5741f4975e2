"""Comparing two models as a user does: a model with itself, with what was cut of it, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

import mariotte
from mariotte.cli.main import app
from mariotte.errors import ChainError, ModelError
from mariotte.evaluate.base import Measurement
from mariotte.experiments import comparison, judging
from mariotte.report.compare import build, sentences

MEASURES = ["loss:testbed/all(rows=16)", "knowledge:testbed(facts=120)", "tasks:testbed/facts+reverse(items=32)"]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)], prog_name="mariotte")


def options(*measures: str) -> list[str]:
    return [part for measure in measures for part in ("--measure", measure)]


def refused(done: Result, said: str) -> None:
    assert done.exit_code == 2, (done.stdout, done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mariotte: ")
    assert said in last, last
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A testbed model with every second weight zeroed."""
    folder = tmp_path_factory.mktemp("cut") / "cut"
    mariotte.save(mariotte.compress_model("testbed/qwen2-46k", "magnitude@0.5"), folder)
    return folder


def test_a_model_with_itself_differs_in_nothing() -> None:
    done = command("testbed/qwen2-46k", "testbed/qwen2-46k", *options(*MEASURES), "--fail-if", "loss > +0", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["failed"]
    assert {row["metric"] for row in found["rows"]} >= {"loss", "kl", "token_agreement", "top1", "accuracy", "bytes"}
    assert {row["difference"] for row in found["rows"]} == {0}
    assert {row["lo"] for row in found["rows"] if row["lo"] is not None} == {0}
    assert {row["hi"] for row in found["rows"] if row["hi"] is not None} == {0}
    assert {row["p"] for row in found["rows"] if row["p"] is not None} == {1}
    assert {row["verdict"] for row in found["rows"]} <= {"same", ""}
    facts = found["facts"]["knowledge:testbed(facts=120)"]
    assert facts["kept"]
    assert facts["lost"] == facts["gained"] == []
    assert "Both are the same model" in found["notes"][0]


def test_a_cut_model_lists_what_it_lost_and_fails_as_asked(cut: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    asked = ["--fail-if", "loss > +3%", "--fail-if", "knowledge.top1 < -99pp", "--out", page]
    done = command("testbed/qwen2-46k", cut, *options(*MEASURES), *asked)
    assert done.exit_code == 1, (done.stdout, done.stderr)
    assert "mariotte: failed, because loss > +3%: loss changed by +" in done.stderr
    assert "passed, not knowledge.top1 < -99pp: top1 changed by -" in done.stdout
    assert " facts kept, " in done.stdout
    assert "  lost " in done.stdout
    html = page.read_text(encoding="utf-8")
    assert "Failed: loss &gt; +3%" in html
    assert "facts lost" in html


def test_the_numbers_of_a_cut_model(cut: Path) -> None:
    found = mariotte.compare("testbed/qwen2-46k", str(cut), MEASURES, fail_if=["loss > +1000%", "kl < +0"])
    assert not found.failed
    assert [one.failed for one in found.conditions] == [False, False]
    rows = {row.metric: row for row in found.rows if row.measure != "size"}
    dense, cut_model = mariotte.load("testbed/qwen2-46k"), mariotte.load(str(cut))
    for measure in MEASURES[:2]:
        base, other = mariotte.measure(dense, measure).metrics, mariotte.measure(cut_model, measure).metrics
        for name in set(base) & set(rows):
            assert rows[name].base == pytest.approx(base[name])
            assert rows[name].difference == pytest.approx(other[name] - base[name])
    top1, facts = rows["top1"], found.facts[MEASURES[1]]
    assert (top1.kept, top1.lost, top1.gained) == (len(facts.kept), len(facts.lost), len(facts.gained))
    assert top1.difference == pytest.approx((len(facts.gained) - len(facts.lost)) / 120)
    assert top1.lo is not None
    assert top1.hi is not None
    assert top1.lo <= top1.difference <= top1.hi
    kl = rows["kl"]
    assert kl.verdict == "worse"
    assert kl.lo is not None
    assert 0 < kl.lo < kl.other
    # Both losses are expectations of the same tokens: their items are those of the divergence.
    assert kl.items == 16
    assert rows["accuracy"].items == 64
    assert rows["accuracy"].difference == pytest.approx((rows["facts"].difference + rows["reverse"].difference) / 2)
    json.dumps(found.plain(), allow_nan=False)
    assert "Of " in " ".join(sentences(found.plain()))
    assert [text.partition(" ")[0] for text in sentences(found.plain())] == ["The", "Of", "Accuracy", str(cut)]
    assert build(found.plain()).startswith("<!DOCTYPE html>")


def test_facts_as_a_file(cut: Path, tmp_path: Path) -> None:
    knowledge = "knowledge:testbed(facts=60)"
    done = command("testbed/qwen2-46k", cut, *options(knowledge), "--facts", tmp_path / "facts.csv")
    assert done.exit_code == 0, done.stderr
    with (tmp_path / "facts.csv").open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 2 * 60
    assert {row["measure"] for row in rows} == {knowledge}
    of_main = [row for row in rows if row["wording"] == "main"]
    found = mariotte.compare("testbed/qwen2-46k", str(cut), [knowledge])
    for outcome in ("kept", "lost", "gained"):
        listed = sorted(row["fact"] for row in of_main if row["outcome"] == outcome)
        assert listed == [*getattr(found.facts[knowledge], outcome)]
    assert all((row["base_rank"] == "1") is (row["outcome"] in ("kept", "lost")) for row in rows)
    assert all(0 <= float(row["other_probability"]) <= 1 for row in rows)
    # All metrics of facts have facts for items.
    shown = [row for row in found.rows if row.measure == knowledge]
    assert [row.metric for row in shown] == ["top1", "top5", "mrr", "heldout_top1", "heldout_top5", "heldout_mrr"]
    assert {row.items for row in shown} == {60}
    for row in shown:
        assert row.lo is not None
        assert row.hi is not None
        assert row.lo <= row.difference <= row.hi


def test_facts_of_one_model_as_a_file(tmp_path: Path) -> None:
    measured = ["evaluate", "testbed/qwen2-46k", *options("knowledge:testbed(facts=20)", "loss:testbed/all(rows=2)")]
    done = CliRunner().invoke(app, [*measured, "--facts", str(tmp_path / "new/facts.jsonl")], prog_name="mariotte")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "new/facts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 20
    assert [*rows[0]] == [
        *("measure", "fact", "relation", "subject", "template", "wording", "answer", "outcome", "rank", "probability")
    ]
    assert all((row["rank"] == 1) is (row["outcome"] == "known") for row in rows)
    known = mariotte.measure(mariotte.load("testbed/qwen2-46k"), "knowledge:testbed(facts=20)").metrics["top1"]
    assert sum(row["outcome"] == "known" for row in rows[:20]) == round(20 * known)


@pytest.mark.parametrize("before", [["evaluate", "testbed/qwen2-46k"], ["compare", *["testbed/qwen2-46k"] * 2]])
def test_files_of_facts_that_cannot_be_are_told_before_the_work(
    before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mariotte.models.load

    for module in (mariotte.models.load, comparison):
        monkeypatch.setattr(module, "load", lambda *_: pytest.fail("no model is loaded for these"))

    def asked(measure: str, place: Path) -> Result:
        return CliRunner().invoke(app, [*before, *options(measure), "--facts", str(place)], prog_name="mariotte")

    loss, facts = "loss:testbed/all(rows=2)", "knowledge:testbed(facts=20)"
    refused(asked(loss, tmp_path / "facts.csv"), "facts are written of measures that ask for them, and none of these")
    refused(asked(facts, tmp_path / "facts.txt"), "--facts must be a file that ends in .csv or .jsonl")
    (tmp_path / "folder.csv").mkdir()
    refused(asked(facts, tmp_path / "folder.csv"), "is a folder: name a file in it")


def test_speed_has_the_interval_of_its_rounds() -> None:
    model = mariotte.load("testbed/qwen2-46k")
    found = mariotte.compare(model, model, ["speed:random(batch=1,prompt=4,new=2,rounds=8,seconds=0.1)"])
    rows = {row.metric: row for row in found.rows}
    decode = rows["speedup_decode"]
    assert decode.per == "round"
    assert decode.items is not None
    assert decode.items >= 8
    assert decode.lo is not None
    assert decode.lo <= decode.difference


def test_documents_have_losses_and_bits_for_items() -> None:
    def of(nll: list[float]) -> Measurement:
        loss = sum(nll) / 10
        return Measurement(
            metrics={"loss": loss, "bits_per_byte": 1.0, "loss_se": 0.1},
            protocol={},
            details={"documents": {"nll": nll, "tokens": [4, 6, 0], "bytes": [8, 12, 0]}},
        )

    from mariotte.evaluate.measures.loss import Loss

    rows = judging.measured("loss:x", Loss(on="testbed/all"), of([8.0, 12.0, 0.0]), of([9.0, 15.0, 0.0]))
    assert [row.metric for row in rows] == ["loss", "bits_per_byte"]
    assert (rows[0].items, rows[0].per, rows[0].verdict) == (2, "document", "worse")
    assert rows[0].difference == pytest.approx(0.4)
    # Items that do not make up the metric are not its items.
    assert (rows[1].items, rows[1].lo) == (None, None)


def test_facts_of_lama_are_averaged_as_lama_does() -> None:
    from mariotte.evaluate.measures.knowledge import Knowledge

    def of(top1: float, **changed: list[str]) -> Measurement:
        relations = {"trex/P19": {"n": 4}, "trex/P20": {"n": 2}, "squad": {"n": 3}}
        details = {"relations": relations, "subsets": {"trex": {"n": 6}, "squad": {"n": 3}}, **changed}
        return Measurement(metrics={"top1": top1}, protocol={"n_facts": 9}, details=details)

    before = of((3 / 4 + 1 / 2) / 4 + 1 / 6, known=["trex/P19/a", "trex/P19/b", "trex/P19/c", "trex/P20/d", "squad/e"])
    after = of((1 / 4 + 1 / 2) / 4 + 2 / 6, lost=["trex/P19/a", "trex/P19/b"], gained=["squad/f"])
    (row,) = judging.measured("knowledge:lama", Knowledge(on="testbed"), before, after)
    assert (row.items, row.kept, row.lost, row.gained, row.p) == (9, 3, 2, 1, 1)
    assert row.difference == pytest.approx(1 / 24)
    assert row.lo is not None
    assert row.hi is not None
    assert row.lo < row.difference < row.hi
    # Where ties count in part the items do not make up the metric: flips are told, an interval is not.
    (row,) = judging.measured("knowledge:lama", Knowledge(on="testbed"), of(0.9, **before.details), after)
    assert (row.lo, row.lost, row.verdict) == (None, 2, "inside the noise")


def test_a_mean_over_tasks_is_judged_by_its_interval_and_not_by_all_answers_together() -> None:
    # Of 1,000 answers 60 were lost and 30 gained, of another task's 10 one was gained: a mean over tasks that rose.
    before = np.repeat([1.0, 0.0, 1.0, 0.0], [500, 500, 5, 5])
    after = before.copy()
    after[:60], after[500:530], after[-1] = 0.0, 1.0, 1.0
    strata = np.repeat([0, 1], [1000, 10])
    items = judging._Items(before, after, "item", strata=strata, answers=True)
    more = judging._paired(items, 0.5, (0.47 + 0.6) / 2)
    row = judging.row_of("tasks", "accuracy", "score", 0.5, (0.47 + 0.6) / 2, **more)
    assert row.p is not None
    assert row.p < 0.05 < row.difference + 0.05
    assert row.lo is not None
    assert row.lo < 0
    assert row.verdict == "inside the noise"
    alone = judging._Items(before[:1000], after[:1000], "item", answers=True)
    row = judging.row_of("tasks", "a", "score", 0.5, 0.47, **judging._paired(alone, 0.5, 0.47))
    assert (row.pooled, row.verdict) == (False, "worse")


def test_another_tokenizer_is_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    described = json.loads((other / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(described))
    refused(command(model_folder, other, *options(MEASURES[0])), "have different tokenizers")
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink(missing_ok=True)
    refused(command(model_folder, other, *options(MEASURES[0])), "has no tokenizer")


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("loss", "a condition is METRIC OP ±NUMBER"),
        ("loss > 3%", "a condition is METRIC OP ±NUMBER"),
        ("tasks.accuracy < -1pp", "asks for a metric of 'tasks', which is not measured"),
        ("perplexity > +1%", "no metric named 'perplexity' was measured"),
        ("loss > +3pp", "loss is no share: write % or nothing"),
        ("bytes < +3pp", "bytes is no share: write % or nothing"),
        ("loss >> +3%", "a condition is METRIC OP ±NUMBER"),
        ("loss => +3%", "a condition is METRIC OP ±NUMBER"),
        ("loss_se > +3%", "no metric named 'loss_se' was measured"),
        (
            "kl > +3%",
            "in percent of the base's kl, which is 0, and of 0 there are none: write nothing after",
        ),
    ],
)
def test_conditions_that_cannot_be_judged_are_one_sentence(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, condition: str, said: str
) -> None:
    monkeypatch.setattr(comparison, "load", lambda *_: pytest.fail("no model is loaded for these"))
    done = command(model_folder, model_folder, *options("loss:testbed/all(rows=2)"), "--fail-if", condition)
    refused(done, said)


def test_percents_of_a_base_of_nothing_are_one_sentence(model_folder: Path) -> None:
    # A random model knows no fact; the base is measured by then, the other is not.
    done = command(model_folder, model_folder, *options("knowledge:testbed(facts=20)"), "--fail-if", "top1 < -2%")
    refused(done, "in percent of the base's top1, which is 0, and of 0 there are none: write pp for percentage points")


def test_metrics_of_other_kinds_of_model_are_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mariotte.evaluate.measures.loss import Loss

    monkeypatch.setattr(Loss, "measure", lambda *_: pytest.fail("nothing is measured for these"))
    named = ("testbed/t5-784k", "testbed/t5-784k", *options("loss:testbed/all(rows=2)"))
    refused(command(*named, "--fail-if", "kl > +0.1"), "no metric named 'kl' was measured")


def test_what_a_measure_does_not_say_beforehand_is_looked_for_later(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mariotte.evaluate.measures.loss import Loss

    monkeypatch.setattr(Loss, "finds", None)
    named = (model_folder, model_folder, *options("loss:testbed/all(rows=2)"), "--fail-if")
    refused(command(*named, "perplexity > +1"), "no metric named 'perplexity' was measured")
    refused(command(*named, "loss > +1pp"), "loss is no share")
    assert command(*named, "loss > +1%").exit_code == 0


@pytest.mark.parametrize(
    "measure", ["knowledge:testbed(facts=20)", "tasks:testbed(items=4)", "loss:testbed/all(rows=2)"]
)
def test_measures_say_beforehand_what_they_find(model_folder: Path, measure: str) -> None:
    found = mariotte.measure(mariotte.load(str(model_folder)), measure)
    finds = mariotte.experiments.identity.resolve_measure(measure).finds
    assert finds is not None
    assert [*finds] == [name for name in found.metrics if not name.endswith("_se")]


def test_places_that_cannot_be_written_are_told_before_the_work(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("nothing is compared for these"))
    refused(command(model_folder, model_folder, "--out", tmp_path), "--out must be a file, and")
    file = tmp_path / "file"
    file.write_text("")
    refused(command(model_folder, model_folder, "--out", file / "compare.html"), "cannot be written (Not a directory)")
    assert [*tmp_path.iterdir()] == [file]


def test_a_loss_worse_than_a_guess_is_told() -> None:
    found = mariotte.compare("testbed/t5-784k", "testbed/t5-784k", ["loss:testbed/all(rows=8)"])
    assert any("it was not taught text asked like this" in note for note in found.notes)
    found = mariotte.compare("testbed/qwen2-46k", "testbed/qwen2-46k", ["loss:testbed/all(rows=8)"])
    assert not any("not taught" in note for note in found.notes)


def test_dtypes_that_differ_are_told(model_folder: Path, tmp_path: Path) -> None:
    import torch

    half = mariotte.load(str(model_folder))
    half.stored_dtype = torch.bfloat16
    found = mariotte.compare(str(model_folder), half, [MEASURES[0]])
    assert any(" in bfloat16: bytes are counted of each in its own" in note for note in found.notes)
    assert (found.base.stored, found.other.stored) == ("float32", "bfloat16")
    assert "stored in bfloat16, computed in float32 on cpu" in build(found.plain())
    half.hf.to(torch.float64)
    assert any("computed in float32 and" in one for one in comparison._dtypes(found.base, comparison._side(half)))


def test_measures_and_models_that_are_not_there(model_folder: Path, tmp_path: Path) -> None:
    refused(command(model_folder, model_folder, *options("los:testbed/all")), "no measure named 'los'")
    refused(command(model_folder, tmp_path / "none", *options(MEASURES[0])), "none")


def test_usual_measures() -> None:
    assert comparison.usual_measures("testbed/qwen2-46k")[0] == "loss:testbed/all"
    assert comparison.usual_measures("some/model") == ["loss:wikitext2"]
    refused(command("testbed/nothing", "testbed/nothing"), "no testbed model named 'testbed/nothing'")


@pytest.mark.parametrize("name", ["testbed/qwen2-46k", "testbed/bert-181k", "testbed/t5-784k"])
def test_usual_measures_are_what_a_kind_of_model_can_be_asked(name: str) -> None:
    model = mariotte.load(name)
    for text in comparison.usual_measures(name):
        measure = mariotte.experiments.identity.resolve_measure(text)
        assert measure.protocol(model)


def test_models_that_compute_no_numbers(model_folder: Path) -> None:
    import torch

    broken = mariotte.load(str(model_folder))
    with torch.no_grad():
        broken.embeddings.weight.fill_(float("nan"))
    with pytest.raises((ModelError, ChainError), match="finite"):
        mariotte.compare(str(model_folder), broken, [MEASURES[0]])
