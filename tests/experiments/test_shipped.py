"""The records that lie beside the studies are whole, and what the code of today measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mariotte.experiments import run as running
from mariotte.experiments.identity import resolve
from mariotte.experiments.study import Chains, read
from mariotte.experiments.tree import grow
from mariotte.store import open_store
from mariotte.store.tables import read_table

STUDIES = Path(__file__).parents[2] / "studies" / "testbed"
NAMES = [path.stem for path in sorted(STUDIES.glob("*.parquet"))]


@pytest.fixture(scope="module", params=NAMES)
def shipped(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, read_table(STUDIES / f"{request.param}.parquet")


def test_every_study_of_the_testbed_ships_its_records() -> None:
    assert [path.stem for path in sorted(STUDIES.glob("*.toml"))] == NAMES
    assert sum(path.stat().st_size for path in STUDIES.glob("*.parquet")) < 1_000_000


def test_nothing_is_missing_of_a_study(shipped: tuple[str, Any]) -> None:
    name, table = shipped
    study = read(STUDIES / f"{name}.toml")
    assert set(table["study"]) == {study.name}
    for measured in study.measured():
        models = measured.models or study.models
        # As records write chains: without what a step does anyway, such as ":all".
        nodes = [(m, node) for m in models for node in grow(map(resolve, study.expanded(m))).walk() if node.wanted]
        wanted = {(m, str(n.chain)) for m, n in nodes if measured.of == "all" or not any(p.recovers for p in n.parts)}
        rows = table[table["measure"].str.startswith(measured.measure.partition("(")[0]) & table["model"].isin(models)]
        assert set(zip(rows["model"], rows["chain"], strict=True)) == wanted


CUTS = ["magnitude@0.5:ffn", "rtn@3", "int8-dynamic(scheme=torch)", "random@0.5:head(rows=true)"]


@pytest.mark.parametrize(
    ("name", "model", "measure", "metric", "chains"),
    [
        (
            "compression-laws",
            "qwen2-46k",
            "loss:testbed/news(rows=160)",
            "loss",
            ["prunenet-random@0.5", "prunenet-random@0.5 | lora@4k(corpus=testbed/news)"],
        ),
        (
            "pruning-laws",
            "qwen2-46k",
            "loss:testbed/news(rows=160)",
            "loss",
            ["ffn@0.5", "slice@0.3", "slicegpt@0.3", "wanda@0.5", "sparsegpt@0.5", "shortgpt@0.5"],
        ),
        ("cost-of-compression", "bert-181k", "loss:testbed/sentences(objective=pseudo)", "loss", CUTS),
        ("cost-of-compression", "t5-265k", "knowledge:testbed(facts=640)", "mrr", CUTS),
    ],
)
def test_shipped_records_are_measured_again(
    name: str, model: str, measure: str, metric: str, chains: list[str], tmp_path: Path
) -> None:
    study = read(STUDIES / f"{name}.toml")
    part = study.model_copy(
        update={
            "models": [f"testbed/{model}"],
            "chains": [Chains(chain=chain) for chain in chains],
            "measures": [measure],
            "run": study.run.model_copy(update={"workers": 1}),
        }
    )
    with open_store(tmp_path / "again.db", create=True) as store:
        assert running.run(part, store).failures == []
        again = {record.id: record.metrics[metric] for record in store.records()}
    table = read_table(STUDIES / f"{name}.parquet")
    rows = table[(table["metric"] == metric) & table["id"].isin(list(again))]
    found = dict(zip(rows["id"], rows["value"], strict=True))
    assert found == pytest.approx(again, rel=1e-3)  # the ids too: nothing that defines an experiment has changed
    assert len(found) == len(chains) + 1
