"""The claims of The Cost of Compression on records that obey them, that contradict them, and that cannot say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mariotte.experiments import run as running
from mariotte.experiments.study import parse
from mariotte.report.claim import Claim
from mariotte.report.claims.cost_of_compression import CostOfCompression, cuts
from mariotte.store import open_store
from mariotte.store.record import Record
from tests.report.report_records import record

MODELS = ("a", "b", "c")
SHARE = {"all": 1.0, "attention": 0.3, "ffn": 0.7}
"""Of the weights, by scope."""

Lost = Callable[[str, str, float], float]


def step(
    name: str, scope: str, amount: float, family: str = "unstructured", unit: str = "weights", *, rows: bool = False
) -> dict[str, Any]:
    facts = {"by": "row", "per": "layer"} if rows else {"per": "layer"}
    return {"name": name, "scope": scope, "amount": amount, "family": family, "unit": unit, "facts": facts}


def int8(scope: str = "all") -> dict[str, Any]:
    return step("int8-dynamic", scope, 8.0, "quantization", "bits")


def known(model: str, steps: tuple[dict[str, Any], ...], lost: float, *, zeroed: float = 0.0, seed: int = 0) -> Record:
    chain = " | ".join(f"{s['name']}@{s['amount']}:{s['scope']}" for s in steps)
    dense = 0.8
    made = record(model, chain, "knowledge:testbed", {"top1": dense * (1 - lost)}, {"top1": dense}, seed=seed)
    return dataclasses.replace(made, steps=steps, zeroed=zeroed, method=steps[0]["name"], amount=steps[0]["amount"])


def study(
    prune: Lost, quantize: Callable[[str, str], float], both: float, head: Callable[[str], float]
) -> list[Record]:
    found: list[Record] = []
    for model in MODELS:
        for scope, share in SHARE.items():
            for r in (0.1, 0.3, 0.5, 0.7, 0.9):
                cut = step("magnitude", scope, r)
                found.append(known(model, (cut,), prune(model, scope, r), zeroed=r * share))
            found.append(known(model, (int8(scope),), quantize(model, scope)))
        for r in (0.1, 0.3):
            steps = (step("magnitude", "all", r), int8())
            found.append(known(model, steps, prune(model, "all", r) + quantize(model, "all") + both))
        for unit in ("weights", "rows"):
            by_size = "magnitude-structured" if unit == "rows" else "magnitude"
            for name in ("random", by_size):
                cut = (step(name, "head", 0.5, rows=unit == "rows"),)
                chance = 0.1 * (name == "random")
                made = known(model, cut, head(unit) + chance)
                found.append(dataclasses.replace(made, chain=f"{made.chain}({unit})", id=f"{made.id}{unit}"))
    return found


def as_published(model: str, scope: str, r: float) -> float:
    shift = {"a": 0.0, "b": 0.01, "c": 0.02}[model]
    # More than its share of the weights comes to in the feed-forward layers, and less in attention.
    return {"all": 1.0, "ffn": 0.8, "attention": 0.02}[scope] * (r**3 + shift * r)


def claims(records: list[Record]) -> dict[str, Claim]:
    names = ("together", "half", "pruned", "quantized", "facts", "adds", "head")
    return dict(zip(names, CostOfCompression().claims(records), strict=True))


def test_what_obeys_the_paper_holds() -> None:
    quantized = {"all": 0.05, "ffn": 0.04, "attention": 0.01}
    head = {"weights": 0.1, "rows": 0.4}
    found = claims(study(as_published, lambda m, s: quantized[s], 0.0, head.__getitem__))
    assert {name: claim.verdict for name, claim in found.items()} == dict.fromkeys(found, "holds")
    assert "most in 100%" in found["together"].statistic
    # 0.7³ - 2 · 0.5³ + 0.3³ = 0.12, and what is linear cancels.
    assert "costs +12.0 points (+12.0 to +12.0)" in found["half"].statistic
    assert "+3.0 points" in found["quantized"].statistic
    assert (
        "rows cost +30.0 points (+30.0 to +30.0) more; at random, rows cost 50.0% of the facts and weights 20.0%; "
        "by size, rows cost 40.0% of the facts and weights 10.0%" in found["head"].statistic
    )
    assert "15 comparisons on 3 models" in found["together"].statistic


def test_what_contradicts_the_paper_does_not_hold() -> None:
    def other(model: str, scope: str, r: float) -> float:
        return {"all": 0.5, "ffn": 0.2, "attention": 0.9}[scope] * r**0.3

    found = claims(
        study(
            other,
            lambda m, s: {"all": 0.0, "ffn": 0.0, "attention": 0.1}[s],
            0.2,
            lambda unit: 0.3 if unit == "weights" else 0.1,
        )
    )
    assert {name: claim.verdict for name, claim in found.items()} == dict.fromkeys(found, "does not hold")
    assert "+20.0 points (+20.0 to +20.0) more than the sum" in found["adds"].statistic


def test_models_that_differ_settle_nothing() -> None:
    found = claims(
        study(lambda m, s, r: r * (0.5 if (s == "ffn") == (m == "a") else 0.4), lambda m, s: 0.0, 0.0, lambda unit: 0.1)
    )
    assert found["pruned"].verdict == "not settled"


def test_records_that_say_nothing_are_not_testable() -> None:
    for records in ([], [known("a", (step("magnitude", "all", 0.5),), 0.5)]):
        for claim in CostOfCompression().claims(records):
            assert claim.verdict == "not testable here"
            assert "on two models" in claim.statistic


def test_rows_are_compared_with_weights_that_were_chosen_alike() -> None:
    """Rows by size cost little and weights at random much: neither says anything of the other."""
    records = [
        known(model, (step(name, "head", 0.5, rows=rows),), lost)
        for model in MODELS
        for name, rows, lost in (("random", False, 0.6), ("magnitude-structured", True, 0.1))
    ]
    assert claims(records)["head"].verdict == "not testable here"


def test_real_records_say_what_took_rows_and_what_quantizes(tmp_path: Path) -> None:
    head = ("magnitude@0.5:head", "magnitude-structured@0.5:head", "random@0.5:head", "random@0.5:head(rows=true)")
    chains = (*head, "rtn@4:ffn", "magnitude@0.2 | int8-dynamic(scheme=torch)")
    study = parse(f"""
format = 1
name = "head"
models = ["testbed/qwen2-46k"]
measures = ["knowledge:testbed(facts=64)"]
chains = {json.dumps(chains)}
""")
    with open_store(tmp_path / "s.db", create=True) as store:
        assert running.run(study, store).failures == []
        records = {record.chain: record for record in store.records() if record.steps}
    found = {chain: cuts([record]) for chain, record in records.items()}
    assert {chain for chain, (cut,) in found.items() if cut.rows} == {head[1], head[3]}
    assert {chain: cut.quantized for chain, (cut,) in found.items() if any(cut.quantized)} == {
        "rtn@4:ffn": (True,),
        "magnitude@0.2 | int8-dynamic(scheme=torch)": (False, True),
    }
    assert {cut.scope for chain in head for cut in found[chain]} == {"head"}


def test_seeds_are_averaged_and_what_the_dense_model_does_not_know_cannot_be_lost() -> None:
    one, two = (known("a", (step("magnitude", "all", 0.5),), lost, seed=seed) for seed, lost in enumerate((0.2, 0.4)))
    (cut,) = cuts([one, two])
    assert cut.lost == pytest.approx(0.3)
    assert cuts([dataclasses.replace(one, base={"top1": 0.04})]) == []
    assert cuts([dataclasses.replace(one, recovery="lora")]) == []


def test_two_measures_of_a_model_are_one_cluster() -> None:
    records = study(as_published, lambda m, s: 0.1, 0.0, lambda unit: 0.1)
    again = [dataclasses.replace(r, measure="knowledge:lama", id=f"x{r.id[1:]}") for r in records]
    assert "30 comparisons on 3 models" in claims(records + again)["together"].statistic
