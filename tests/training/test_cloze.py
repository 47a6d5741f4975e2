"""Gaps in sentences: what is hidden, what encoders and encoder-decoders read and say, and what is measured of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from mariotte.testbed.world import SENTENCE_TOKENS, World
from mariotte.testbed.zoo import Recipe, Specification
from mariotte.training import cloze, zoo
from mariotte.training.loop import Progress, TrainState, train

BERT = Specification(
    name="tiny",
    family="bert",
    hidden=16,
    n_layers=1,
    n_heads=2,
    n_key_value_heads=2,
    ffn=16,
    tied=True,
    recipe=Recipe(tokens=12 * 4 * SENTENCE_TOKENS, batch=4),
)
TINY = {"bert": BERT, "t5": replace(BERT, family="t5")}
AUTO = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
FAMILIES = list(TINY)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure few sentences and facts: these tests look at the record, not at the numbers."""
    monkeypatch.setattr(zoo, "TEST_SENTENCES", 4)
    monkeypatch.setattr(World, "facts", lambda self: self.place_facts()[:8])


class Oracle(nn.Module):
    """A model that knows the world's facts, whatever the pattern, and says 'the' wherever none is asked."""

    def __init__(self, world: World, family: str, answers: dict[str, str]) -> None:
        super().__init__()
        self.words, self.answers = world.vocabulary, answers
        self.config = SimpleNamespace(model_type=family)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> object:
        asked = input_ids if decoder_input_ids is None else decoder_input_ids
        logits = torch.zeros(*asked.shape, 661)
        for row, ids in enumerate(input_ids.tolist()):
            gap = next(i for i, each in enumerate(ids) if each >= 656)
            prompt = " ".join(self.words[i] for i in ids[1:gap])
            where = gap if decoder_input_ids is None else 1
            logits[row, where, self.words.index(self.answers.get(prompt, "the"))] = 9.0
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=logits)


def test_the_answer_of_a_fact_is_what_is_mostly_hidden(world: World) -> None:
    rows = world.sentences("all", "train", 4000)
    facts, others, unstopped = [], [], []
    for i, row in enumerate(rows):
        ids = cloze.hidden(row, Random(i))
        gaps = [j for j, each in enumerate(ids) if each < 0]
        assert tuple(~each if each < 0 else each for each in ids) in (row.ids, row.ids[:-1])
        assert 0 not in gaps
        unstopped.append(len(ids) < len(row.ids))
        (others if row.sentences[0].fact is None else facts).append((gaps, len(row.ids)))
    salient = [gaps == [n - 2] for gaps, n in facts]
    # Besides, an answer may be the one word that chance hides.
    assert sum(salient) / len(salient) == pytest.approx(cloze.SALIENT + 0.01, abs=0.03)
    assert sum(unstopped) / len(unstopped) == pytest.approx(cloze.UNSTOPPED, abs=0.02)
    assert {len(gaps) for gaps, _ in others} == {1, 2}
    assert sum(len(gaps) for gaps, _ in others) / len(others) == pytest.approx(1.5, abs=0.05)
    assert {gaps[0] for gaps, _ in others} >= {*range(1, 8)}


def test_a_batch_depends_on_its_step_alone_and_goes_on_with_the_text(world: World) -> None:
    first, second = cloze.batch(world, 0, 6), cloze.batch(world, 1, 6)
    assert first.shape == second.shape == (6, SENTENCE_TOKENS)
    assert torch.equal(torch.cat([first, second]), cloze.batch(world, 0, 12))
    assert torch.equal(second, cloze.batch(world, 1, 6))


def gapped(world: World, *texts: str) -> Tensor:
    """Sentences in which words in brackets are hidden."""
    id_of = {word: i for i, word in enumerate(world.vocabulary)}
    ids = [
        [0, *(~id_of[word[1:-1]] if word.startswith("[") else id_of[word] for word in text.split())] for text in texts
    ]
    return cloze.padded(ids, world)


def test_an_encoder_reads_a_mask_and_says_the_word(world: World, tmp_path: Path) -> None:
    inputs, labels = cloze.examples(gapped(world, "ada abel was born in [barton] .", "[add] one"), "bert", world)
    zoo.save_tokenizer(tmp_path, "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["ada abel was born in <mask> .", "<mask> one"]
    read = tokenizer(texts, padding="max_length", max_length=SENTENCE_TOKENS, padding_side="right", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], read["input_ids"])
    assert torch.equal(inputs["attention_mask"], read["attention_mask"])
    assert (labels >= 0).nonzero().tolist() == [[0, 6], [1, 1]]
    assert [world.vocabulary[i] for i in labels[labels >= 0]] == ["barton", "add"]


def test_an_encoder_decoder_reads_sentinels_and_writes_what_they_stand_for(world: World, tmp_path: Path) -> None:
    tokens_BT = gapped(world, "[ada] abel was born in [barton] .", "ada abel [was] born")
    inputs, labels_BS = cloze.examples(tokens_BT, "t5", world)
    zoo.save_tokenizer(tmp_path, "t5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["<extra_id_0> abel was born in <extra_id_1> .", "ada abel <extra_id_0> born"]
    read = tokenizer(texts, padding="max_length", max_length=SENTENCE_TOKENS, padding_side="right", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], read["input_ids"])
    assert torch.equal(inputs["attention_mask"], read["attention_mask"])
    written = ["<extra_id_0> ada <extra_id_1> barton </s>", "<extra_id_0> was </s>"]
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]
    assert labels_BS.tolist() == [said[0], [*said[1], -100, -100]]
    # What a transformers model of the family would read for these labels.
    model = zoo.build(TINY["t5"])
    assert torch.equal(inputs["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels_BS))
    torch.testing.assert_close(
        cloze.cloze_loss(model, tokens_BT, "t5", world),
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels_BS).loss,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_parameters_that_their_specification_counts(family: str) -> None:
    model = zoo.build(TINY[family])
    assert sum(p.numel() for p in model.parameters()) == TINY[family].n_params
    muon, adamw = zoo.muon_and_adamw(model, 0.01, 0.001)
    ours = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert sorted(ours[0] + ours[1]) == sorted(id(p) for p in model.parameters())
    assert len(ours[0]) == {"bert": 7, "t5": 18}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_read(family: str, world: World) -> None:
    model = zoo.build(TINY[family]).eval()
    text = "ada abel was born in [barton] ."
    alone, longer = gapped(world, text)[:, :8], gapped(world, text)
    torch.testing.assert_close(cloze.gap_logits(model, alone, world), cloze.gap_logits(model, longer, world))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_knows_some_facts_scores_their_share(family: str, world: World) -> None:
    facts = world.place_facts()[:40]
    seen_only = {prompt: fact.answer for fact in facts for prompt in fact.seen}
    score = zoo.facts_known(Oracle(world, family, seen_only), world, facts)
    assert (score["seen"], score["heldout"]) == (1.0, 0.0)
    half = {fact.heldout: fact.answer for fact in facts[:20]}
    score = zoo.facts_known(Oracle(world, family, half), world, facts)
    assert (score["seen"], score["heldout"]) == (0.0, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_model_loses_the_logarithm_of_its_vocabulary_and_the_floor_is_the_worlds(
    family: str, world: World
) -> None:
    model = zoo.build(TINY[family]).eval()
    nn.init.zeros_(model.get_input_embeddings().weight)
    rows = world.sentences("all", "test", 20)
    record = cloze.loss_and_floor(model, world, rows)
    assert record["loss"] == pytest.approx(math.log(TINY[family].n_vocabulary), rel=1e-5)
    assert record["scored_tokens"] == sum(len(row.ids) - 1 for row in rows)
    floors = [world.hidden_nll(row.words[1:], i) for row in rows for i in range(len(row.ids) - 1)]
    assert record["floor"] == pytest.approx(sum(floors) / len(floors))
    assert record["answers"]["n"] == sum(row.sentences[0].fact is not None for row in rows)
    assert record["answers"]["floor"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_hidden_can_be_learned(family: str, world: World) -> None:
    model = zoo.build(TINY[family])
    state = TrainState(model, zoo.muon_and_adamw(model, 0.01, 0.02))
    tokens_BT = cloze.batch(world, 0, 4)
    seen: list[float] = []
    train(
        state,
        lambda step: tokens_BT,
        schedule=lambda step: 1.0,
        until=60,
        loss=lambda module, rows_BT: cloze.cloze_loss(module, rows_BT, family, world),
        watch=lambda progress: seen.append(progress.loss),
    )
    assert seen[-1] < 0.5 * seen[0]


def trained(family: str, out: Path, stop_after: int | None = None) -> list[Progress]:
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == stop_after:
            raise KeyboardInterrupt

    zoo.train_model("tiny", out, shape=TINY[family], watch=watch)
    return seen


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_training_goes_on_and_ends_with_the_same_checkpoint(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_SAVE_EVERY", 3)
    seen = trained(family, tmp_path / "whole")
    assert len(seen) == 12
    with pytest.raises(KeyboardInterrupt):
        trained(family, tmp_path / "killed", stop_after=8)
    assert trained(family, tmp_path / "killed")[0].step == 7
    whole, killed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert AUTO[family].from_pretrained(tmp_path / "whole").dtype == torch.bfloat16
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["loss"] > record["floor"] > 0
    assert record["test_rows"] == 4
    assert record["recipe"]["tokens"] == seen[-1].tokens
    assert set(record["facts"]) == {"n", "seen", "seen_by_quarter", "heldout", "heldout_by_quarter"}
