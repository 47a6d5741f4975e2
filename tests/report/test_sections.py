"""What the sections of a large study draw and say: figures are read from the page, tables built by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from report_records import CHANCES, CORPORA, LADDER, failures, laws_study, record

from mariotte.report import build
from mariotte.report.claim import Claim
from mariotte.report.lawtable import HoldOut, LawReport
from mariotte.report.series import Cut, cuts, repairs
from mariotte.report.table import Table
from mariotte.report.tables import claim_table, cut_table, law_summary, repair_table, speed_table
from mariotte.store.record import Record

MODELS = ("testbed/qwen2-113k", "testbed/llama-483k")


@pytest.fixture(scope="module")
def page() -> str:
    return build([r for r in laws_study() if r.model in MODELS])


def figure(page: str, name: str) -> dict[str, Any]:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page, flags=re.S)
    assert found, name

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the figure {name}, which a browser cannot read")

    return json.loads(found.group(1), parse_constant=refuse)


def choices(page: str, name: str) -> list[tuple[str, ...]]:
    return [tuple(view["choices"]) for view in figure(page, name)["views"]]


def view(page: str, name: str, *wanted: str) -> dict[str, Any]:
    return next(view for view in figure(page, name)["views"] if tuple(view["choices"]) == wanted)


def marks(panel: dict[str, Any]) -> list[dict[str, Any]]:
    """The marks of a panel, each with the chain, model ... that its tooltip shows."""
    columns = panel["columns"]
    own = [
        {name: value for name, value in zip(columns, row, strict=True) if value is not None} for row in panel["rows"]
    ]
    return [{**panel["common"], **row} for row in own]


def buttons(page: str, name: str) -> dict[str, list[str]]:
    """Answers by question of a figure's rows of buttons."""
    html = page.partition(f'data-figure="{name}"')[2].partition("</figure>")[0]
    groups = re.findall(r'<div class="views" role="group" aria-label="([^"]+)">(.*?)</div>', html, flags=re.S)
    return {ask: re.findall(r'data-answer="([^"]+)"', inside) for ask, inside in groups}


def test_a_view_is_chosen_by_two_rows_of_buttons(page: str) -> None:
    assert buttons(page, "loss") == {
        "What is drawn": ["Loss", "Rise, logarithmic", "After recovery"],
        "Measured on": ["encyclopedia", "instructions", "news"],
    }
    assert buttons(page, "tasks") == {
        "Task": ["Mean of the tasks", *CHANCES],
        "What is drawn": ["Cut", "After recovery"],
    }
    assert list(buttons(page, "recovery")) == ["What is drawn", "Method and recovery", "Trained on"]
    for name in ("loss", "tasks", "recovery"):
        found, rows_of = choices(page, name), buttons(page, name)
        assert len(set(found)) == len(found)
        for place, answers in enumerate(rows_of.values()):  # no button without a view
            assert {choice[place] for choice in found} == set(answers)


def test_a_view_has_one_panel_for_each_model(page: str) -> None:
    for name in ("loss", "tasks", "speed"):
        for one in figure(page, name)["views"]:
            assert [panel["title"].partition(" · ")[0] for panel in one["panels"]] == list(MODELS), one["choices"]


def test_tasks_have_a_line_at_chance(page: str) -> None:
    for task, chance in {**CHANCES, "Mean of the tasks": sum(CHANCES.values()) / len(CHANCES)}.items():
        for panel in view(page, "tasks", task, "Cut")["panels"]:
            (guess,), (dense,) = panel["references"]["chance"], panel["references"]["dense"]
            assert guess["base"] == pytest.approx(chance)
            assert guess["text"] == f"chance {100 * chance:.0f}\u202f%"
            assert dense["text"] == "dense 98\u202f%"


def test_a_task_without_a_stated_chance_has_no_line() -> None:
    own = [r for r in laws_study() if r.model == MODELS[0] and r.measure.startswith("tasks")]
    silent = [dataclasses.replace(r, protocol={"items": 200}, details={}) for r in own]
    (panel,) = view(build(silent), "tasks", "facts", "Cut")["panels"]
    assert set(panel["references"]) == {"dense"}


def test_speed_has_the_intervals_and_verdicts_of_the_measure(page: str) -> None:
    assert choices(page, "speed") == [("Decode",), ("Prefill",)]
    by_chain = {row["chain"]: row for row in marks(view(page, "speed", "Prefill")["panels"][0])}
    strong, mild = by_chain["prunenet-random@0.9"], by_chain["prunenet-random@0.1"]
    assert (strong["value"], strong["low"], strong["high"]) == pytest.approx((1.45, 1.39, 1.54))
    assert strong["verdict"] == "faster, 1.39 to 1.54"
    assert mild["verdict"] == "inside the noise, 0.99 to 1.14"


def test_the_speed_table_counts_verdicts() -> None:
    verdicts = {0.1: "inside the noise", 0.3: "faster", 0.5: "faster"}
    found: list[Cut] = []
    for amount, verdict in verdicts.items():
        times, one = {"speedup_decode": 1 + amount}, {"speedup_decode": 1.0}
        measured = record("m", f"ffn@{amount}", "speed:random", times, one, method="ffn", amount=amount)
        (cut,) = cuts([measured], "speed", "speedup_decode")
        found.append(dataclasses.replace(cut, low=cut.value - 0.1, high=cut.value + 0.1, verdict=verdict))
    table = speed_table({"Decode": found})
    assert table is not None
    assert texts(table) == [["ffn", "2 faster (1 inside the noise)", "1.50 (1.40 to 1.60 · @0.5 of m)"]]


def texts(table: Table) -> list[list[str]]:
    return [[cell.text + (f" ({cell.below})" if cell.below else "") for cell in row] for row in table.rows]


def test_claims_are_set_like_the_rest_of_the_page() -> None:
    claims = [
        Claim(sentence="At 90 % it falls: β = -1.0.", statistic="75% (-0.2 to 1), p = .3", verdict="holds"),
        Claim(sentence="So-called", statistic="r-2", verdict="not settled"),
    ]
    table = claim_table(claims)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["At 90\u202f% it falls: β\u00a0=\u00a0\u22121.0.", "holds", "75\u202f% (\u22120.2 to 1), p\u00a0=\u00a0.3"],
        ["So-called", "not settled", "r-2"],
    ]
    assert [row[1].badge for row in table.rows] == ["yes", "open"]


def test_recovery_has_a_view_for_each_recipe_and_training_corpus(page: str) -> None:
    found = choices(page, "recovery")
    corpora = [corpus.rpartition("/")[2] for corpus in CORPORA]
    assert found == [
        (metric, recipe, corpus)
        for metric in ("Loss", "Accuracy")
        for recipe in ("prunenet-random | lora", "slicegpt | lora")
        for corpus in corpora
    ]
    shown = view(page, "recovery", "Loss", "prunenet-random | lora", "news")
    assert shown["note"].startswith("Measured on testbed/news. Trained on testbed/news.")
    for panel in shown["panels"]:
        lines = {row["series"] for row in marks(panel)}
        assert lines == {f"prunenet-random@{amount}" for amount in (0.1, 0.3, 0.5, 0.7, 0.9)}
        for line in lines:  # from the cut itself to the most tokens
            assert [row.get("tokens") for row in marks(panel) if row["series"] == line] == [None, "4k", "16k", "64k"]
    llama_alone = view(page, "recovery", "Loss", "slicegpt | lora", "news")["panels"]
    assert [panel["title"].partition(" · ")[0] for panel in llama_alone] == ["testbed/llama-483k"]


def repaired_records(before: dict[str, float], after: dict[str, float], trained: str) -> list[Record]:
    """Losses of one cut and its recovery by test corpus; the dense model has 1 nat."""
    found: list[Record] = []
    for values, chain in ((before, "ffn@0.5"), (after, f"ffn@0.5 | lora@4k(corpus={trained})")):
        recovery = {"recovery": "lora", "recovery_tokens": 4000} if values is after else {}
        for corpus, value in values.items():
            found.append(
                record(
                    "m", chain, f"loss:{corpus}", {"loss": value}, {"loss": 1.0}, method="ffn", amount=0.5, **recovery
                )
            )
    return found


def test_what_recovery_repairs_by_hand() -> None:
    # The cut costs 2 nats on both corpora. Trained on a, 1.6 of them come back on a and .6 on b; on b, 1 and -.2.
    before = {"a": 3.0, "b": 3.0}
    records = repaired_records(before, {"a": 1.4, "b": 2.4}, "a") + repaired_records({}, {"a": 3.2, "b": 2.0}, "b")
    table = repair_table(cuts(records, "loss", "loss"), [], [])
    assert table is not None
    assert table.columns == ("Method and recovery", "#Tokens", "#Loss, same corpus", "#Loss, other corpora")
    assert texts(table) == [["ffn | lora", "4k", "65\u202f% (n = 2)", "10\u202f% (n = 2)"]]


def test_quartiles_of_what_recovery_repairs_and_what_is_left_out() -> None:
    found: list[Record] = []
    for model, share in {"m0": 0.2, "m1": 0.4, "m2": 0.6, "m3": 0.8, "untouched": None}.items():
        cut = 0.5 if share is not None else 0.895  # accuracy; .005 are within chance
        after = cut + (share or 5.0) * (0.9 - cut)
        for value, chain, recovery in (
            (cut, "ffn@0.5", {}),
            (after, "ffn@0.5 | lora@16k", {"recovery": "lora", "recovery_tokens": 16_000}),
        ):
            one = {"accuracy": value}
            found.append(record(model, chain, "tasks:t", one, {"accuracy": 0.9}, method="ffn", amount=0.5, **recovery))
    table = repair_table([], cuts(found, "tasks", "accuracy"), [])
    assert table is not None
    assert table.columns[2:] == ("#Accuracy",)
    assert texts(table) == [["ffn | lora", "16k", "50\u202f% (35\u202f% to 65\u202f% · n = 4)"]]


def test_all_numbers_has_a_row_for_each_chain_and_a_column_for_each_corpus() -> None:
    records = repaired_records({"x/a": 3.0, "x/b": 2.0}, {"x/a": 1.4}, "x/a")
    table = cut_table(cuts(records, "loss", "loss"), [])
    assert table is not None
    assert table.columns == ("Model", "Chain", "#Removed", "#Loss, a", "#Loss, b")
    assert [row[1:] for row in texts(table)] == [
        [
            "ffn@0.5 (seed 0)",
            "0.0\u202f%",
            "3.000 (+200.0\u202f% · dense 1.000)",
            "2.000 (+100.0\u202f% · dense 1.000)",
        ],
        ["ffn@0.5 | lora@4k(corpus=x/a) (seed 0)", "0.0\u202f%", "1.400 (+40.0\u202f% · dense 1.000)", ""],
    ]
    assert cut_table([], []) is None


@pytest.mark.parametrize(("after", "digits"), [(1.05, ".3f"), (2.0, ".2f")])
def test_ticks_of_a_narrow_axis_differ(after: float, digits: str) -> None:
    records = repaired_records({"a": after + 0.01}, {"a": after}, "a")
    (only,) = figure(build(records), "recovery")["views"]
    formats = re.findall(r'"format": "(\.\df)"', json.dumps(only["spec"]))
    assert set(formats) == {digits}


def test_nothing_recovered_is_no_table() -> None:
    assert repair_table(cuts(repaired_records({"a": 3.0}, {}, "a"), "loss", "loss"), [], []) is None


def test_a_recovery_whose_cut_was_not_measured_repairs_nothing() -> None:
    alone = repaired_records({}, {"a": 1.4}, "a")
    assert repairs(cuts(alone, "loss", "loss"), least=0.01) == []


def held_out(law: str, error: float | None, *, baseline: bool = False, best: bool = False) -> HoldOut:
    return HoldOut(law=law, baseline=baseline, all=error, before_collapse=error, next_step=error, folds=9, best=best)


def test_the_summary_of_laws_names_the_best_law_and_the_best_naive_rule() -> None:
    report = LawReport(
        measure="loss:a",
        unit="nats",
        holdout=(
            held_out("odds", 0.08, best=True),
            held_out("line", 0.3, baseline=True),
            held_out("persist", 0.2, baseline=True),
            held_out("mean", None, baseline=True),
        ),
        fits=(),
        calibrated=True,
        clusters=3,
        series=5,
    )
    empty = dataclasses.replace(report, measure="loss:b", holdout=())
    table = law_summary([report, empty])
    assert texts(table) == [
        ["loss:a (5 series in 3 clusters)", "odds", "0.080", "persist", "0.200", "0"],
        ["loss:b (5 series in 3 clusters)", "", "", "", "", "0"],
    ]
    assert "RMSE in nats" in table.caption


def test_many_laws_are_summed_up_and_folded_away(page: str) -> None:
    section = page.partition('<section id="laws">')[2].partition("</section>")[0]
    assert "Law that forecast best" in section
    assert section.count('<details class="fold"><summary>Hold-out of loss:') == 2 * len(CORPORA)


def test_the_page_says_nothing_undefined(page: str) -> None:
    body = page.partition("<body>")[2].partition("<script")[0]
    said = re.sub(r"<[^>]+>", " ", body)
    for word in (r"\bnan\b", r"\bundefined\b", r"\bNone\b", r"\binf\b", r"\bnull\b", r"\{\{", r"\bmariotte\.\w+\.\w+"):
        assert not re.search(word, said), re.search(f".{{40}}{word}.{{40}}", said, flags=re.S)


@pytest.mark.slow
@pytest.mark.parametrize("pruning", [False, True])
def test_the_page_of_a_whole_study_is_small(pruning: bool) -> None:
    records = laws_study(pruning=pruning)
    assert len({r.model for r in records}) == len(LADDER)
    html = build(records, failures=failures(), claims=["pruning-laws" if pruning else "compression-laws"])
    assert len(html.encode()) < 4_000_000
