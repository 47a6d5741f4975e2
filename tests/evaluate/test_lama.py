"""LAMA asked of models of the three kinds whose answers are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.data.lama import Probe
from mariotte.errors import ChainError, DataError, UnknownNameError
from mariotte.evaluate.cloze import Asker, Placings, Prompt, log_likelihoods, vocabulary_placings
from mariotte.evaluate.facts import Facts, Told, rows_between, rows_of
from mariotte.evaluate.measures.knowledge import Knowledge
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testing.tiny import tiny

BORN = {"Ada": "London", "Ben": "Paris", "Cleo": "New York", "Dan": "London", "Eve": "Rome"}
PLAYS = {"Ada": "piano", "Ben": "guitar", "Eve": "piano"}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[MASK]", "<extra_id_0>", "[CLS]", "[SEP]"]
WORDS = ["was", "born", "in", "plays", "the", ".", "is", "from", "who", "It", "(", ")", "a", "native", "of"]
VOCAB = {
    word: i
    for i, word in enumerate(
        dict.fromkeys([*SPECIAL, *WORDS, *BORN, "London", "Paris", "New", "York", "Rome", "piano", "guitar", "Oslo"])
    )
}


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LAMA of two relations of T-REx and one of Google-RE, with ParaRel's paraphrases, all made by hand."""
    lama = tmp_path / "lama"
    write(
        lama / "relations.jsonl",
        [
            {"relation": "P19", "template": "[X] was born in [Y] ."},
            {"relation": "P1303", "template": "[X] plays the [Y] ."},
        ],
    )
    for name, facts in (("P19", BORN), ("P1303", PLAYS)):
        write(lama / f"TREx/{name}.jsonl", [{"sub_label": s, "obj_label": o} for s, o in facts.items()])
    write(lama / "Google_RE/place_of_birth_test.jsonl", [{"sub_label": s, "obj_label": o} for s, o in BORN.items()])
    patterns = ["[X] was born in [Y].", "[X] is from [Y].", "[Y] is native of [X].", "[X] is native of [Y]."]
    write(tmp_path / "pararel/patterns/P19.jsonl", [{"pattern": pattern} for pattern in patterns])
    (lama / "common_vocab_cased.txt").write_text("London\nParis\nOslo\npiano\nguitar\n", encoding="utf-8")
    monkeypatch.setenv("MARIOTTE_DATA", str(tmp_path))
    return tmp_path


def tokenizer_for(kind: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "masked":
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])]
        )
    special = {"unk_token": "<unk>", "pad_token": "<pad>"}
    special |= {"masked": {"mask_token": "[MASK]"}, "causal": {"bos_token": "<s>"}}.get(
        kind, {"extra_special_tokens": ["<extra_id_0>"], "eos_token": "</s>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


class Cache:
    """What a fake remembers of its rows: everything that it has read."""

    def __init__(self, rows: list[tuple[int, ...]], sources: list[tuple[int, ...]]) -> None:
        self.rows, self.sources = rows, sources

    def batch_select_indices(self, index: Tensor) -> None:
        self.rows = [self.rows[i] for i in index.tolist()]
        self.sources = [self.sources[i] for i in index.tolist()]


class Fake(torch.nn.Module):
    """A model whose logits are set: `say` tells the next token from what was read and written, None for equal ones."""

    def __init__(self, kind: str, say: Callable[[tuple[int, ...], tuple[int, ...]], int | None]) -> None:
        super().__init__()
        self.kind, self.say, self.dtype = kind, say, torch.float32

    def forward(
        self,
        input_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_outputs: Any = None,
        **_: Any,
    ) -> SimpleNamespace:
        given = decoder_input_ids if decoder_input_ids is not None else input_ids
        assert given is not None
        if past_key_values is None:
            read = [] if input_ids is None else input_ids.tolist()
            sources = [tuple(row) for row in read] if self.kind == "seq2seq" else [()] * len(given)
            cache = Cache([tuple(row) for row in given.tolist()], sources)
        else:
            old = past_key_values
            cache = Cache([(*a, *b) for a, b in zip(old.rows, given.tolist(), strict=True)], old.sources)
        if encoder_outputs is not None:
            assert len(encoder_outputs.last_hidden_state) == len(given)
        logits = torch.zeros(*given.shape, len(VOCAB))
        for row, read, source in zip(logits, cache.rows, cache.sources, strict=True):
            token = self.say(source, read)
            if token is not None:
                row[read.index(VOCAB["[MASK]"]) if self.kind == "masked" else -1, token] = 50.0
        return SimpleNamespace(
            logits=logits, past_key_values=cache, encoder_last_hidden_state=torch.zeros(len(given), 1, 1)
        )


def fake(kind: str, knows: Mapping[tuple[str, str], str] | None) -> Model:
    """A model of a kind that knows answers by subject and verb, or, with None, finds every token equally likely."""

    def say(source: tuple[int, ...], read: tuple[int, ...]) -> int | None:
        if knows is None:
            return None
        words = [word for word, i in VOCAB.items() if i in {*source, *read}]
        for (subject, verb), answer in knows.items():
            if subject in words and verb in words:
                tokens = [VOCAB[word] for word in answer.split()]
                done = 0 if kind == "masked" else sum(token in read for token in tokens)
                return tokens[done] if done < len(tokens) else None
        return None

    return cast(
        Model,
        SimpleNamespace(
            kind=kind,
            name=f"fake-{kind}",
            hf=Fake(kind, say),
            tokenizer=tokenizer_for(kind),
            config={"decoder_start_token_id": 0, "model_type": "fake"},
            longest=None,
            device=torch.device("cpu"),
            shape=SimpleNamespace(vocab=len(VOCAB)),
        ),
    )


TRUTH = {(s, "born"): o for s, o in BORN.items()} | {(s, "plays"): o for s, o in PLAYS.items()}
KINDS = ("causal", "masked", "seq2seq")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [None, "relation", "vocabulary", "common"])
@pytest.mark.usefixtures("folder")
def test_a_model_that_knows_the_answers_scores_one(kind: str, candidates: str | None) -> None:
    found = Knowledge(on="lama/trex", candidates=candidates).measure(fake(kind, TRUTH))
    assert set(found.metrics.values()) == {1.0}
    multi = kind == "masked" or candidates in ("vocabulary", "common")
    rome = candidates == "common"
    assert found.protocol["n_facts"] == 8 - multi - rome
    assert found.protocol["n_unreachable"] == multi + rome
    assert len(found.details["known"]) == 8 - multi - rome
    assert ("trex/P19/Cleo/New York" in found.details["known"]) is not multi


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("folder")
def test_a_uniform_model_scores_chance(kind: str) -> None:
    measure = Knowledge(on="lama/trex", candidates="relation", per_token=True)
    found = measure.measure(fake(kind, None))
    places = 3 if kind == "masked" else 4  # London, Paris, Rome, and New York where two tokens can be given
    assert found.protocol["chance_top1"] == pytest.approx((1 / places + 1 / 2) / 2)
    assert found.metrics["top1"] == pytest.approx(found.protocol["chance_top1"])
    assert found.metrics["top5"] == found.metrics["top10"] == 1
    harmonic = sum(1 / i for i in range(1, places + 1)) / places
    assert found.metrics["mrr"] == pytest.approx((harmonic + 0.75) / 2)
    assert found.details["known"] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("folder")
def test_a_uniform_model_scores_chance_in_the_vocabulary(kind: str) -> None:
    found = Knowledge(on="lama/trex", candidates="vocabulary").measure(fake(kind, None))
    assert found.metrics["top1"] == pytest.approx(1 / len(VOCAB)) == found.protocol["chance_top1"]
    assert found.metrics["top10"] == pytest.approx(10 / len(VOCAB))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("folder")
def test_what_is_half_known_is_counted_by_relation_and_fact(kind: str) -> None:
    knows = {**TRUTH, ("Ada", "born"): "Paris", ("Ben", "plays"): "piano"}
    measure = Knowledge(on="lama/trex", relations="P19+P1303", candidates="relation")
    dense = measure.measure(fake(kind, TRUTH))
    found = measure.measure(fake(kind, knows), dense)
    asked = 4 if kind == "masked" else 5
    assert found.details["relations"]["trex/P19"]["top1"] == pytest.approx((asked - 1) / asked)
    assert found.details["relations"]["trex/P1303"]["top1"] == pytest.approx(2 / 3)
    assert found.metrics["top1"] == pytest.approx(((asked - 1) / asked + 2 / 3) / 2)
    assert found.details["lost"] == ["trex/P1303/Ben/guitar", "trex/P19/Ada/London"]
    assert found.details["gained"] == []
    assert "trex/P19/Ben/Paris" in Facts.between(dense.details, found.details).kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", ["relation", "vocabulary"])
@pytest.mark.usefixtures("folder")
def test_every_fact_is_told_with_rank_and_probability(kind: str, candidates: str) -> None:
    knows = {**TRUTH, ("Ada", "born"): "Paris"}
    measure = Knowledge(on="lama/trex", relations="P19", candidates=candidates)
    found, told = measure.tell(fake(kind, knows))
    assert found == measure.measure(fake(kind, knows))
    assert len(told) == found.protocol["n_facts"]
    assert [one.fact for one in told if one.known] == [*found.details["known"]]
    ada, ben = told[:2]
    assert (ada.subject, ada.relation, ada.answer) == ("Ada", "trex/P19", "London")
    assert (ada.template, ada.wording) == ("[X] was born in [Y] .", "main")
    # All but the answer said are equal: the right one is behind one and level with all others, of one token as it is.
    places = found.details["relations"]["trex/P19"]["candidates"]
    assert ada.rank == places - (candidates == "relation" and kind != "masked")
    assert (ben.rank, ben.probability) == (1, pytest.approx(1))
    assert ada.probability == pytest.approx(float(torch.tensor([50.0, *[0.0] * (len(VOCAB) - 1)]).softmax(0)[1]))


@pytest.mark.usefixtures("folder")
def test_probability_is_of_the_whole_answer_however_it_is_ranked() -> None:
    for per_token in (False, True):
        measure = Knowledge(on="lama/trex", relations="P19", per_token=per_token)
        told = {one.subject: one for one in measure.tell(fake("causal", None))[1]}
        assert told["Ada"].probability == pytest.approx(1 / len(VOCAB))
        assert told["Cleo"].probability == pytest.approx(1 / len(VOCAB) ** 2)
        assert told["Cleo"].answer == "New York"


def test_sentences_are_their_own_templates(folder: Path) -> None:
    rows = [{"obj_label": "London", "masked_sentences": ["Ada was born in [MASK] ."]}]
    write(folder / "lama/Squad/test.jsonl", rows)
    (one,) = Knowledge(on="lama/squad").tell(fake("masked", TRUTH))[1]
    assert (one.template, one.subject, one.relation) == ("Ada was born in [Y] .", "", "squad")


@pytest.mark.usefixtures("folder")
def test_paraphrases_are_told_too() -> None:
    told = Knowledge(on="lama/trex", relations="P19", paraphrases=1).tell(fake("causal", TRUTH))[1]
    assert [one.wording for one in told] == ["main"] * 5 + ["paraphrase"] * 5
    assert {one.template for one in told[5:]} == {"[X] is from [Y]."}


@pytest.mark.usefixtures("folder")
def test_paraphrases_that_agree_and_that_do_not() -> None:
    # Told through "from" and "native" what is told through "born", but for one fact through one wording.
    knows = TRUTH | {(s, "from"): o for s, o in BORN.items()} | {(s, "native"): o for s, o in BORN.items()}
    measure = Knowledge(on="lama/trex", relations="P19", paraphrases=3)
    whole = measure.measure(fake("causal", knows))
    # Two paraphrases: LAMA's own template is left out, and so is the one whose answer comes first.
    assert whole.details["relations"]["trex/P19"]["paraphrases"] == 2
    assert (whole.metrics["consistency"], whole.metrics["consistent_accuracy"]) == (1, 1)
    knows[("Ada", "from")] = "Rome"
    part = measure.measure(fake("causal", knows)).metrics
    assert part["top1"] == 1
    assert part["consistency"] == pytest.approx((4 + 1 / 3) / 5)
    assert part["consistent_accuracy"] == pytest.approx(4 / 5)
    assert part["paraphrase_accuracy"] == pytest.approx(9 / 10)


def test_a_causal_model_is_asked_where_the_answer_comes_last(folder: Path) -> None:
    lama = folder / "lama"
    rows = [
        {"relation": "P19", "template": "In [Y] was [X] born ."},
        {"relation": "P1303", "template": "[Y] is what [X] plays ."},
    ]
    write(lama / "relations.jsonl", rows)
    found = Knowledge(on="lama/trex").measure(fake("causal", TRUTH))
    assert found.details["relations"]["trex/P19"]["template"] == "[X] was born in [Y]."
    assert found.details["unasked"] == {"trex/P1303": {"the answer does not come last": 3}}
    assert found.protocol["n_unreachable"] == 3


@pytest.mark.usefixtures("folder")
def test_what_is_missing_is_counted() -> None:
    found = Knowledge(on="lama").measure(fake("causal", TRUTH))
    missing = found.details["missing"]
    assert found.protocol["missing"] == missing
    assert len(missing) == 39 + 2 + 2
    assert {"squad", "conceptnet", "trex/P17", "google_re/place_of_death"} <= {*missing}
    assert set(found.details["subsets"]) == {"trex", "google_re"}
    assert found.details["subsets"]["google_re"]["n"] == 5


def test_facts_that_bring_their_sentences(folder: Path) -> None:
    rows = [
        {"pred": "From", "sub_label": "Ada", "obj_label": "London", "masked_sentences": ["Ada was born in [MASK] ."]},
        {"pred": "From", "sub_label": "Ben", "obj_label": "Paris", "masked_sentences": ["Ben was born in [MASK] ."]},
        {"pred": "Is", "sub_label": "Eve", "obj_label": "piano", "masked_sentences": ["It is [MASK] Eve plays ."]},
    ]
    write(folder / "lama/ConceptNet/test.jsonl", rows)
    write(folder / "lama/Squad/test.jsonl", [{k: v for k, v in row.items() if k != "pred"} for row in rows])
    measure = Knowledge(on="lama/conceptnet+squad")
    wrong = {**TRUTH, ("Eve", "plays"): "guitar"}
    masked = measure.measure(fake("masked", wrong))
    # Over facts, not over relations, as LAMA reports these two.
    assert masked.details["subsets"]["conceptnet"]["top1"] == pytest.approx(2 / 3)
    assert masked.details["subsets"]["squad"]["top1"] == pytest.approx(2 / 3)
    causal = measure.measure(fake("causal", wrong))
    assert causal.details["relations"]["squad"]["unreachable"] == {"the answer does not come last": 1}
    assert causal.details["unasked"] == {"conceptnet/Is": {"the answer does not come last": 1}}


def test_what_asking_takes_is_counted_from_files(folder: Path) -> None:
    trex = Knowledge(on="lama/trex")
    # Of P19 five prompts and, behind each, "New"; of P1303 three. An encoder follows nothing.
    asked = trex.work("causal")
    assert asked is not None
    assert (asked.items, asked.passes) == (8, 5 * 2 + 3)
    assert asked.tokens == trex.tokens == round(1.3 * (5 * (6 + 1) + 3 * 5))
    encoder = trex.work("masked")
    assert encoder is not None
    assert (encoder.items, encoder.passes) == (8, 8)
    fewer = Knowledge(on="lama/trex", relations="P19", facts=2, paraphrases=1).work("seq2seq")
    assert fewer is not None
    assert (fewer.items, fewer.passes) == (2, 2 * 2 * 2)
    (folder / "lama/TREx/P19.jsonl").write_text("{", encoding="utf-8")
    assert trex.work("causal") is None
    assert trex.tokens == 0


@pytest.mark.usefixtures("folder")
def test_a_dry_run_says_what_asking_takes(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        'format = 1\nname = "s"\nmodels = ["testbed/qwen2-46k", "testbed/t5-784k"]\n'
        'measures = ["knowledge:lama/trex", "tasks:testbed/facts(items=4)"]\n[[chains]]\nchain = "magnitude@0.5"\n'
    )
    done = CliRunner().invoke(app, ["run", str(study), "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["knowledge:lama/trex", "causal", "8", "13"] in lines
    assert ["knowledge:lama/trex", "seq2seq", "8", "13"] in lines
    assert ["tasks:testbed/facts(items=4)", "causal", "4", "4"] in lines
    plain = json.loads(CliRunner().invoke(app, ["run", str(study), "--dry-run", "--json"]).stdout)
    assert {"measure": "knowledge:lama/trex", "kind": "causal", "items": 8, "passes": 13} in plain["asked"]


@pytest.mark.usefixtures("folder")
def test_facts_are_drawn_by_seed() -> None:
    def ids(seed: int) -> list[str]:
        return Knowledge(on="lama/trex", facts=2, seed=seed).measure(fake("causal", TRUTH)).details["known"]

    assert ids(0) == ids(0)
    assert len(ids(0)) == 4
    assert len({tuple(ids(seed)) for seed in range(6)}) > 1


def causal_model() -> Model:
    model = tiny("qwen2", vocab=len(VOCAB))
    model.tokenizer = tokenizer_for("causal")
    return model


def other_model(kind: str) -> Model:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCAB), "num_hidden_layers": 2}
    if kind == "masked":
        config = BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, **sizes)
        hf: Any = BertForMaskedLM(config)
    else:
        hf = T5ForConditionalGeneration(
            T5Config(vocab_size=len(VOCAB), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        )
        hf.config.decoder_start_token_id = 0
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    model = SimpleNamespace(
        kind=kind,
        name=kind,
        hf=hf.eval(),
        tokenizer=tokenizer_for(kind),
        config=hf.config.to_dict(),
        longest=None,
        device=torch.device("cpu"),
        shape=SimpleNamespace(vocab=len(VOCAB)),
    )
    return cast(Model, model)


@torch.no_grad()
def naive(model: Model, prompt: Prompt, candidate: tuple[int, ...]) -> float:
    """Log-likelihood of one candidate after one prompt in one pass, without cache or sharing."""
    row = torch.tensor([[*prompt.tokens, *candidate]])
    if prompt.position is not None:
        logits = model.hf(input_ids=torch.tensor([prompt.tokens])).logits[0, prompt.position]
        return float(logits.log_softmax(-1)[candidate[0]])
    given = {"input_ids": row}
    if prompt.source is not None:
        given = {"input_ids": torch.tensor([prompt.source]), "decoder_input_ids": row}
    logs = model.hf(**given, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt.tokens) - 1 + i, token]) for i, token in enumerate(candidate))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 2048])
def test_sharing_changes_no_likelihood(kind: str, rows: int) -> None:
    model = causal_model() if kind == "causal" else other_model(kind)
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, len(VOCAB), (length,), generator=generator).tolist())

    lengths = (4, 6, 4, 5)
    if kind == "masked":
        prompts = [Prompt((6, *tokens(n), 4, 7), n + 1) for n in lengths]
        candidates = [tokens(1) for _ in range(5)]
    else:
        prompts = [Prompt(tokens(n), source=tokens(n + 1) if kind == "seq2seq" else None) for n in lengths]
        shared = tokens(2)
        candidates = [tokens(1), (*shared, 9), (*shared, 10, 11), shared, tokens(4), tokens(1)]
    candidates = [*dict.fromkeys(candidates)]
    scores, free = log_likelihoods(model, prompts, candidates, rows=rows)
    expected = torch.tensor([[naive(model, p, c) for c in candidates] for p in prompts], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    everything = [(token,) for token in range(len(VOCAB))]
    assert free.tolist() == log_likelihoods(model, prompts, everything)[0].argmax(1).tolist()
    each = log_likelihoods(model, prompts, candidates, per_token=True, rows=rows)[0]
    torch.testing.assert_close(each, scores / torch.tensor([len(c) for c in candidates]))


@pytest.mark.parametrize("kind", KINDS)
def test_among_is_a_part_of_the_vocabulary(kind: str) -> None:
    model = causal_model() if kind == "causal" else other_model(kind)
    masked = kind == "masked"
    prompts = [
        Prompt((6, 9 + i, 4, 7), position=2 if masked else None, source=(8, 9 + i) if kind == "seq2seq" else None)
        for i in range(5)
    ]
    whole = vocabulary_placings(model, prompts, [12] * 5)
    part = vocabulary_placings(model, prompts, [12] * 5, [10, 12, 20])
    assert bool((part.above <= whole.above).all())
    assert int(part.above.max()) <= 2
    assert whole.level.tolist() == part.level.tolist() == [1] * 5


def test_placings_by_hand() -> None:
    # First of all; third behind two; among three equals behind one.
    found = Placings(torch.tensor([0, 2, 1]), torch.tensor([1, 1, 3]), torch.tensor([0, 0, 0]))
    assert found.hits(1).tolist() == [1, 0, 0]
    assert found.hits(2).tolist() == pytest.approx([1, 0, 1 / 3])
    assert found.hits(5).tolist() == [1, 1, 1]
    assert found.reciprocal().tolist() == pytest.approx([1, 1 / 3, (1 / 2 + 1 / 3 + 1 / 4) / 3])
    assert found.known().tolist() == [True, False, False]


def test_an_encoder_decoder_with_a_mask_writes_the_sentence_up_to_it() -> None:
    model = other_model("seq2seq")
    backend = Tokenizer(models.WordLevel({w: i for w, i in VOCAB.items() if w != "<extra_id_0>"}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    asker = Asker(model)
    probe = Probe("", "Ada was born in ", " .", "New York")
    prompt = asker.prompts([probe])[0]
    left = tuple(VOCAB[word] for word in ["Ada", "was", "born", "in"])
    assert prompt.tokens == (0, 1, *left)
    assert prompt.source == (1, *left, VOCAB["[MASK]"], VOCAB["."], 2)
    assert asker.answers(probe, ["New York", "Atlantis"]) == [(VOCAB["New"], VOCAB["York"]), None]


def test_an_answer_behind_a_sentinel_is_tokens_of_the_sentence() -> None:
    # Pieces that carry the space before a word: alone behind a sentinel, words would lose it.
    model = other_model("seq2seq")
    pieces = [
        "<unk>",
        "<extra_id_0>",
        *(f"\u2581{word}" for word in ["Ada", "was", "born", "in", "London"]),
        ".",
        "London",
    ]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("<extra_id_0>", lstrip=True, rstrip=True)])
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    probe = Probe("", "Ada was born in ", " .", "London")
    asker = Asker(model)
    assert asker.prompts([probe]) == [Prompt((0, 1), source=(2, 3, 4, 5, 1, 7))]
    assert asker.answers(probe, ["London"]) == [(6,)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "lama/TREx/P19.jsonl").unlink(),
            r"P19 of LAMA must be in .*P19.jsonl.*no such file: put",
        ),
        (lambda root: write(root / "lama/TREx/P19.jsonl", []), r"at least one fact, and .*P19.jsonl has none"),
        (
            lambda root: write(root / "lama/relations.jsonl", [{"relation": "P19", "template": "[X] was born ."}]),
            r"a template must hold \[X\] and \[Y\] once each, got '\[X\] was born \.' for P19 in .*: correct it",
        ),
        (lambda root: write(root / "lama/relations.jsonl", [{"relation": "P20"}]), "must have a template for P19"),
        (lambda root: (root / "lama/relations.jsonl").unlink(), "templates must be in .*no such file"),
        (
            lambda root: (root / "lama/TREx/P19.jsonl").write_text("{"),
            "P19.jsonl line 1 must be a JSON object, and cannot be read",
        ),
        (lambda root: write(root / "lama/TREx/P19.jsonl", [{"sub_label": "Ada"}]), "must have 'obj_label' as text"),
        (
            lambda root: write(root / "pararel/patterns/P19.jsonl", [{"pattern": "[X] is"}]),
            r"a template must hold .* got '\[X\] is'",
        ),
    ],
)
def test_bad_data_is_one_sentence(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        Knowledge(on="lama/trex", relations="P19").measure(fake("causal", TRUTH))


def test_data_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"LAMA's squad must be in files such as .*test\.jsonl, and there are none"):
        Knowledge(on="lama/squad").check()
    (folder / "lama/common_vocab_cased.txt").unlink()
    with pytest.raises(DataError, match=r"common vocabulary must be in .*no such file"):
        Knowledge(on="lama/trex", candidates="common").measure(fake("masked", TRUTH))
    monkeypatch.setenv("MARIOTTE_DATA", str(folder / "nowhere"))
    with pytest.raises(DataError, match=r"LAMA must be in .*there is no such folder"):
        Knowledge(on="lama").check()
    monkeypatch.delenv("MARIOTTE_DATA")
    with pytest.raises(DataError, match="MARIOTTE_DATA is not set"):
        Knowledge(on="lama").check()


@pytest.mark.usefixtures("folder")
def test_models_that_cannot_be_asked() -> None:
    model = fake("masked", TRUTH)
    model.tokenizer = tokenizer_for("causal")
    with pytest.raises(DataError, match=r"fake-masked must have a mask token .* and has none"):
        Knowledge(on="lama/trex").measure(model)
    model.tokenizer = None
    with pytest.raises(DataError, match="has no tokenizer"):
        Knowledge(on="lama/trex").measure(model)


def test_fields_are_checked() -> None:
    for fields, message in (
        ({"on": "lama/wiki"}, "no set of facts 'lama/wiki'"),
        ({"on": "lama", "candidates": "all"}, "candidates must be one of relation, common, vocabulary, got 'all'"),
        ({"on": "lama", "paraphrases": -1}, "paraphrases must be at least 0"),
        ({"on": "lama", "per_token": True, "candidates": "common"}, "per_token is for answers of several tokens"),
        ({"on": "testbed", "seed": 1}, "seed is for LAMA"),
        ({"on": "testbed", "candidates": "relation"}, "candidates is for LAMA"),
    ):
        with pytest.raises(ChainError, match=message):
            Knowledge(**cast(Any, fields))
    with pytest.raises(UnknownNameError, match="'P9'"):
        Knowledge(on="lama/trex", relations="P19+P9")


def test_facts_for_people_and_as_a_file(tmp_path: Path) -> None:
    facts = Facts.between({"known": ["a", "b", "c"]}, {"lost": ["a"], "gained": ["d"]})
    assert facts == Facts(("b", "c"), ("a",), ("d",)) == Facts.between({"known": [*"abc"]}, {"known": [*"bcd"]})
    assert facts.text() == "2 facts kept, 1 lost, 1 gained\n  lost: a\n  gained: d"
    assert Facts((), tuple("abc"), ()).text(2).endswith("lost: b\n  lost: and 1 more")
    facts.write(tmp_path / "facts.csv")
    with (tmp_path / "facts.csv").open(encoding="utf-8") as file:
        assert [*csv.reader(file)] == [
            ["fact", "outcome"],
            ["a", "lost"],
            ["d", "gained"],
            ["b", "kept"],
            ["c", "kept"],
        ]
    facts.write(tmp_path / "facts.jsonl")
    lines = (tmp_path / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["lost", "gained", "kept", "kept"]
    with pytest.raises(DataError, match=r"ends in \.csv or \.jsonl, got .*facts\.txt: name it so"):
        facts.write(tmp_path / "facts.txt")
    with pytest.raises(DataError, match="cannot be written"):
        facts.write(tmp_path / "no/facts.csv")
    told = [
        Told(fact=name, relation="r", subject="s", template="t", wording="main", answer="a", rank=rank, probability=0.5)
        for name, rank in (("a", 1), ("b", 2))
    ]
    assert [row["outcome"] for row in rows_of(told)] == ["known", "unknown"]
    turned = [replace(told[0], rank=3), replace(told[1], rank=1)]
    assert [row["outcome"] for row in rows_between(told, turned)] == ["lost", "gained"]
    assert [row["outcome"] for row in rows_between(told, told)] == ["kept", "unknown"]
    with pytest.raises(
        DataError, match="must be the same, asked in the same words, got 2 of the one and 1 of the other"
    ):
        [*rows_between(told, told[:1])]
    with pytest.raises(DataError, match="told apart by details with known, got none"):
        Facts.between({}, {"known": []})


def test_real_files_on_a_real_model(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARIOTTE_DATA", str(shared / "data"))
    found = Knowledge(on="lama/trex", relations="P413+P1303", facts=4).measure(load(shared / "data/models/stories260K"))
    assert found.protocol["n_facts"] == 8
    assert 0 <= found.metrics["top1"] <= found.metrics["top5"] <= found.metrics["top10"] <= 1
