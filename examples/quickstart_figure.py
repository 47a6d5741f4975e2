"""Draw the README's figure from the records of a quickstart.

mariotte quickstart && python examples/quickstart_figure.py mariotte-quickstart/quickstart.db docs/images/quickstart.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from mariotte import Record, open_store

METHODS = {"ffn": "#0072b2", "magnitude": "#d55e00", "slice": "#009e73"}
WITHIN = 2.0  # loss as a multiple of the dense one: beyond, a model has collapsed


def rows(records: list[Record], metric: str, panel: str) -> list[dict[str, object]]:
    """One row a cut that was not recovered: the metric, as a share of the dense model's."""
    cuts = [r for r in records if metric in r.metrics and r.method is not None and r.recovery is None]
    found = [(r.method, r.removed, r.metrics[metric] / r.base[metric]) for r in cuts]
    found += [(method, 0.0, 1.0) for method in METHODS]  # every curve begins at the dense model
    return [
        {"panel": panel, "method": method, "removed": removed, "value": value}
        for method, removed, value in found
        if metric != "loss" or value <= WITHIN
    ]


def chart(records: list[Record], metric: str, title: str, domain: tuple[float, float]) -> alt.Chart:
    """Curves of one metric, one a method."""
    return (
        alt.Chart(pd.DataFrame(rows(records, metric, title)), width=300, height=210, title=title)
        .mark_line(point={"size": 40}, clip=True)
        .encode(
            x=alt.X("removed:Q", title="parameters removed (zeroed by magnitude)")
            .axis(format="%")
            .scale(domain=(0, 0.7)),
            y=alt.Y("value:Q", title=None).axis(format="%").scale(domain=domain),
            color=alt.Color("method:N", title=None).scale(domain=list(METHODS), range=list(METHODS.values())),
        )
    )


def main(store: str, out: str) -> None:
    with open_store(store) as opened:
        records = opened.records(model="testbed/qwen2-1m")
    both = chart(records, "loss", "test loss ÷ dense loss", (0.95, WITHIN)) | chart(
        records, "top1", "facts known ÷ facts known by the dense model", (0.0, 1.05)
    )
    spec = both.configure(background="white", font="sans-serif").configure_view(stroke=None).to_dict()
    Path(out).write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))


if __name__ == "__main__":
    main(*sys.argv[1:])
