"""Tasks asked of encoders and encoder-decoders."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mariotte.errors import DataError, ModelError
from mariotte.evaluate.choices import Question, encode, log_likelihoods
from mariotte.evaluate.measures.tasks import RULES, Tasks
from mariotte.experiments.identity import measure_text, resolve_measure
from mariotte.models.model import Model
from mariotte.testbed import tasks as testbed
from mariotte.testbed import zoo
from mariotte.testbed.tasks import TASKS
from mariotte.testing.tiny import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The testbed's words, with a mask and a sentinel."""
    folder = tmp_path_factory.mktemp("tokenizer")
    zoo.save_tokenizer(folder)
    found = PreTrainedTokenizerFast.from_pretrained(folder)
    found.add_special_tokens({"mask_token": "<mask>", "additional_special_tokens": ["<extra_id_0>"]})
    return found


def _model(model_type: str, tokenizer: PreTrainedTokenizerFast) -> Model:
    model = tiny(model_type, vocab=len(tokenizer))
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> Model:
    return _model("bert", tokenizer)


@pytest.fixture
def writer(tokenizer: PreTrainedTokenizerFast) -> Model:
    return _model("t5", tokenizer)


def _pseudo(model: Model, before: list[int], choice: list[int], after: list[int]) -> float:
    """Pseudo-log-likelihood of a choice, one mask at a time."""
    total = 0.0
    whole = [*before, *choice, *after]
    for index, token in enumerate(choice):
        place = len(before) + index
        row = torch.tensor([[*whole[:place], model.tokenizer.mask_token_id, *whole[place + 1 :]]])
        with torch.no_grad():
            logits = model.hf(input_ids=row, attention_mask=torch.ones_like(row)).logits
        total += float(logits[0, place].log_softmax(-1)[token])
    return total


def _written(model: Model, source: list[int], before: list[int], choice: list[int]) -> float:
    """Log-likelihood of a choice that a decoder writes after `before`, having read `source`."""
    read, row = torch.tensor([source]), torch.tensor([[*before, *choice[:-1]]])
    with torch.no_grad():
        logits = model.hf(input_ids=read, attention_mask=torch.ones_like(read), decoder_input_ids=row).logits[0]
    logs = logits[-len(choice) :].log_softmax(-1)
    return float(sum(row[token] for row, token in zip(logs, choice, strict=True)))


def test_pseudo_likelihoods_by_hand(encoder: Model) -> None:
    questions = [
        Question((0, 5, 6), ((7,), (8,)), 0, after=(3,)),
        Question((0, 5), ((6, 7), (6, 8, 9), (9, 8)), 1, after=(3, 4)),
        Question((0, 5, 6, 9), ((7,),), 0),
    ]
    for batch in (256, 2):
        found = log_likelihoods(encoder, questions, batch=batch)
        for question, sums in zip(questions, found, strict=True):
            expected = [
                _pseudo(encoder, [*question.context], [*choice], [*question.after]) for choice in question.choices
            ]
            assert sums == pytest.approx(expected, abs=1e-4)


def test_written_likelihoods_by_hand(writer: Model) -> None:
    questions = [
        Question((1,), ((7,), (8, 9)), 0, source=(0, 5, 6, 2)),
        Question((1, 4), ((6, 7), (6, 8), (9, 8)), 1, source=(0, 5, 2)),
        Question((1, 4), ((6, 7),), 0, source=(0, 3, 2)),  # the same decoder row after another source
    ]
    for question, sums in zip(questions, log_likelihoods(writer, questions), strict=True):
        expected = [_written(writer, [*question.source], [*question.context], [*choice]) for choice in question.choices]
        assert sums == pytest.approx(expected, abs=1e-4)


def test_items_as_tokens_of_each_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    items = testbed.task("facts").items[:3]
    causal = encode(items, tokenizer)
    masked = encode(items, tokenizer, "masked")
    written = encode(items, tokenizer, "seq2seq", start=7)
    bos, sentinel = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for one, other, third in zip(causal, masked, written, strict=True):
        assert one.choices == other.choices == third.choices
        assert other.context == one.context
        assert third.source == (*one.context, sentinel)
        assert third.context == (7, sentinel)
        assert one.context[0] == bos


def test_encoders_are_refused_by_name_unless_pseudo_likelihood_is_asked_for(encoder: Model) -> None:
    for on in ("testbed", "piqa"):
        with pytest.raises(ModelError, match=rf"the encoder tiny-bert does not have: .* tasks:{on}\(pseudo=true\)"):
            Tasks(on=on).protocol(encoder)
    asked = Tasks(on="testbed/facts+reverse", items=6, pseudo=True)
    assert measure_text(asked) == "tasks:testbed/facts+reverse(items=6, pseudo=true)"
    assert resolve_measure(measure_text(asked)) == asked
    assert measure_text(Tasks(on="testbed")) == "tasks:testbed"
    found = asked.measure(encoder)
    assert found.protocol["rule"] == RULES["masked"]
    for name in ("facts", "reverse"):
        items = testbed.task(name).items[:6]
        for item, question, right in zip(
            items, encode(items, encoder.tokenizer, "masked"), found.details[name]["correct"], strict=True
        ):
            sums = [_pseudo(encoder, [*question.context], [*choice], []) for choice in question.choices]
            assert right == str(int(int(np.argmax(sums)) == item.gold))


def test_encoder_decoders_write_the_answer(writer: Model) -> None:
    found = Tasks(on="testbed/facts+events", items=6).measure(writer)
    assert found.protocol["rule"] == RULES["seq2seq"]
    start = writer.config["decoder_start_token_id"]
    for name in ("facts", "events"):
        questions = encode(testbed.task(name).items[:6], writer.tokenizer, "seq2seq", start)
        for question, right in zip(questions, found.details[name]["correct"], strict=True):
            sums = [_written(writer, [*question.source], [*question.context], [*one]) for one in question.choices]
            assert right == str(int(int(np.argmax(sums)) == question.gold))


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_uniform_model_scores_exactly_chance(
    model_type: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(model_type, tokenizer)

    def even(tokens: torch.Tensor, written: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(*(tokens if written is None else written).shape, len(tokenizer))

    monkeypatch.setattr(model, "logits", even)
    found = Tasks(on="testbed", items=40, pseudo=True).measure(model)
    assert {name: found.metrics[name] for name in TASKS} == dict(TASKS)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_a_model_that_knows_scores_one_and_one_that_knows_another_answer_zero(
    model_type: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(model_type, tokenizer)
    asked = Tasks(on="testbed/facts", items=24, pseudo=True)
    questions = encode(
        testbed.task("facts").items[:24], tokenizer, model.kind, model.config.get("decoder_start_token_id")
    )
    said: dict[tuple[int, ...], tuple[int, ...]] = {}

    def knowing(tokens: torch.Tensor, written: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.zeros(*(tokens if written is None else written).shape, len(tokenizer))
        for row, ids in enumerate(tokens.tolist()):
            if written is not None:
                logits[row, -1, said[tuple(ids)][0]] = 50.0
                continue
            place = ids.index(tokenizer.mask_token_id)
            logits[row, place, said[tuple(ids[:place])][0]] = 50.0
        return logits

    monkeypatch.setattr(model, "logits", knowing)
    for shift, accuracy in ((0, 1), (1, 0)):
        for question in questions:
            answer = question.choices[(question.gold + shift) % len(question.choices)]
            said[question.source if model_type == "t5" else question.context] = answer
        assert asked.measure(model).metrics["accuracy"] == accuracy


def test_without_a_mask_token(encoder: Model) -> None:
    zoo_tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoder.tokenizer.backend_tokenizer)
    zoo_tokenizer.unk_token = encoder.tokenizer.unk_token
    encoder.tokenizer = zoo_tokenizer
    with pytest.raises(DataError, match="must have a mask token for pseudo-likelihood, and has none: add it"):
        Tasks(on="testbed/facts", items=2, pseudo=True).measure(encoder)


def test_without_a_token_to_begin_with(writer: Model) -> None:
    writer.hf.config.decoder_start_token_id = None
    with pytest.raises(DataError, match="must state decoder_start_token_id to write an answer, got None: add it"):
        Tasks(on="testbed/facts", items=2).protocol(writer)


lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'mariotte[tasks]'"
)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Items of ARC's form in the testbed's words, the last too long for the model, in MARIOTTE_DATA."""
    monkeypatch.setenv("MARIOTTE_DATA", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    rows = [
        {"query": f"Question: {item.context}", "choices": [*item.choices], "gold": item.gold}
        for name in ("facts", "reverse")
        for item in testbed.task(name).items[:4]
    ]
    rows[-1]["query"] = f"Question: {' '.join([rows[0]['query'].removeprefix('Question: ')] * 40)}"
    (tmp_path / "tasks/arc_easy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks/lambada_openai.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    return rows


@lm_eval
def test_lm_eval_asks_an_encoder_for_pseudo_likelihoods(encoder: Model, words: list[dict[str, Any]]) -> None:
    part = Tasks(on="arc_easy", pseudo=True).measure(encoder).details["arc_easy"]
    for row, chosen in zip(words, part["chosen"], strict=True):
        prompt = f"{row['query']}\nAnswer:"
        sums: list[float] = []
        for choice in row["choices"]:
            read, whole = (
                encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (prompt, f"{prompt} {choice}")
            )
            answer = whole[len(read) :]
            read = read[-(128 - 1 - len(answer)) :]  # 128 positions, of which <bos> takes one
            sums.append(_pseudo(encoder, [encoder.tokenizer.bos_token_id, *read], answer, []))
        assert int(chosen) == int(np.argmax(sums))
    with pytest.raises(
        DataError, match="'lambada_openai' asks for the next word, which the encoder tiny-bert does not"
    ):
        Tasks(on="lambada_openai", pseudo=True).measure(encoder)


@lm_eval
def test_lm_eval_asks_an_encoder_decoder_to_write(writer: Model, words: list[dict[str, Any]]) -> None:
    part = Tasks(on="arc_easy", items=7).measure(writer).details["arc_easy"]
    start = writer.config["decoder_start_token_id"]
    for row, chosen in zip(words, part["chosen"], strict=False):
        source = writer.tokenizer(f"{row['query']}\nAnswer:")["input_ids"]
        answers = [writer.tokenizer(f" {one}", add_special_tokens=False)["input_ids"] for one in row["choices"]]
        assert int(chosen) == int(np.argmax([_written(writer, source, [start], answer) for answer in answers]))
