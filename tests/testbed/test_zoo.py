"""The shipped models are what their records say, and the records meet the testbed's targets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mariotte.errors import ModelError, UnknownNameError
from mariotte.testbed import zoo
from mariotte.testbed.world import World

LADDER = {
    "qwen2-46k": 45_856,
    "qwen2-113k": 112_704,
    "llama-146k": 146_256,
    "qwen2-345k": 345_488,
    "llama-483k": 483_440,
    "qwen2-1m": 1_008_256,
    "llama-1m": 1_438_592,
    "qwen2-2m": 2_268_480,
}
CLOZE = {"bert-181k": 180_625, "bert-459k": 459_153, "t5-265k": 264_512, "t5-784k": 784_320}
CLOZE_FAMILIES = ("bert", "t5")
SHIPPED_CLOZE = [name for name in CLOZE if (zoo.WEIGHTS / name).is_dir()]
FAMILIES = {family: [name for name in LADDER if name.startswith(family)] for family in ("qwen2", "llama")}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module", params=LADDER)
def shipped(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    model = AutoModelForCausalLM.from_pretrained(zoo.path(request.param), dtype=torch.float32)
    return request.param, model.eval()


def test_the_names_are_the_ladder() -> None:
    assert {name: zoo.specification(name).n_params for name in zoo.NAMES} == LADDER
    assert list(LADDER.values()) == sorted(LADDER.values())
    assert {name: zoo.specification(name).n_params for name in zoo.CLOZE_NAMES} == CLOZE
    assert zoo.shipped() == (*LADDER, *SHIPPED_CLOZE)
    assert zoo.specification("testbed/qwen2-1m") == zoo.specification("qwen2-1m")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'qwen2-1m'"):
        zoo.path("qwen2-1b")
    with pytest.raises(UnknownNameError, match="known: qwen2-46k, qwen2-113k"):
        zoo.path("t5")


def test_missing_weights_are_answered_with_the_command_that_makes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(ModelError, match="mariotte testbed train qwen2-1m"):
        zoo.training_record("qwen2-1m")
    assert zoo.shipped() == ()


def test_the_shapes_are_those_of_the_specification(shipped: tuple[str, PreTrainedModel]) -> None:
    name, model = shipped
    shape = zoo.specification(name)
    assert model.config.model_type == shape.family
    for field, value in shape.config().items():
        assert getattr(model.config, field) == value, field
    assert sum(p.numel() for p in model.parameters()) == shape.n_params
    assert model.get_input_embeddings().weight.shape == (656, shape.hidden)


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("reader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_text_is_encoded_one_token_a_word_with_bos_first(world: World, name: str, reader: type[AutoTokenizer]) -> None:
    tokenizer = reader.from_pretrained(zoo.path(name))
    for row in world.rows("all", "valid", 20):
        assert tuple(tokenizer(row.text)["input_ids"]) == row.ids
    assert all(tokenizer(word)["input_ids"] == [0, i] for i, word in enumerate(world.vocabulary) if i > 2)
    assert len(tokenizer) == 656
    assert (tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token) == ("<bos>", "<unk>", "<pad>")
    padded = tokenizer(["ada", "ada abel"], padding=True, padding_side="right")
    assert padded["attention_mask"] == [[1, 1, 0], [1, 1, 1]]


def test_tokens_are_decoded_into_words_with_spaces_between(world: World) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(zoo.path("qwen2-1m"))
    for row in world.rows("all", "valid", 20):
        assert tokenizer.decode(row.ids) == " ".join(row.words)
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == row.text
    assert tokenizer("ada flies")["input_ids"] == [0, world.vocabulary.index("ada"), tokenizer.unk_token_id]


def test_the_shipped_tokenizer_is_the_one_the_world_makes(tmp_path: Path) -> None:
    zoo.save_tokenizer(tmp_path)
    for name in LADDER:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (zoo.path(name) / file).read_text() == (tmp_path / file).read_text()


@pytest.mark.parametrize("family", CLOZE_FAMILIES)
def test_tokens_for_gaps_come_after_the_words_and_change_none(world: World, family: str, tmp_path: Path) -> None:
    zoo.save_tokenizer(tmp_path, family)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(range(656)) == world.vocabulary
    assert tuple(tokenizer.convert_ids_to_tokens(range(656, len(tokenizer)))) == zoo.EXTRA_TOKENS[family]
    assert all(len(tokenizer(token)["input_ids"]) == 2 for token in zoo.EXTRA_TOKENS[family])
    for row in world.rows("all", "valid", 5):
        assert tuple(tokenizer(row.text)["input_ids"]) == row.ids
    gap = {"bert": "<mask>", "t5": "<extra_id_0>"}[family]
    text = f"<bos> ada abel was born in {gap} ."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (tokenizer.mask_token, tokenizer.eos_token) == {"bert": ("<mask>", "<bos>"), "t5": (None, "</s>")}[family]


@pytest.mark.parametrize("name", SHIPPED_CLOZE)
def test_shipped_models_that_fill_gaps_are_their_specification_and_their_record(
    world: World, name: str, tmp_path: Path
) -> None:
    from mariotte.training.zoo import cloze, facts_known

    shape = zoo.specification(name)
    auto = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}[shape.family]
    model = auto.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
    assert model.config.model_type == shape.family
    for field, value in shape.config().items():
        assert getattr(model.config, field) == value, field
    assert sum(p.numel() for p in model.parameters()) == shape.n_params
    zoo.save_tokenizer(tmp_path, shape.family)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (zoo.path(name) / file).read_text() == (tmp_path / file).read_text()
    reader = AutoTokenizer.from_pretrained(zoo.path(name))
    for row in world.sentences("all", "valid", 20):
        assert tuple(reader(row.text)["input_ids"]) == row.ids
    record = zoo.training_record(name)
    again = cloze.loss_and_floor(model, world, world.sentences("all", "test", 100))
    assert again["loss"] - again["floor"] == pytest.approx(record["loss"] - record["floor"], abs=0.15)
    known = facts_known(model, world, world.facts()[::10])
    for label in ("seen", "heldout"):
        assert known[label] == pytest.approx(record["facts"][label], abs=0.1)


@pytest.mark.parametrize("family", CLOZE_FAMILIES)
def test_facts_rise_along_the_ladders_of_models_that_fill_gaps(family: str) -> None:
    names = [name for name in CLOZE if name.startswith(family)]
    here = [name for name in names if name in SHIPPED_CLOZE]
    if here != names:
        pytest.skip(f"the weights of {', '.join(set(names) - set(here))} are not in this installation")
    bottom, top = (zoo.training_record(name) for name in names)
    assert bottom["floor"] == top["floor"] < top["loss"] < bottom["loss"]
    for label in ("seen", "heldout"):
        assert top["facts"][label] > 0.95
        if family == "t5":  # both are at the ceiling: their losses tell them apart, and damage will
            assert bottom["facts"][label] > 0.999
        else:
            assert bottom["facts"][label] < top["facts"][label]


def test_every_record_names_its_weights_its_recipe_and_its_cost() -> None:
    for name in zoo.shipped():
        record = zoo.training_record(name)
        weights = zoo.path(name) / "model.safetensors"
        assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert weights.stat().st_size < 2.1 * record["n_params"] + 10_000  # bf16
        assert record["n_params"] == zoo.specification(name).n_params
        recipe = zoo.specification(name).recipe
        assert record["recipe"] == {field: getattr(recipe, field) for field in recipe.__dataclass_fields__}
        assert record["seconds"] > 0
        assert record["test_rows"] >= 400


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls_towards_the_floor_and_facts_rise_along_the_ladder(family: str) -> None:
    records = [zoo.training_record(name) for name in FAMILIES[family]]
    assert len({record["floor"] for record in records}) == 1
    losses = [record["loss"] for record in records]
    assert losses == sorted(losses, reverse=True)
    for label in ("seen", "heldout"):
        known = [record["facts"][label] for record in records]
        assert known == sorted(known)
        assert known[-1] > 0.95
        assert known[0] < known[-1] - 0.05
    top = records[-1]
    assert 0 < top["loss"] - top["floor"] < 0.05
    assert losses[0] - losses[-1] > 0.03


def test_all_weights_together_are_small() -> None:
    assert sum(file.stat().st_size for file in zoo.WEIGHTS.rglob("*.safetensors")) < 16 * 2**20


def test_a_record_can_be_measured_again(shipped: tuple[str, PreTrainedModel], world: World) -> None:
    from mariotte.training.zoo import facts_known, loss_and_floor

    name, model = shipped
    record = zoo.training_record(name)
    loss, floor = loss_and_floor(model, world.rows("all", "test", 100))
    # The excess over the floor is paired, so 100 rows tell it far better than the loss itself.
    assert loss - floor == pytest.approx(record["loss"] - record["floor"], abs=0.03)
    known = facts_known(model, world, world.facts()[::10])
    for label in ("seen", "heldout"):
        assert known[label] == pytest.approx(record["facts"][label], abs=0.1)
