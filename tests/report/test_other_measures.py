from __future__ import annotations

from mariotte.report.tables import other_tables
from mariotte.testing.stores import make_record


def test_every_chain_has_a_row_of_all_metrics_and_standard_errors_none() -> None:
    base = {"speedup_decode": 1.0, "decode_tokens_per_s": 640.0}
    metrics = {"speedup_decode": 1.4, "speedup_decode_se": 0.02, "decode_tokens_per_s": 900.0}
    first = make_record(3, measure="speed:random", metrics=metrics, base=base)
    (table,) = other_tables([first, make_record(1, measure="loss:any")])
    assert table.fold == "All numbers of speed:random"
    assert table.columns == ("Model", "Chain", "#Seeds", "#decode tokens per s", "#speedup decode")
    assert [[cell.text for cell in row[1:]] for row in table.rows] == [
        ["dense", "", "640", "1"],
        [first.chain, str(first.seed), "900", "1.4"],
    ]


def test_losses_and_facts_have_their_own_table() -> None:
    assert other_tables([make_record(1, measure="loss:any"), make_record(1, measure="knowledge:any")]) == []
