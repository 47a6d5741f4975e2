"""The shipped models are what their records say, and the records meet the testbed's targets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

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


def test_every_record_names_its_weights_its_recipe_and_its_cost() -> None:
    for name in LADDER:
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
