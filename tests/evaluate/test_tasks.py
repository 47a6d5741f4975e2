from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mariotte.errors import ChainError, DataError, MariotteError, ModelError, UnknownNameError
from mariotte.evaluate import harness
from mariotte.evaluate.choices import Question, encode, log_likelihoods
from mariotte.evaluate.measures.tasks import Tasks
from mariotte.experiments.identity import measure_text, resolve_measure
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testbed import tasks as testbed
from mariotte.testbed.tasks import TASKS


@pytest.fixture
def model(model_folder: Path) -> Model:
    return load(model_folder)


@pytest.fixture
def lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval: pip install 'mariotte[tasks]'")


def test_a_uniform_model_scores_exactly_chance(model: Model) -> None:
    with torch.no_grad():
        model.final_norm.weight.zero_()  # the head is tied: this makes every logit zero
    found = Tasks(on="testbed", items=40).measure(model)
    assert {name: found.metrics[name] for name in TASKS} == dict(TASKS)
    assert found.metrics["accuracy"] == pytest.approx(sum(TASKS.values()) / len(TASKS))


def test_a_model_that_knows_scores_one_and_its_opposite_zero() -> None:
    known = load("testbed/qwen2-1m")
    some = Tasks(on="testbed", items=8)
    assert some.measure(known).metrics["accuracy"] == 1
    with torch.no_grad():
        known.final_norm.weight.neg_()  # the likeliest becomes the unlikeliest
    assert some.measure(known).metrics["agreement"] == 0


def test_log_likelihoods_by_hand(model: Model) -> None:
    questions = [
        Question((0, 5, 6), ((7,), (8,)), 0),
        Question((0, 5), ((6, 7), (6, 8), (9, 8)), 1),
        Question((0, 5, 6, 9), ((7,), (8, 9)), 0),  # of different lengths
    ]
    found = log_likelihoods(model, questions)
    for question, sums in zip(questions, found, strict=True):
        for choice, value in zip(question.choices, sums, strict=True):
            whole = torch.tensor([[*question.context, *choice]])
            with torch.no_grad():
                logs = model.logits(whole)[0].log_softmax(-1)
            start = len(question.context) - 1
            expected = sum(float(logs[start + i, token]) for i, token in enumerate(choice))
            assert value == pytest.approx(expected, abs=1e-5)


def test_rows_that_are_equal_are_computed_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = model.hf.forward

    def counted(*args: Any, **fields: Any) -> Any:
        rows.append(len(fields["input_ids"]))
        return forward(*args, **fields)

    monkeypatch.setattr(model.hf, "forward", counted)
    for name, each in (("facts", 1), ("events", 2), ("reverse", 4)):
        rows.clear()
        log_likelihoods(model, encode(testbed.task(name).items[:20], model.tokenizer))
        assert sum(rows) <= 20 * each


def test_batches_change_nothing(model: Model) -> None:
    questions = encode([item for name in TASKS for item in testbed.task(name).items[:12]], model.tokenizer)
    together, apart = (log_likelihoods(model, questions, batch=batch) for batch in (256, 3))
    for some, others in zip(together, apart, strict=True):
        assert some == pytest.approx(others, abs=1e-5)


def test_metrics_details_and_protocol_fit_together(model: Model) -> None:
    found = Tasks(on="testbed/events+facts", items=32).measure(model)
    names = {"events", "facts"}
    assert set(found.metrics) == {m for name in (*names, "accuracy") for m in (name, f"{name}_se")}
    assert found.metrics["accuracy"] == pytest.approx((found.metrics["events"] + found.metrics["facts"]) / 2)
    errors = [found.details[name]["standard_error"] for name in sorted(names)]
    assert found.metrics["accuracy_se"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    for name in names:
        part, stated = found.details[name], found.protocol["tasks"][name]
        assert (part["n"], part["chance"]) == (stated["n"], stated["chance"]) == (32, 0.25)
        assert len(part["correct"]) == 32
        assert part["correct"].count("1") / 32 == found.metrics[name]
    assert {"rule", "dtype", "shots", "tokenizer_sha256"} <= set(found.protocol)
    json.dumps([found.metrics, found.protocol, found.details], allow_nan=False)


def test_other_items_are_another_protocol(model: Model) -> None:
    hashes = {
        Tasks(on=f"testbed/{name}", items=n).protocol(model)["tasks"][name]["items_sha256"]
        for name in ("facts", "places")
        for n in (8, 12, None)
    }
    assert len(hashes) == 6


def test_it_is_written_as_other_measures_are() -> None:
    for text in ("tasks:testbed", "tasks:testbed(items=200)", "tasks:testbed/agreement+events", "tasks:piqa+mmlu"):
        assert measure_text(resolve_measure(text)) == text
    assert measure_text(resolve_measure("tasks:piqa,mmlu")) == "tasks:piqa+mmlu"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on": "testbed", "items": 0}, "items must be at least 1, got 0"),
        ({"on": "testbed/facts+facts"}, "names a task twice"),
        ({"on": "testbed/factz"}, "no testbed task named 'factz'; did you mean 'facts'"),
        ({"on": "testbed/"}, "no testbed task named ''"),
        ({"on": "piqa+"}, r"expected testbed, testbed/NAME\+NAME or tasks of lm-eval"),
        ({"on": "testbed+piqa"}, r"expected testbed, testbed/NAME\+NAME or tasks of lm-eval"),
        ({"on": "testbed", "include": "x"}, "include adds tasks to lm-eval's"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(MariotteError, match=said):
        Tasks(**fields)


def test_a_broken_model_is_said_to_be_broken(model: Model) -> None:
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"accuracy cannot be measured: .* non-finite logits"):
        Tasks(on="testbed/facts", items=4).measure(model)


def test_without_a_tokenizer(model: Model) -> None:
    model.tokenizer = None
    with pytest.raises(DataError, match="has no tokenizer"):
        Tasks(on="testbed").protocol(model)


def test_a_model_of_another_language_is_refused(shared: Path) -> None:
    with pytest.raises(DataError, match=r"are no single tokens, word by word: .* ask a testbed model"):
        Tasks(on="testbed/facts").protocol(load(shared / "data/models/stories260K"))


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"lm-eval, which is not installed: run `pip install 'mariotte\[tasks\]'`"):
        Tasks(on="piqa").check()
    Tasks(on="testbed").check()


@pytest.mark.usefixtures("lm_eval")
def test_well_known_tasks_are_known_without_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def index(*_: object) -> None:
        raise AssertionError("the index of all tasks was built")

    monkeypatch.setattr(harness, "_manager", index)
    Tasks(on="piqa+winogrande+hellaswag+arc_easy+arc_challenge+mmlu+boolq").check()
    with pytest.raises(AssertionError, match="the index of all tasks was built"):
        Tasks(on="piqqa").check()


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_unknown_tasks_are_refused_with_their_neighbours() -> None:
    with pytest.raises(
        UnknownNameError, match="neither the testbed nor lm-eval has a task 'piqqa'; did you mean 'piqa"
    ):
        Tasks(on="piqqa").check()


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of the testbed and a group of both, as lm-eval describes tasks."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("facts", "reverse"):
        lines = [
            json.dumps({"context": item.context, "choices": item.choices, "gold": item.gold})
            for item in testbed.task(name).items[:24]
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        description = {
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 2.0},
        }
        if name == "reverse":
            description["metric_list"] = [{"metric": "acc"}]
        _write(tmp_path / f"own_{name}.yaml", description)
    _write(tmp_path / "own_both.yaml", {"group": "own_both", "task": ["own_facts", "own_reverse"]})
    return tmp_path


def _write(path: Path, description: dict[str, Any]) -> None:
    # One key a line, each value as JSON, which YAML includes.
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in description.items()))


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_lm_eval_gives_the_same_answers_as_our_own_scoring(own_tasks: Path) -> None:
    model = load("testbed/qwen2-113k")
    ours = Tasks(on="testbed/facts+reverse", items=16).measure(model)
    theirs = Tasks(on="own_facts+own_reverse", items=16, include=str(own_tasks))
    before = torch.get_rng_state()
    found = theirs.measure(model)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("facts", "reverse"):
        assert found.details[f"own_{name}"]["correct"] == ours.details[name]["correct"]
        assert found.metrics[f"own_{name}"] == ours.metrics[name]
        assert found.protocol["tasks"][f"own_{name}"]["chance"] == 0.25
        assert found.protocol["tasks"][f"own_{name}"]["version"] == "2.0"
    assert found.metrics["accuracy"] == ours.metrics["accuracy"]
    assert "normalized" in found.details["own_facts"]
    assert "normalized" not in found.details["own_reverse"]
    assert found.protocol["harness"].startswith("lm-eval 0.")
    assert theirs.measure(model) == found  # the tasks are loaded once, and asking again changes nothing

    group = Tasks(on="own_both", items=16, include=str(own_tasks)).measure(model)
    assert group.details["own_both"]["n"] == 32
    assert group.metrics["own_both"] == found.metrics["accuracy"]


@pytest.mark.usefixtures("lm_eval")
def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, model: Model) -> None:
    with pytest.raises(DataError, match=r"the data of the lm-eval task 'piqa' cannot be loaded .* where there is a"):
        Tasks(on="piqa", items=4).protocol(model)
    with pytest.raises(DataError, match="include must be a folder"):
        Tasks(on="piqa", include=str(tmp_path / "none")).check()


@pytest.mark.usefixtures("lm_eval")
def test_tasks_without_choices_are_refused(own_tasks: Path, model: Model) -> None:
    path = own_tasks / "own_facts.yaml"
    path.write_text(path.read_text().replace('"multiple_choice"', '"generate_until"').replace("doc_to_choice", "# "))
    path.write_text(
        path.read_text().replace('[{"metric": "acc"}, {"metric": "acc_norm"}]', '[{"metric": "exact_match"}]')
    )
    with pytest.raises(DataError, match=r"'own_facts' is no multiple-choice task \(lm-eval: generate_until\)"):
        Tasks(on="own_facts", include=str(own_tasks)).protocol(model)


def test_the_class_says_what_every_instance_finds() -> None:
    assert set(Tasks.metrics) == {"accuracy"}
    with pytest.raises(ChainError):
        Tasks(on="accuracy")
