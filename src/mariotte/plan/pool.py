"""What is known before anything is measured: shipped records of the testbed, published tables, the user's own store."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mariotte import chain as chains
from mariotte.chain import Chain
from mariotte.errors import StoreError
from mariotte.laws.base import metric_kind
from mariotte.shapes import QUANTIZERS, RECOVERIES
from mariotte.store.record import Record, digest

SHIPPED = Path(__file__).parent / "testbed.csv"
"""The testbed's studies, one row a number; ``benchmarks/plan_pool.py`` writes it from the records."""

METRICS = ("loss", "accuracy", "top1")
"""Of which rows are shipped."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of one compressed model, or of a dense one.

    Parameters
    ----------
    model, family, params : the dense model, its ``model_type`` and its parameters
    chain : canonical text; ``dense`` for the dense model
    obtained : what the first cut removed in its own unit, after rounding
    n_params, n_bytes : of the compressed model
    metric, measure, protocol : what was measured; `protocol` tells measures of one text apart, see `protocol_of`
    base, value : of the dense model and of this one
    se : standard error of `value`, None where unknown
    chance : of a guesser, None where unknown
    source : where it is from: shipped, store, or probe
    """

    model: str
    family: str
    params: float
    chain: str
    obtained: float
    n_params: float
    n_bytes: float
    metric: str
    measure: str
    protocol: str
    base: float
    value: float
    se: float | None = None
    chance: float | None = None
    source: str = "store"

    @property
    def dense(self) -> bool:
        """Whether it is of the dense model."""
        return self.chain == "dense"

    @property
    def key(self) -> tuple[str, str]:
        """Measure and metric: what must be equal for two numbers to be of one kind."""
        return self.protocol, self.metric


@dataclass(frozen=True)
class Parted:
    """A chain in the parts that laws know: cuts, then a recovery, then a quantizer; each may be missing.

    Parameters
    ----------
    cut : the cut without its amount, such as ``slice`` or ``ffn(criterion=norm)``, or several as ``heads | ffn``; empty
        without one
    quantizer, recovery : canonical texts, with their amounts; empty without one
    """

    cut: str
    quantizer: str
    recovery: str

    @property
    def cuts(self) -> tuple[str, ...]:
        """The cuts, each without its amount, in their order."""
        return tuple(self.cut.split(TOGETHER)) if self.cut else ()

    @property
    def combined(self) -> bool:
        """Whether there are several cuts, so that no single curve is theirs."""
        return TOGETHER in self.cut


TOGETHER = " | "
"""Between the cuts of a combination."""


@functools.cache
def parted(chain: str) -> Parted | None:
    """The parts of a chain; None where it has more of a kind than laws know, or in another order."""
    cuts: list[str] = []
    quantizer = recovery = ""
    for link in chains.parse(chain).links:
        if link.name in RECOVERIES:
            if recovery or quantizer:
                return None
            recovery = str(link)
        elif link.name in QUANTIZERS:
            if quantizer:
                return None
            quantizer = str(link)
        elif quantizer or recovery:
            return None
        else:
            cuts.append(str(replace(link, amount=None)))
    return Parted(TOGETHER.join(cuts), quantizer, recovery)


def protocol_of(measure: str, protocol: Mapping[str, object]) -> str:
    """A short text that two numbers share if and only if they were measured alike; as in points of laws."""
    return f"{measure}#{digest(dict(protocol))[:8]}"


def of_records(records: Iterable[Record], source: str = "store") -> list[Entry]:
    """The numbers of records, each metric one; those without a dense value are left out."""
    found: list[Entry] = []
    for record in records:
        protocol = protocol_of(record.measure, record.protocol)
        for metric, value in record.metrics.items():
            if metric.endswith("_se") or (base := record.base.get(metric)) is None:
                continue
            found.append(
                Entry(
                    model=record.model,
                    family=record.model_type,
                    params=float(record.base_params),
                    chain=record.chain,
                    obtained=record.obtained or 0.0,
                    n_params=float(record.n_params),
                    n_bytes=float(record.n_bytes),
                    metric=metric,
                    measure=record.measure,
                    protocol=protocol,
                    base=base,
                    value=value,
                    se=record.metrics.get(f"{metric}_se"),
                    chance=_chance(record.protocol, metric),
                    source=source,
                )
            )
    return found


@functools.cache
def shipped() -> tuple[Entry, ...]:
    """The records of the testbed that come with the package.

    Raises
    ------
    StoreError
        When the file is missing or damaged.
    """
    try:
        with SHIPPED.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return tuple(_entry(row) for row in rows)
    except (OSError, KeyError, ValueError) as error:
        raise StoreError(
            f"the shipped records {SHIPPED} cannot be read ({error}): install the package again"
        ) from error


def _entry(row: Mapping[str, str]) -> Entry:
    return Entry(
        model=row["model"],
        family=row["family"],
        params=float(row["params"]),
        chain=row["chain"],
        obtained=float(row["obtained"]),
        n_params=float(row["n_params"]),
        n_bytes=float(row["n_bytes"]),
        metric=row["metric"],
        measure=row["protocol"].rpartition("#")[0],
        protocol=row["protocol"],
        base=float(row["base"]),
        value=float(row["value"]),
        se=float(row["se"]) if row["se"] else None,
        chance=float(row["chance"]) if row["chance"] else None,
        source="shipped",
    )


COLUMNS = (
    "model",
    "family",
    "params",
    "chain",
    "obtained",
    "n_params",
    "n_bytes",
    "metric",
    "protocol",
    "base",
    "value",
    "se",
    "chance",
)
"""Of the shipped file."""


def write_shipped(entries: Iterable[Entry], path: Path = SHIPPED) -> int:
    """Write the shipped file; how many rows it has."""
    rows = sorted(set(entries), key=lambda e: (e.model, e.measure, e.metric, e.chain))

    def text(value: object) -> str:
        return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([text(getattr(row, name)) for name in COLUMNS] for row in rows)
    return len(rows)


def _chance(protocol: Mapping[str, object], metric: str) -> float | None:
    """What a guesser scores, as the protocol says: ``chance_top1`` is that of ``top1`` and of ``heldout_top1``."""
    for name, value in protocol.items():
        scored = name.removeprefix("chance_")
        if scored != name and (metric == scored or metric.endswith(f"_{scored}")) and isinstance(value, int | float):
            return float(value)
    return None


STANDS_FOR: Mapping[str, tuple[str, ...]] = {"slice": ("slice", "slicegpt"), "depth": ("shortgpt",), "width": ("ffn",)}
"""Our methods by the family of published ones: a curve of the family stands for them until they are measured."""

FFN_SHARE = 0.65
"""Of a Llama's parameters in its feed-forward part: 60 % of the neurons are 39 % of the parameters."""


@functools.cache
def published() -> tuple[Entry, ...]:
    """Perplexities of WikiText-2 that others published, as losses of the nearest of our methods, without recovery.

    Notes
    -----
    Context lengths differ between sources (2048 mostly) and so do implementations: two runs of one model and method by
    different people disagree by .22 in the logarithm of the damage. What is measured here goes before it. Width pruning
    is published by parameters; here it is a share of neurons, as if the feed-forward part were `FFN_SHARE` of a model.
    """
    from mariotte.laws.published import points

    found: list[Entry] = []
    for p in points():
        if p.metric != "wikitext2_ppl" or p.tokens or p.recovery or p.bits is not None or not 0 < p.ratio < 1:
            continue
        for method in STANDS_FOR.get(p.family or "", ()):
            neurons = "neurons" in p.ratio_kind or method != "ffn"
            amount = p.ratio if neurons else p.ratio / FFN_SHARE
            if not amount < 0.98 or p.params is None:
                continue
            found.append(
                Entry(
                    model=p.model,
                    family="",
                    params=p.params,
                    chain=f"{method}@{amount:.6g}",
                    obtained=amount,
                    n_params=p.params * (1 - p.ratio),
                    n_bytes=2 * p.params * (1 - p.ratio),
                    metric="loss",
                    measure=PUBLISHED,
                    protocol=f"{PUBLISHED}{STANDS}",
                    base=p.base,
                    value=p.value,
                    se=p.se,
                    source="published",
                )
            )
    return tuple(found)


STANDS = "#published"
"""Ends the protocol of published numbers, which stand for a protocol until something is measured in it."""

PUBLISHED = "loss:wikitext2"
"""The measure that comes nearest to what is published."""


def without(entries: Iterable[Entry], model: str) -> list[Entry]:
    """The numbers of all other models, and of this one the dense ones."""
    return [entry for entry in entries if entry.model != model or entry.dense]


def usable(entry: Entry) -> bool:
    """Whether laws can use a number: a loss or a score of a chain whose parts they know, with a positive base."""
    return (
        metric_kind(entry.metric) in ("loss", "score")
        and math.isfinite(entry.value)
        and entry.base > 0
        and (entry.dense or parted(entry.chain) is not None)
    )


__all__ = ["Chain", "Entry", "Parted", "of_records", "parted", "protocol_of", "shipped", "usable", "without"]
