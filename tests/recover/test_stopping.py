"""A recovery that chooses its amount: where it stops, what it says, and that it is the recovery at that amount."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mariotte.chain import parse_link
from mariotte.data import corpora
from mariotte.errors import ChainError, DataError
from mariotte.experiments import run as running
from mariotte.experiments.identity import resolve_link, step_identity
from mariotte.experiments.study import parse
from mariotte.gains import STOPPING, Stopping
from mariotte.laws.recovery import Curve, learn_tail
from mariotte.models.model import Model
from mariotte.models.step import Prepared, prepare_once
from mariotte.recover import stopping, stream, trunk
from mariotte.recover.methods.lora import LoRA
from mariotte.recover.stopping import expected_gain, first_amount
from mariotte.recover.trunk import Recovery
from mariotte.store import open_store
from mariotte.testing.recoveries import (
    BLOCK,
    StoppedError,
    context_of,
    counting_corpus,
    each_recovery,
    recovered,
    stop_after,
)
from mariotte.testing.tiny import weights_hash

ALL = each_recovery(batch=2)
STEP = ALL[0]
NAMES = [step.name() for step in ALL]
MUCH, LITTLE, MOST = 0.9, 1e-12, 1_000_000
DOUBLINGS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "recovery_doublings.csv"


def chosen(step: Recovery, model: Model, scratch: Path, corpus: str, most: int = MOST) -> Model:
    return recovered(step, model, context_of(model, scratch, corpus), [most])[most]


# -- what may be written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["gain=1%", "gain=0.01", "gain=1.0%", "gain=1e-2"])
def test_a_gain_is_a_percentage_or_a_fraction(written: str) -> None:
    part = resolve_link(parse_link(f"lora@auto({written})"))
    assert (part.step, part.amount) == (LoRA(gain=0.01), stopping.MOST)
    assert str(part.link) == "lora@auto(gain=0.01)"
    assert resolve_link(part.link) == part


def test_the_gain_and_the_cap_are_part_of_the_identity_and_only_where_they_are_given() -> None:
    part = resolve_link(parse_link("full@auto(gain=0.7%, most=64k)"))
    fields = step_identity(part.step, {})["fields"]
    assert (fields["gain"], fields["most"], part.amount) == (0.007, 64_000, 64_000)
    assert not {"gain", "most"} & set(step_identity(LoRA(), {})["fields"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("@auto", r"@auto needs the gain under which it stops, got none: write \w+@auto\(gain=1%\)"),
        ("@4k(gain=1%)", r"with a gain chooses its amount, got 4k: write \w+@auto"),
        ("(gain=1%)", "with a gain chooses its amount, got none"),
        ("@auto(gain=0)", r"gain must be a share of the loss in \(0, 1\), such as 1%, got 0"),
        ("@auto(gain=100%)", r"gain must be a share of the loss in \(0, 1\), such as 1%, got 1"),
        ("@auto(gain=-1%)", "gain must be a share .* got -0.01"),
        ("@auto(gain=little)", "field 'gain' must be float, got 'little'"),
        ("@auto(most=4k)", "most goes with a gain, got none"),
        ("@auto(gain=1%, most=0)", "most must be at least 1 token, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(name: str, written: str, said: str) -> None:
    with pytest.raises(ChainError, match=f"^{name}.*{said}") as raised:
        resolve_link(parse_link(name + written))
    assert "\n" not in str(raised.value)


# -- what is expected -------------------------------------------------------------------------------------------------


def test_the_gain_expected_on_an_exact_power_law_is_that_of_the_law() -> None:
    law = Stopping(exponent=0.4, spread=0.5, level=0.5)

    def loss(tokens: float) -> float:
        return 2.0 + 30.0 * tokens**-0.4

    tokens = np.array([0.0, 4e3, 8e3, 1.6e4])
    loss_M = np.array([9.0, *map(loss, tokens[1:])])  # what the cut alone did is no part of the tail
    for asked in (3.2e4, 2e4):
        expected = (loss(1.6e4) - loss(asked)) / loss(1.6e4)
        assert law.gain(tokens, loss_M, asked) == pytest.approx(expected)
        assert law.possible(tokens, loss_M, asked) == pytest.approx(expected)  # the median at even chances
    unlikely = replace(law, level=0.841345).possible(tokens, loss_M, 3.2e4)  # one standard deviation
    assert unlikely == pytest.approx(np.exp(0.5) * law.gain(tokens, loss_M, 3.2e4), rel=1e-4)


def test_each_doubling_is_expected_to_bring_less_than_the_last_and_may_bring_more() -> None:
    found = expected_gain({0: 3.0, 4_000: 2.02, 8_000: 2.0})
    assert found is not None
    expected, possible = found
    assert 0 < expected < 0.01 < possible < 0.02


def test_nothing_is_decided_from_one_amount_and_a_loss_that_stays_promises_nothing() -> None:
    assert expected_gain({0: 2.0, 4_000: 1.0}) is None
    assert expected_gain({0: 2.0, 4_000: 2.0, 8_000: 2.0}) == pytest.approx((0.0, 0.0), abs=1e-12)
    rising = expected_gain({0: 2.0, 4_000: 2.1, 8_000: 2.2})
    assert rising is not None
    assert rising[0] < 0
    assert rising[1] < 0


def test_the_law_is_that_of_the_shipped_doublings() -> None:
    curves: dict[tuple[str, str], dict[float, float]] = {}
    with DOUBLINGS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["model"], row["cut"]), {})[float(row["tokens"])] = float(row["held_loss"])
    tail = learn_tail(
        [
            Curve(f"{model} {cut}", model, np.array(list(losses)), np.array(list(losses.values())))
            for (model, cut), losses in curves.items()
        ]
    )
    assert (STOPPING.exponent, STOPPING.spread) == pytest.approx((tail.exponent, tail.spread), abs=5e-3)


def test_the_first_amount_holds_fifteen_batches() -> None:
    assert first_amount(4, 64) == 4_000
    assert (first_amount(4, 512), first_amount(4, 2_048), first_amount(1, 16)) == (32_000, 128_000, 1_000)


# -- where it stops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ALL, ids=NAMES)
def test_it_stops_early_where_little_is_gained_and_is_the_recovery_at_what_it_reached(
    step: Recovery, model: Model, tmp_path: Path, corpus: str
) -> None:
    result = chosen(replace(step, gain=MUCH), model, tmp_path / "auto", corpus)
    (done,) = result.done
    assert done.facts["stopped"] == "gain"
    assert list(done.facts["held_loss"]) == ["0", "1000", "2000"]
    assert done.facts["expected_gain"]["4000"] <= done.facts["possible_gain"]["4000"] < MUCH
    assert done.amount in (1_000, 2_000)
    assert done.tokens == done.amount // BLOCK * BLOCK
    assert done.step == str(replace(step, gain=MUCH).link(MOST))
    assert done.step.startswith(f"{step.name()}@auto(")
    assert done.facts["chain"] == str(step.link(done.amount))
    plain = recovered(step, model, context_of(model, tmp_path / "plain", corpus), [int(done.amount)])[int(done.amount)]
    assert weights_hash(result) == weights_hash(plain)


def test_it_goes_on_where_much_is_gained_to_the_end_of_the_text(model: Model, tmp_path: Path, corpus: str) -> None:
    (done,) = chosen(replace(STEP, gain=LITTLE), model, tmp_path / "auto", corpus).done
    *_, before, last = map(int, done.facts["held_loss"])
    assert (done.facts["stopped"], before, done.amount) == ("text", 4_000, last)
    assert 4_000 < last < 8_000
    whole = STEP._stream(model, context_of(model, tmp_path / "s", corpus), 1_000).tokens_NT
    assert last == len(whole) * BLOCK
    assert done.facts["held_loss"][str(last)] < done.facts["held_loss"]["0"] - 0.5
    assert all(found >= LITTLE for found in done.facts["possible_gain"].values())


@pytest.mark.parametrize(("most", "reached"), [(4_000, 4_000), (3_000, 3_000), (500, 500)])
def test_it_ends_at_the_cap(most: int, reached: int, model: Model, tmp_path: Path, corpus: str) -> None:
    step = replace(STEP, gain=LITTLE, most=most)
    (done,) = chosen(step, model, tmp_path / "auto", corpus, most).done
    assert (done.facts["stopped"], done.amount) == ("most", reached)
    plain = recovered(STEP, model, context_of(model, tmp_path / "plain", corpus), [reached])[reached]
    assert done.facts["valid_after"] == plain.done[-1].facts["valid_after"]


def test_text_that_may_repeat_does_not_end_it(model: Model, tmp_path: Path, corpus: str) -> None:
    step = replace(STEP, gain=LITTLE, most=6_000, repeats=True)
    (done,) = chosen(step, model, tmp_path / "auto", corpus, 6_000).done
    assert (done.facts["stopped"], list(done.facts["held_loss"])[-1]) == ("most", "6000")


def test_of_what_was_tried_the_lowest_loss_is_taken(model: Model, tmp_path: Path, corpus: str) -> None:
    good = chosen(replace(STEP, gain=LITTLE), model, tmp_path / "good", corpus)
    harmful = replace(STEP, lr=0.3, gain=MUCH)
    (done,) = chosen(harmful, good, tmp_path / "harmed", corpus).done[1:]
    loss = {int(amount): value for amount, value in done.facts["held_loss"].items()}
    assert done.facts["stopped"] == "gain"
    assert loss.pop(0) < min(loss.values())
    assert done.amount == min(loss, key=loss.__getitem__)
    assert "recovery raised the held-out loss" in done.facts["warning"]


def test_only_the_validation_split_decides(
    model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    documents = corpora.File.documents

    def watched(self: corpora.File, split: corpora.Split) -> Iterator[str]:
        read.add(split)
        return documents(self, split)

    monkeypatch.setattr(corpora.File, "documents", watched)
    stream._rows.cache_clear()  # other tests read the same text
    chosen(replace(STEP, gain=MUCH), model, tmp_path / "auto", corpus)
    assert read == {"train", "valid"}


def test_without_a_validation_split_it_is_refused(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    text = Path(counting_corpus(tmp_path).removeprefix("file:")).read_text(encoding="utf-8")
    (folder / "train.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="lora@auto needs a validation split to decide by"):
        chosen(replace(STEP, gain=MUCH), model, tmp_path / "auto", f"file:{folder}")


def test_a_record_says_the_tokens_that_were_reached(tmp_path: Path) -> None:
    text = """
format = 1
name = "stopping"
title = "t"
description = "d"
models = ["testbed/qwen2-46k"]
measures = ["loss:testbed/all(rows=8)"]
[run]
threads = 1
[[chains]]
chain = "magnitude@0.3 | {recovery}(corpus=testbed/all)"
recovery = ["lora@4k"]
[[chains]]
chain = "magnitude@0.3 | lora@auto(corpus=testbed/all, gain=50%)"
"""
    with open_store(tmp_path / "s.db", create=True) as store:
        assert not running.run(parse(text), store).failures
        records = {record.recovery_tokens: record for record in store.records() if record.recovery}
    auto = next(record for record in records.values() if "auto" in record.chain)
    assert auto.chain == "magnitude@0.3 | lora@auto(corpus=testbed/all, gain=0.5)"
    assert auto.recovery_tokens == auto.steps[-1]["amount"] == 8_000
    assert auto.tokens_seen == 8_000
    assert records[4_000].tokens_seen == 3_968


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"trunk": False}], ids=["trunk", "alone"])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    options: dict[str, bool], model: Model, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "_SAVE_SECONDS", 0.0)
    step = replace(STEP, gain=LITTLE, most=4_000, **options)
    whole = chosen(step, model, tmp_path / "whole", corpus, 4_000)
    context = context_of(model, tmp_path / "scratch", corpus)
    for stops in (5, 20, 12, 1, 30, 25):
        with pytest.raises(StoppedError):
            recovered(step, model, replace(context, progress=stop_after(stops)), [4_000])
    resumed = recovered(step, model, context, [4_000])[4_000]
    assert weights_hash(resumed) == weights_hash(whole)
    assert resumed.done == whole.done


def test_asked_again_it_trains_no_trunk_and_says_the_same(model: Model, tmp_path: Path, corpus: str) -> None:
    step = replace(STEP, gain=LITTLE, most=4_000)
    whole = chosen(step, model, tmp_path / "auto", corpus, 4_000)
    context = context_of(model, tmp_path / "auto", corpus)
    again = recovered(step, model, context, [4_000])[4_000]
    assert (weights_hash(again), again.done) == (weights_hash(whole), whole.done)
    assert (context.counters.trunks, context.counters.trunk_tokens) == (0, 0)
    sooner = replace(step, gain=MUCH)
    assert list(chosen(sooner, model, tmp_path / "auto", corpus, 4_000).done[-1].facts["held_loss"])[-1] == "2000"


def test_the_preparation_alone_goes_no_further_than_the_first_amount(model: Model, tmp_path: Path, corpus: str) -> None:
    step = replace(STEP, gain=LITTLE)
    context = context_of(model, tmp_path / "auto", corpus)
    prepare_once(step, model, context, [MOST])
    assert 0 < context.counters.trunk_tokens <= 900
    found = Prepared.open(context.scratch)
    assert found is not None
    assert step.covers(found, [MOST])


def test_the_shape_of_the_law_is_among_what_it_reads(model: Model, tmp_path: Path, corpus: str) -> None:
    context = context_of(model, tmp_path / "auto", corpus)
    plain, auto = STEP.reads(model, context), replace(STEP, gain=0.01).reads(model, context)
    assert set(auto) - set(plain) == {"law", "held_out"}
    assert str(STOPPING.exponent) in auto["law"]
