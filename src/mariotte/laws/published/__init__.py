"""Numbers that papers print, each with its source; facts typed up, never fitted here."""

from __future__ import annotations

import csv
from pathlib import Path


def coefficients() -> list[dict[str, str]]:
    """The published coefficients, one row a fit, as printed.

    Columns: law, source, table, scope, metric (intrinsic: test loss in nats; extrinsic: mean zero-shot accuracy),
    form, alpha, beta, gamma, P0, adj_r2 (uncentred, as published), f_statistic, mark (read: in the paper's own text;
    checked: a quotation checked against the paper by a third party), note.
    """
    with (Path(__file__).parent / "coefficients.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
