"""A share of the parameters spread over what can be cut: enough is removed, the chain found is the result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mariotte import chain as chains
from mariotte.compress.methods.ffn import FFN
from mariotte.compress.methods.heads import Heads
from mariotte.compress.methods.shortgpt import ShortGPT
from mariotte.compress.methods.slice import Slice
from mariotte.data import corpora
from mariotte.errors import ChainError, DataError, MariotteError, ModelError
from mariotte.experiments import identity
from mariotte.experiments import run as running
from mariotte.experiments.auto import ROUNDED, Auto, Estimate, Trials, _Search, execute
from mariotte.experiments.bench import Bench
from mariotte.experiments.pipeline import compress_model
from mariotte.experiments.space import COARSEST, Space
from mariotte.experiments.study import parse
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, apply_at, prepare_once
from mariotte.store import open_store
from mariotte.testing.recoveries import counting_corpus, tiny_reader
from mariotte.testing.tiny import random_tokens, tiny, weights_hash

STEPS = (ShortGPT(), Heads(), FFN(), Slice())


def context(model: Model, scratch: Path, rows: int = 12) -> Context:
    return Context(dense=model, scratch=scratch, calibration=random_tokens(rows, 16))


def auto(model: Model, amount: float, scratch: Path, step: Auto = Auto(search=6), rows: int = 12) -> Model:  # noqa: B008
    own = context(model, scratch, rows)
    return apply_at(step, model, prepare_once(step, model, own, [amount]), amount, own)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_enough_is_removed_and_the_chain_found_gives_the_same_weights(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, layers=3, tied=tied)
    before = weights_hash(model)
    cut = auto(model, 0.3, tmp_path / "auto")
    assert weights_hash(model) == before
    assert cut.counts.n_params == cut.measured_params() <= 0.7005 * model.counts.n_params
    (done,) = cut.done
    assert (done.step, done.unit, done.family, done.amount) == ("auto@0.3(search=6)", "parameters", "mixed", 0.3)
    assert done.obtained == pytest.approx(1 - cut.counts.n_params / model.counts.n_params)
    assert json.loads(json.dumps(asdict(done)))["facts"] == done.facts
    chain = chains.parse(done.facts["chain"])
    assert [step["step"] for step in done.facts["steps"]] == [str(link) for link in chain.links]
    again = execute(chain, model, context(model, tmp_path), tmp_path / "again")
    assert weights_hash(again) == weights_hash(cut)
    assert weights_hash(auto(model, 0.3, tmp_path / "second")) == weights_hash(cut)


def test_amount_zero_changes_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    cut = auto(model, 0, tmp_path)
    assert weights_hash(cut) == weights_hash(model)
    assert cut.done[-1].facts["chain"] == "dense"


def test_no_method_alone_is_better_on_the_rows_that_score(tmp_path: Path) -> None:
    model = tiny("qwen2", layers=4)
    step = Auto(search=8)
    own = context(model, tmp_path)
    found = apply_at(step, model, prepare_once(step, model, own, [0.25]), 0.25, own).done[-1].facts
    dense, best = found["held_loss"]
    rows = json.loads((tmp_path / "trials" / "losses.json").read_text(encoding="utf-8"))
    losses = {text: sum(losses_N) / len(losses_N) for text, losses_N in rows.items()}
    assert losses["dense"] == pytest.approx(dense)
    assert losses[found["chain"]] == pytest.approx(best)
    space = Space(model, STEPS)
    wanted = 0.2495 * model.counts.n_params
    alone = [state for i in range(len(STEPS)) if (state := space.alone(i, wanted))]
    tried = [losses[text] for state in alone if (text := str(space.chain(state))) in losses]
    assert tried
    assert best <= min(tried) + 1e-12
    assert found["trials"] <= 8


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([1.0, 1.2, 1.4, 1.1], "ffn@0.3"),  # worse by 0.025, give or take 0.048
        ([1.1, 1.2, 1.4, 1.1], "ffn@0.2 | slice@0.1"),  # by 0.05, give or take 0.029
        ([1.1, 1.1, 1.3, 1.0], "ffn@0.3"),  # the best itself
        ([math.inf, 1.0, 1.0, 1.0], "ffn@0.2 | slice@0.1"),
    ],
)
def test_of_chains_that_score_alike_the_shorter_one_is_taken(rows: list[float], chosen: str, tmp_path: Path) -> None:
    model = tiny("llama")
    longer, shorter = chains.parse("ffn@0.2 | slice@0.1"), chains.parse("ffn@0.3")
    trials = Trials(model, context(model, tmp_path), random_tokens(4, 8), tmp_path / "trials")
    trials.losses = {str(longer): [1.1, 1.1, 1.3, 1.1], str(shorter): rows}
    space = Space(model, STEPS)
    search = _Search(space, trials, 0.0, Estimate(space.whole, ()), 8)
    search.found = [(chain, space.whole, trials.loss(chain)) for chain in (longer, shorter)]
    assert str(search.chosen()[0]) == chosen


def test_rows_that_score_are_not_looked_at(tmp_path: Path) -> None:
    model, step = tiny("llama"), Auto(held=0.25, rows=8)
    trials = step._trials(model, context(model, tmp_path))
    seen = trials.context.calibration
    assert seen is not None
    assert (len(seen), len(trials.held_NT)) == (6, 2)
    assert not {tuple(row) for row in seen.tolist()} & {tuple(row) for row in trials.held_NT.tolist()}
    chain = chains.parse("ffn@0.5")
    cut = execute(chain, model, replace(context(model, tmp_path), calibration=seen), tmp_path / "by hand")
    assert trials.loss(chain) == pytest.approx(float(token_nll(cut, trials.held_NT).mean()), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_states_are_all_that_remove_enough_and_no_more_than_needed(family: str) -> None:
    model = tiny(family, layers=3, tied=True)
    space = Space(model, STEPS)
    wanted = 0.3 * model.counts.n_params
    found = space.states(wanted)
    assert len(set(found)) == len(found) > 4
    for state in found:
        assert space.removed(state) >= wanted
        chain = space.chain(state)
        assert chains.parse(str(chain)) == chain
    # None keeps at least as much of everything as another: that one would remove what need not go.
    for one in found:
        assert not any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in found)


def test_a_state_is_what_its_chain_makes(tmp_path: Path) -> None:
    model = tiny("qwen2", layers=4, heads=8, kv_heads=4, head_dim=4, tied=True)
    space = Space(model, STEPS)
    for state in space.states(0.35 * model.counts.n_params)[::4]:
        cut = execute(space.chain(state), model, context(model, tmp_path), tmp_path)
        assert model.counts.n_params - cut.counts.n_params == space.removed(state)


def test_a_search_sees_that_slicing_unties(tmp_path: Path) -> None:
    model = tiny("qwen2", vocab=512, tied=True)  # three quarters of it are the vocabulary
    space = Space(model, STEPS)
    mild = (*space.whole[:3], 24)
    assert space.removed(mild) < 0
    cut = auto(model, 0.1, tmp_path)
    assert cut.counts.n_params <= 0.9005 * model.counts.n_params


def test_estimates_add_up_and_learn_from_trials() -> None:
    curves = (((4, 3, 2), (0.0, 0.5, 1.0)), ((10, 5), (0.0, 0.2)))
    estimate = Estimate((4, 10), curves)
    # 3 of 4: 0.5; 7.5 of 10: half of 0.2; 1 of 4: 0.5 a size beyond the last; everything: nothing.
    assert np.allclose(
        estimate.alone([(3, 10), (4, 7), (1, 10), (4, 10), (3, 5)]), [0.5, 0.12, 1.5, 0.0, 0.7], atol=2e-4
    )
    estimate.tried[(3, 5)] = 1.4
    near, far = estimate.added([(3, 5), (1, 10)])
    assert near == pytest.approx(1.4, rel=1e-3)
    assert far == pytest.approx(3.0, rel=1e-2)  # the first trial corrects all
    estimate.tried[(1, 10)] = 1.5
    near, far = estimate.added([(3, 5), (1, 10)])
    assert (near, far) == (pytest.approx(1.4, rel=2e-2), pytest.approx(1.5, rel=2e-2))
    estimate.tried[(2, 5)] = math.inf
    assert np.isfinite(estimate.added([(2, 5)])).all()


def test_what_it_is_asked_for_is_checked() -> None:
    for written, said in [
        ("auto", "auto needs an amount of parameters, got none: write auto@0.3"),
        ("auto@1", "the share of parameters to remove must be in [0, 1), got 1"),
        ("auto@0.3(over=ffn+magnitude)", "over must be some of shortgpt+heads+ffn+slice, got 'ffn+magnitude'"),
        ("auto@0.3(search=0)", "search must be at least 1 trial, got 0"),
        ("auto@0.3(held=1)", "held must be a share of the calibration rows in (0, 1), got 1"),
        ("auto@0.3(rows=1)", "rows must be at least 2"),
        ("auto@0.3(round_to=0)", "round_to must be a positive number, got 0"),
        ("auto@0.3(serch=3)", "auto has no field 'serch'; did you mean 'search'"),
        ("aut@0.3", "did you mean 'auto'"),
    ]:
        with pytest.raises(MariotteError) as caught:
            identity.resolve(chains.parse(written))
        assert said in str(caught.value)
    (part,) = identity.resolve(chains.parse("auto@0.30(over=slice+ffn, of=model)"))
    assert str(part.link) == "auto@0.3(over=ffn+slice)"


def test_a_correction_of_a_method_makes_another_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tiny("llama"), seed=0, calibration=None, work=tmp_path)
    chains_of = {text: identity.resolve(chains.parse(text)) for text in ("auto@0.3", "auto@0.3(over=heads+slice)")}
    before = {text: bench.experiment_id(parts) for text, parts in chains_of.items()}
    monkeypatch.setattr(FFN, "version", FFN.version + 1)
    after = {text: bench.experiment_id(parts) for text, parts in chains_of.items()}
    assert [after[text] == before[text] for text in chains_of] == [False, True]


def test_what_cannot_be_done_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(ChainError, match=r"auto can remove at most .* over ffn, got 90.0%: ask for less"):
        auto(model, 0.9, tmp_path / "a", Auto(over="ffn", search=2))
    with pytest.raises(DataError, match="auto needs at least 2 rows of calibration text"):
        auto(model, 0.3, tmp_path / "b", rows=1)
    without = replace(context(model, tmp_path / "c"), calibration=None)
    with pytest.raises(DataError, match="auto needs calibration text, got none"):
        prepare_once(Auto(), model, without, [0.3])


def test_with_one_dimension_it_is_that_method_rounded_up(tmp_path: Path) -> None:
    model = tiny("llama")
    cut = auto(model, 0.2, tmp_path, Auto(over="ffn", search=3))
    (link,) = chains.parse(cut.done[-1].facts["chain"]).links
    assert link.name == "ffn"
    assert cut.counts.n_params <= 0.8005 * model.counts.n_params


@pytest.mark.parametrize(("ffn", "expected"), [(48, 1), (240, 2), (960, None)])
def test_widths_of_small_models_are_rounded_less(ffn: int, expected: int | None) -> None:
    steps = {step.name(): step for step in Auto()._space(tiny("llama", ffn=ffn)).steps}
    assert steps["ffn"].link(0.5).fields.get("round_to") == expected
    assert Auto(round_to=4)._space(tiny("llama", ffn=ffn)).steps[2].link(0.5).fields["round_to"] == 4


def test_what_was_tried_serves_the_next_amount_and_an_interrupted_search(tmp_path: Path) -> None:
    model, step = tiny("llama", layers=3), Auto(search=4)
    own = context(model, tmp_path / "both")
    prepared = prepare_once(step, model, own, [0.2, 0.4])
    both = [apply_at(step, model, prepared, amount, own) for amount in (0.2, 0.4)]
    assert own.counters.preparations == 1
    alone = auto(model, 0.4, tmp_path / "alone", step)
    assert weights_hash(alone) == weights_hash(both[1])
    assert alone.done == both[1].done
    for file in (tmp_path / "both").glob("found-*.json"):
        file.unlink()
    assert apply_at(step, model, prepared, 0.4, own).done == both[1].done


def test_the_chain_found_is_the_result_wherever_it_stands(tmp_path: Path) -> None:
    """After another cut and at another seed, on the bits: what is stored can be carried out by hand."""
    dense = tiny_reader("llama", layers=3)
    given = {"calibration": counting_corpus(tmp_path), "rows": 8, "block": 16, "seed": 3}
    asked = compress_model(dense, "ffn@0.25 | auto@0.3(search=4)", **given)
    cut, found = asked.done
    by_hand = compress_model(dense, f"{cut.step} | {found.facts['chain']}", **given)
    assert weights_hash(by_hand) == weights_hash(asked)
    assert [done.step for done in by_hand.done[1:]] == [step["step"] for step in found.facts["steps"]]
    assert found.obtained >= 0.2995


def test_only_calibration_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = corpora.File.documents

    def documents(self: corpora.File, split: corpora.Split) -> Iterator[str]:
        read.append(split)
        return real(self, split)

    monkeypatch.setattr(corpora.File, "documents", documents)
    corpus = counting_corpus(tmp_path)
    compress_model(tiny_reader("qwen2"), "auto@0.3(search=3)", calibration=corpus, rows=8, block=16)
    assert set(read) == {"calibration"}


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", ["qwen2-46k", "llama-146k", "qwen2-1m"])
def test_a_share_is_met_within_a_hundredth_where_neurons_make_up_what_is_missing(name: str, amount: float) -> None:
    model = load(f"testbed/{name}")
    space = Auto()._space(model)
    states = space.states((amount - ROUNDED) * model.counts.n_params)
    over = [space.removed_share(s) - amount for s in states if s[space.finest] < space.whole[space.finest]]
    assert over
    assert min(over) >= -ROUNDED
    assert max(over) <= COARSEST
    assert all(space.removed_share(state) >= amount - ROUNDED for state in states)


def test_next_to_nothing_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = tiny("llama")
    cut = auto(model, 1e-4, tmp_path)
    assert cut.done[-1].facts["chain"] == "dense"
    assert cut.hf is not model.hf
    assert weights_hash(cut) == weights_hash(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.blocks[1].up.weight[1, 2] = value
    with pytest.raises(ModelError, match=r"auto needs finite weights, and .*up_proj"):
        auto(model, 0.3, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.final_norm.weight.fill_(3e38)  # finite, and its logits are not
        model.head.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"auto compares losses, and that of tiny-llama on the rows .* is not finite"):
        auto(model, 0.3, tmp_path)


def test_rows_of_one_token_say_nothing(tmp_path: Path) -> None:
    own = replace(context(model := tiny("llama"), tmp_path), calibration=random_tokens(12, 1))
    with pytest.raises(DataError, match="auto needs rows of at least 2 tokens of calibration text, got 1"):
        prepare_once(Auto(), model, own, [0.3])


TEXT = """
format = 1
name = "auto"
models = ["{model}"]
measures = ["loss:testbed/all(rows=4)"]
chains = ["auto@0.2(search=3)", "auto@0.4(search=3)", "auto@0.4(search=3) | lora@1280(batch=2)"]
[calibration]
corpus = "testbed/all"
rows = 8
"""


def test_in_a_study_it_is_prepared_once_and_its_records_store_the_chain(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with open_store(path, create=True) as store:
        summary = running.run(parse(TEXT.format(model=model_folder)), store)
        records = {record.chain: record for record in store.records()}
    assert not summary.failures
    assert summary.counters.preparations == 2  # auto, and the trunk of lora
    for chain in ("auto@0.2(search=3)", "auto@0.4(search=3)"):
        record = records[chain]
        assert (record.method, record.family, record.unit) == ("auto", "mixed", "parameters")
        assert record.ratio == pytest.approx(record.obtained)
        found = record.steps[0]["facts"]["chain"]
        dense = load(model_folder)
        cut = compress_model(dense, found, calibration="testbed/all", rows=8)
        assert cut.counts.n_params == record.n_params
        asked = compress_model(dense, chain, calibration="testbed/all", rows=8)
        assert weights_hash(asked) == weights_hash(cut)
    assert records["auto@0.4(search=3) | lora@1280(batch=2)"].recovery == "lora"


def test_the_commands_know_it(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mariotte.cli.main import app

    monkeypatch.setenv("COLUMNS", "300")
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    (own,) = (entry for entry in listed if entry["name"] == "auto")
    assert (own["unit"], own["family"], own["fields"]["search"]) == ("parameters", "mixed", 32)
    text = f"compress {model_folder} auto@0.3(search=2) --out {tmp_path / 'cut'} --rows 8 --calibration testbed/all"
    said = CliRunner().invoke(app, text.split())
    assert said.exit_code == 0, said.output
    assert "auto@0.3(search=2) found: " in said.output


@pytest.mark.slow
def test_a_real_model_keeps_its_quality(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    model = load(data / "models" / "stories260K")
    text = (data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    assert model.tokenizer is not None
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    own = Context(dense=model, scratch=tmp_path, calibration=rows[:128])
    step = Auto()
    cut = apply_at(step, model, prepare_once(step, model, own, [0.25]), 0.25, own)
    assert cut.counts.n_params <= 0.7505 * model.counts.n_params
    assert float(token_nll(cut, rows[-200:], batch=8).mean()) <= 2.62
