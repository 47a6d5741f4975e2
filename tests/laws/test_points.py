from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from mariotte.errors import FitError
from mariotte.laws.points import from_records, from_table, where
from mariotte.store.record import Record
from mariotte.store.tables import records_table

COLUMNS = ["source", "model", "params_b", "method", "ratio", "ratio_kind", "recovery_tokens", "metric", "base_value"]
COLUMNS += ["value", "stderr", "bits", "protocol", "note"]


def record(chain: str, *, method: str | None = "slice", **changes: Any) -> Record:
    values: Mapping[str, Any] = {
        "id": chain, "experiment": chain, "study": "s", "model": "testbed/m", "model_type": "qwen2", "model_hash": "h",
        "chain": chain, "seed": 0, "measure": "loss:testbed/all", "metrics": {"loss": 1.5, "bits_per_byte": 0.9},
        "base": {"loss": 1.2, "bits_per_byte": 0.8}, "protocol": {"block": 64}, "n_params": 70,
        "n_params_non_embedding": 60,
        "base_params": 100, "n_bytes": 140, "flops_per_token": 1.0, "method": method,
        "family": "slice", "unit": "hidden",
        "amount": 0.3, "obtained": 0.28, "ratio": 0.25, "zeroed": 0.05, "sparsity": 0.4,
    }  # fmt: skip
    return Record(**{**values, **changes})


def table(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def row(ratio: float, value: float | None, **changes: Any) -> tuple[Any, ...]:
    values: dict[str, Any] = {
        "source": "arXiv:1", "model": "M", "params_b": 1.3, "method": "Cut", "ratio": ratio, "ratio_kind": "parameters",
        "recovery_tokens": "0", "metric": "wikitext2_ppl",
        "base_value": 10.0, "value": value, "stderr": None, "bits": None,
        "protocol": "ctx 2048", "note": "",
    }  # fmt: skip
    values.update(changes)
    return tuple(values[c] for c in COLUMNS)


def test_a_record_becomes_a_point():
    (point,) = from_records([record("slice@0.3:ffn | lora@64k | int8", recovery="lora", recovery_tokens=64000)]).points
    assert (point.value, point.base, point.metric, point.kind) == (1.5, 1.2, "loss", "loss")
    assert point.ratio == pytest.approx(0.3)
    assert (point.method, point.recovery, point.tokens) == ("slice:ffn", "lora@64k | int8", 64000)
    assert point.protocol.startswith("loss:testbed/all#")
    assert (point.model, point.family, point.params) == ("testbed/m", "slice", 100)
    assert point.group == "testbed/m × slice:ffn"


@pytest.mark.parametrize(
    ("covariate", "ratio"), [("removed", 0.3), ("ratio", 0.25), ("amount", 0.3), ("obtained", 0.28), ("sparsity", 0.4)]
)
def test_covariates(covariate: str, ratio: float):
    (point,) = from_records([record("slice@0.3")], covariate=covariate).points
    assert point.ratio == pytest.approx(ratio)
    assert ("hidden" in point.ratio_kind) == (covariate in ("amount", "obtained"))


def test_amounts_share_a_series_and_nothing_else_does():
    records = [
        record("slice@0.1"), record("slice@0.5"), record("slice@0.5:ffn"), record("slice@0.5 | int8"),
        record("slice@0.5", model="other"), record("slice@0.5", protocol={"block": 128}),
    ]  # fmt: skip
    points = from_records(records).points
    assert points[0].series == points[1].series
    assert len({p.series for p in points}) == 5


def test_the_dense_model_is_the_base_not_a_point():
    reading = from_records([record("dense", method=None), record("slice@0.3")])
    assert len(reading.points) == 1
    assert reading.skipped == {"of the dense model": 1}


def test_an_exported_table_gives_the_points_of_its_store():
    records = [
        record("dense", method=None, family=None, unit=None, amount=None, obtained=None),
        record("slice@0.3:ffn | lora@64k", metrics={"loss": 1.5, "loss_se": 0.01}, recovery_tokens=64000),
        record("slice@0.5"),
    ]
    for covariate in ("removed", "amount"):
        from_store = from_records(records, covariate=covariate, metric="loss")
        from_export = from_table(records_table(records), covariate=covariate, metric="loss")
        assert set(from_export.points) == set(from_store.points)
        assert from_export.skipped == from_store.skipped
        assert sorted(p.se or 0.0 for p in from_store.points) == [0.0, 0.01]


def test_a_standard_error_is_no_metric():
    one = record("slice@0.3", metrics={"nll": 1.5, "nll_se": 0.01}, base={"nll": 1.2, "nll_se": 0.01})
    assert from_records([one]).metric == "nll"


def test_metrics_are_chosen_or_asked_for():
    assert from_records([record("slice@0.3")]).metric == "loss"
    assert from_records([record("slice@0.3")], metric="bits_per_byte").points[0].value == 0.9
    with pytest.raises(FitError, match="no metric named 'los'; did you mean 'loss'"):
        from_records([record("slice@0.3")], metric="los")
    both = [record("slice@0.3", metrics={"top1": 0.5, "mrr": 0.6}, base={"top1": 0.9, "mrr": 0.9})]
    with pytest.raises(FitError, match=r"there are 2 metrics \(mrr, top1\): choose one with --metric"):
        from_records(both)


def test_nothing_to_fit():
    with pytest.raises(FitError, match="the table or store is empty"):
        from_records([])
    with pytest.raises(FitError, match="the table or store is empty"):
        from_table(table())
    with pytest.raises(FitError, match=r"no compressed model with 'loss' to fit \(1 of the dense model\)"):
        from_records([record("dense", method=None)])
    with pytest.raises(FitError, match="no covariate named 'sparsty'; did you mean 'sparsity'"):
        from_records([record("slice@0.3")], covariate="sparsty")


def test_perplexities_enter_as_logarithms():
    (point,) = from_table(table(row(0.2, 12.0, stderr=0.6))).points
    assert point.value == pytest.approx(math.log(12.0))
    assert point.base == pytest.approx(math.log(10.0))
    assert point.se == pytest.approx(0.05)
    assert point.params == pytest.approx(1.3e9)


@pytest.mark.parametrize("metric", ["log_ppl", "ln_ppl", "wiki_log_perplexity", "LogPPL", "ln ppl", "ppl (ln)"])
def test_logarithms_of_perplexities_are_not_taken_again(metric: str):
    (point,) = from_table(table(row(0.2, 2.5, metric=metric, base_value=2.3))).points
    assert (point.value, point.base, point.kind) == (2.5, 2.3, "loss")


@pytest.mark.parametrize("metric", ["logiqa_ppl", "ppl", "wikitext2_ppl", "Perplexity", "blogs_ppl"])
def test_other_perplexities_are(metric: str):
    (point,) = from_table(table(row(0.2, 12.0, metric=metric))).points
    assert point.value == pytest.approx(math.log(12.0))


@pytest.mark.parametrize("empty", [None, "", math.nan])
def test_a_row_without_a_metric_is_left_out(empty: object):
    reading = from_table(table(row(0.2, 12.0), row(0.3, 13.0, metric=empty)))
    assert reading.metric == "wikitext2_ppl"
    assert reading.skipped == {"without the name of a metric": 1}


def test_a_model_that_was_only_recovered_is_not_the_dense_one():
    records = [
        record("dense", method=None, family=None, unit=None, amount=None, obtained=None),
        record("lora@4k", method=None, family=None, unit=None, amount=None, obtained=None, recovery_tokens=4000),
        record("slice@0.3"),
    ]
    expected = {"of the dense model": 1, "without compression, only recovered": 1}
    assert from_records(records).skipped == expected
    assert from_table(records_table(records), metric="loss").skipped == expected
    published = table(row(0.0, 10.0), row(0.0, 9.0, recovery_tokens="1e6"), row(0.2, 12.0))
    assert from_table(published).skipped == expected


def test_the_chance_of_a_score_is_in_its_protocol():
    metrics = {"top1": 0.5, "heldout_top1": 0.4, "mrr": 0.6}
    one = record("slice@0.3", metrics=metrics, base=metrics, protocol={"chance_top1": 0.25})
    for metric, chance in (("top1", 0.25), ("heldout_top1", 0.25), ("mrr", None)):
        assert from_records([one], metric=metric).points[0].chance == chance
        assert from_table(records_table([one]), metric=metric).points[0].chance == chance


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("protocol", "no JSON", "is not as 'mariotte export' wrote it"),
        ("protocol", "[]", "its protocol is no JSON object"),
        ("protocol", None, "is not as 'mariotte export' wrote it"),
        ("recovery_tokens", "many", "could not convert"),
        ("base_params", None, "is not as 'mariotte export' wrote it"),
        ("chain", "dense", "the chain of the dense model"),
    ],
)
def test_an_exported_table_that_was_changed_is_refused_in_a_sentence(column: str, value: object, said: str):
    changed = records_table([record("slice@0.3")]).astype(object)
    changed[column] = [value] * len(changed)
    with pytest.raises(FitError, match=said):
        from_table(changed, metric="loss")


def test_an_exported_table_keeps_its_columns():
    with pytest.raises(FitError, match=r"unit is missing.*marks an exported store"):
        from_table(records_table([record("slice@0.3")]).drop(columns="unit"))


def test_rows_that_no_law_describes_are_counted():
    reading = from_table(
        table(
            row(0.2, 12.0),
            row(0.3, 13.0, bits=4),
            row(0.3, 13.0, bits=16),
            row(0.0, 10.0),
            row(0.4, None),
            row(0.5, 20.0, base_value=None),
        )
    )
    assert [p.ratio for p in reading.points] == [0.2, 0.3]
    assert reading.skipped == {"quantised": 1, "of the dense model": 1, "no value": 1, "no dense value": 1}


def test_recovery_that_is_no_number_keeps_series_apart():
    points = from_table(
        table(row(0.2, 12.0), row(0.2, 11.0, recovery_tokens="LoRA 50k samples"), row(0.2, 11.0, recovery_tokens="1e6"))
    ).points
    assert [(p.recovery, p.tokens) for p in points] == [("", 0.0), ("LoRA 50k samples", 0.0), ("1e6", 1e6)]
    assert len({p.series for p in points}) == 3


def test_a_conversion_in_the_kind_of_ratio_is_no_kind():
    points = from_table(
        table(*(row(r, 12.0, ratio_kind=f"MLP neurons (= {65 * r}% of all parameters)") for r in (0.1, 0.2)))
    ).points
    assert {p.ratio_kind for p in points} == {"MLP neurons"}


def test_bad_tables_are_refused_in_a_sentence():
    with pytest.raises(FitError, match=r"a table needs the columns .*; base_value is missing: rename or add it"):
        from_table(table(row(0.2, 12.0)).drop(columns="base_value"))
    with pytest.raises(FitError, match="a perplexity must be above 0, got -1"):
        from_table(table(row(0.2, -1.0)))
    with pytest.raises(FitError, match=r"a ratio must lie in \(-1, 1\), got 20"):
        from_table(table(row(20, 12.0)))
    with pytest.raises(FitError, match="states its own ratio, got covariate 'sparsity'"):
        from_table(table(row(0.2, 12.0)), covariate="sparsity")


def test_where_keeps_equal_texts_else_beginnings():
    points = from_table(table(row(0.2, 12.0), row(0.3, 12.0, method="Cut deeper"))).points
    assert [p.ratio for p in where(points, {"method": "Cut"})] == [0.2]
    assert len(where(points, {"method": "C", "model": "M"})) == 2
    with pytest.raises(FitError, match="no point has method 'X': there is 'Cut', 'Cut deeper'"):
        where(points, {"method": "X"})
    with pytest.raises(FitError, match="no field of a point named 'methd'; did you mean 'method'"):
        where(points, {"methd": "X"})
