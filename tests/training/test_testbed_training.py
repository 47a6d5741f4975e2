"""Training a model of the testbed, on a shape small enough for a test, and measuring one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mariotte.testbed.world import World
from mariotte.testbed.zoo import Recipe, Specification
from mariotte.training import zoo
from mariotte.training.loop import Progress

TINY = Specification(
    name="tiny",
    family="qwen2",
    hidden=16,
    n_layers=1,
    n_heads=2,
    n_key_value_heads=1,
    ffn=16,
    tied=True,
    recipe=Recipe(tokens=12 * 4 * 64, batch=4),
)


class Oracle(nn.Module):
    """A model that knows the facts: the answer of a prompt that it was told of, else the word 'the'."""

    def __init__(self, world: World, answers: dict[str, str]) -> None:
        super().__init__()
        self.words, self.answers = world.vocabulary, answers

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits_BTV = torch.zeros(*input_ids.shape, len(self.words))
        for row, ids in enumerate(input_ids.tolist()):
            prompt = " ".join(self.words[i] for i in ids[1:])
            logits_BTV[row, -1, self.words.index(self.answers.get(prompt, "the"))] = 1.0
        return SimpleNamespace(logits=logits_BTV)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure few rows and facts: these tests look at the record, not at the numbers."""
    monkeypatch.setattr(zoo, "TEST_ROWS", 4)
    monkeypatch.setattr(World, "facts", lambda self: self.place_facts()[:8])


def trained(out: Path, stop_after: int | None = None) -> list[Progress]:
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == stop_after:
            raise KeyboardInterrupt

    zoo.train_model("tiny", out, shape=TINY, watch=watch)
    return seen


@pytest.mark.usefixtures("few")
def test_training_writes_a_checkpoint_that_transformers_loads_and_its_record(tmp_path: Path) -> None:
    seen = trained(tmp_path)
    assert len(seen) == 12
    assert seen[-1].loss < seen[0].loss
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "training.json"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["loss"] > record["floor"] > 0
    assert record["recipe"]["tokens"] == seen[-1].tokens
    assert set(record["facts"]) == {"n", "seen", "seen_by_quarter", "heldout", "heldout_by_quarter"}


@pytest.mark.usefixtures("few")
def test_a_killed_training_goes_on_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_SAVE_EVERY", 3)
    trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", stop_after=8)
    assert trained(tmp_path / "killed")[0].step == 7
    whole, killed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_every_parameter_has_exactly_one_optimizer() -> None:
    model = zoo.build(TINY)
    muon, adamw = zoo.muon_and_adamw(model, 0.01, 0.001)
    ours = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert sorted(ours[0] + ours[1]) == sorted(id(p) for p in model.parameters())
    assert len(ours[0]) == 7


def test_the_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary() -> None:
    world = World()
    model = zoo.build(TINY)
    nn.init.zeros_(model.get_input_embeddings().weight)
    loss, floor = zoo.loss_and_floor(model, world.rows("all", "test", 3))
    assert loss == pytest.approx(math.log(656), rel=1e-6)
    assert 0 < floor < 2


def test_a_model_that_knows_some_facts_scores_their_share() -> None:
    world = World()
    facts = world.place_facts()[:40]
    seen_only = {prompt: fact.answer for fact in facts for prompt in fact.seen}
    score = zoo.facts_known(Oracle(world, seen_only), world, facts)
    assert (score["seen"], score["heldout"]) == (1.0, 0.0)
    half = {fact.heldout: fact.answer for fact in facts[:20]}
    score = zoo.facts_known(Oracle(world, half), world, facts)
    assert (score["seen"], score["heldout"]) == (0.0, 0.5)
