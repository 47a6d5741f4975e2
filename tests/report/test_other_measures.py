from __future__ import annotations

from mariotte.report.tables import other_table
from mariotte.testing.stores import make_record


def test_speed_has_its_rows_and_its_standard_errors_none() -> None:
    metrics = {"speedup_decode": 1.4, "speedup_decode_se": 0.02, "decode_tokens_per_s": 900.0}
    base = {"speedup_decode": 1.0, "decode_tokens_per_s": 640.0}
    table = other_table([make_record(3, measure="speed:random", metrics=metrics, base=base)])
    assert table is not None
    assert [[cell.text for cell in row[2:]] for row in table.rows] == [
        ["decode_tokens_per_s", "900", "640"],
        ["speedup_decode", "1.4", "1"],
    ]
