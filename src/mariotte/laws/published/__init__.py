"""Numbers that papers and repositories print, each with its source; facts typed up, never fitted here.

`coefficients` are the published laws' own; `measurements` are other people's experiments, one row a number, and
`points` are those of them that a law can be fitted to. Everything is read with the standard library alone.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mariotte.store.tables import PUBLISHED

if TYPE_CHECKING:
    from mariotte.laws.base import Point

_HERE = Path(__file__).parent

COLUMNS = (*PUBLISHED[:4], "family", *PUBLISHED[4:-1], "chance", "left_out", PUBLISHED[-1])
"""Of a table of measurements. Numbers are as printed; `family` and `chance` (the mean over the tasks of an average) are
ours, `left_out` says why a row belongs to no series, `note` what a reader must know of the row."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of measurements.

    Parameters
    ----------
    name : of its file
    what : what it holds
    licence : as the source states it
    quirks : what looks wrong and is kept as printed, empty for nothing
    """

    name: str
    what: str
    licence: str
    quirks: str = ""


_NUMBERS = "numbers of a paper; its text is not copied"

TABLES: tuple[Table, ...] = (
    Table(
        name="glu_width_llama32",
        what="Llama-3.2-1B, width pruning of the feed-forward part at 7 levels, many tasks",
        licence="MIT",
        quirks="IFEval, MUSR and TruthfulQA are not monotone: left out of the series",
    ),
    Table(
        name="iclr27_capability_loss",
        what="losses of answers by capability at 11 densities, 5 models; 4 bit widths, 5 models",
        licence="not stated",
    ),
    Table(
        name="llamacpp_quant",
        what="Llama-3-8B and LLaMA-2-70B, GGUF ladders, with standard errors",
        licence="MIT",
        quirks="KL divergences have no dense value: no points",
    ),
    Table(
        name="llm_pruner_paper",
        what="LLaMA-7B, structured pruning at 20 and 50 %, with and without LoRA; recovery by steps",
        licence=_NUMBERS,
    ),
    Table(
        name="mpt_joint_prune_quant",
        what="LLaMA-2-7B, three grids of pruning and quantization",
        licence="not stated",
        quirks="some dense values are borrowed from other papers (see note)",
    ),
    Table(
        name="mpt_pruning",
        what="LLaMA-2-7B, 10 to 80 %, more than 15 methods",
        licence="not stated",
        quirks="some dense values are borrowed from other papers, some missing (see note)",
    ),
    Table(
        name="mpt_quant",
        what="LLaMA-2-7B and Qwen2.5, bit ladders",
        licence="not stated",
        quirks="accuracies have two decimals; some ladders start at 8 bits and not at 16 (see note)",
    ),
    Table(
        name="nvidia_minitron_distill",
        what="Nemotron, pruned and distilled: curves over 2.5 to 100 billion recovery tokens",
        licence="Apache-2.0",
        quirks="the dense values are not in the tables: no points",
    ),
    Table(
        name="pruning_collection_retests",
        what="independent re-tests of SliceGPT, SLEB, FLAP and Wanda-sp",
        licence="not stated",
    ),
    Table(
        name="shortened_llama_paper",
        what="LLaMA-7B, Vicuna-7B and -13B, depth and width, with and without recovery",
        licence=_NUMBERS,
    ),
    Table(
        name="slicegpt_paper",
        what="OPT, LLaMA-2 and Phi-2, SliceGPT at 10 to 30 %, with and without recovery",
        licence=_NUMBERS,
        quirks="the average of Phi-2 at 30 % (63.47) disagrees with its tasks (59.23)",
    ),
    Table(
        name="wanda_paper",
        what="LLaMA, LLaMA-2, OPT, Pythia and BLOOM: magnitude, Wanda and SparseGPT at 10 to 80 %",
        licence=_NUMBERS,
        quirks="large perplexities are printed with one digit: left out of the series",
    ),
    Table(
        name="wanda_student_retest",
        what="LLaMA-2-7B and Llama-3.1-8B, an independent re-test of magnitude and Wanda",
        licence="not stated",
    ),
)
"""The tables, by name."""

# A chat or instruct model, and one distilled or fine-tuned from a base, is the base to a law: never independent of it.
_TUNED = re.compile(r"-chat\b|-instruct\b|\(\?\)|\s*\(instruct per readme\)|\s*->.*$", re.IGNORECASE)
_BASE_OF: Mapping[str, str] = {
    "Vicuna-7B": "LLaMA-7B",
    "Vicuna-13B": "LLaMA-13B",
    "DeepSeek-R1-Distill-Llama-8B": "Llama-3.1-8B",
    "DeepSeek-R1-Distill-Qwen-14B": "Qwen2.5-14B",
}


def coefficients() -> list[dict[str, str]]:
    """The published coefficients, one row a fit, as printed.

    Columns: law, source, table, scope, metric (intrinsic: test loss in nats; extrinsic: mean zero-shot accuracy),
    form, alpha, beta, gamma, P0, adj_r2 (uncentred, as published), f_statistic, mark (read: in the paper's own text;
    checked: a quotation checked against the paper by a third party), note.
    """
    with (_HERE / "coefficients.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measurements(name: str) -> list[dict[str, str]]:
    """The rows of one table of `TABLES`, with the columns `COLUMNS`, as printed."""
    with (_HERE / "measurements" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        columns = next(rows)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def sources(name: str) -> list[str]:
    """Where the rows of a table come from: papers and repositories, without the page of each."""
    return sorted({row["source"].partition(" ")[0] for row in measurements(name)})


def base_model(name: str) -> str:
    """The model that one was tuned or distilled from, as these tables name it; another's name comes back as it is."""
    plain = _TUNED.sub("", name).strip()
    return _BASE_OF.get(plain, plain)


@functools.cache
def points(*, quantised: bool = False) -> tuple[Point, ...]:
    """The measurements as points, in the order of the tables.

    Rows without a positive dense value, dense rows and rows that belong to no series (`left_out`) are no points. A
    point's cluster is its base model × family, over all sources. Its source is that of its curve: SliceGPT's Table 12
    continues the curves of Table 1.

    Parameters
    ----------
    quantised : also rows with fewer than 16 bits a weight
    """
    from mariotte.laws.points import row_point

    found: list[Point] = []
    for table in TABLES:
        for row in measurements(table.name):
            bits = float(row["bits"]) if row["bits"] else None
            low = bits is not None and bits < 16
            if row["left_out"] or not row["base_value"] or float(row["base_value"]) <= 0:
                continue
            if (low and not quantised) or (not low and float(row["ratio"]) == 0):
                continue
            cells: dict[str, object] = {**row, "source": row["source"].replace(" Table 12", " Table 1")}
            cells["cluster"] = f"{base_model(row['model'])} × {row['family']}"
            found.append(
                row_point(
                    cells,
                    metric=row["metric"],
                    base=float(row["base_value"]),
                    value=float(row["value"]),
                    ratio=float(row["ratio"]),
                    bits=bits if low else None,
                )
            )
    return tuple(found)
