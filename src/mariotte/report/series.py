"""Records arranged as a reader meets them: cuts averaged over seeds, in series of one method on one model."""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mariotte.chain import Chain, Link, parse, print_number
from mariotte.errors import ChainError
from mariotte.store.record import Record, digest

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What must be equal for two numbers to be comparable: model, measure and protocol.

    Parameters
    ----------
    model : as the user named it
    model_hash : of the dense model
    measure : canonical text, such as ``loss:testbed/all(block=64)``
    protocol : eight hexadecimal digits of the protocol's hash
    """

    model: str
    model_hash: str
    measure: str
    protocol: str

    @property
    def kind(self) -> str:
        """The measure without its corpus and fields: ``loss``, ``knowledge`` ..."""
        return kind_of(self.measure)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One chain on one model under one protocol, averaged over its seeds.

    Parameters
    ----------
    setting : model, measure and protocol
    series : the chain without the amount of its first link and of its recovery: what a curve is of
    chain : canonical text
    cut : canonical text of the links before recovery: what was recovered
    method, family, unit, recovery : as in `Record`
    amount : nominal, of the first link; None when the step takes none
    removed : share of the dense parameters removed or zeroed, mean over seeds
    zeroed : the part of it that is zeroed and still stored
    tokens : recovery tokens asked for
    value, low, high : mean, smallest and largest value over seeds
    base : the dense model's value under the same protocol
    seeds : in order
    n_params, base_params : parameters left (of the first seed) and of the dense model
    trained : corpus of the recovery, empty without one or where the records do not name it
    verdict : what the measure itself says of the value, such as ``faster``
    """

    setting: Setting
    series: str
    chain: str
    cut: str
    method: str | None
    family: str | None
    unit: str | None
    recovery: str | None
    amount: float | None
    removed: float
    zeroed: float
    tokens: int
    value: float
    low: float
    high: float
    base: float
    seeds: tuple[int, ...]
    n_params: int
    base_params: int
    trained: str = ""
    verdict: str = ""

    @property
    def change(self) -> float:
        """Relative change against the dense model; NaN where the dense value is 0."""
        return self.value / self.base - 1 if self.base else float("nan")


@dataclass(frozen=True, kw_only=True)
class Series:
    """The cuts of one method on one model, from the mildest on.

    Parameters
    ----------
    setting, name : as in `Cut`
    cuts : in order of the share removed
    """

    setting: Setting
    name: str
    cuts: tuple[Cut, ...] = field(default=())


def kind_of(measure: str) -> str:
    """The name of a measure without its corpus and fields: ``loss`` of ``loss:testbed/all(block=64)``."""
    return measure.partition(":")[0].partition("(")[0].strip()


def corpus_of(measure: str) -> str:
    """The corpus or tasks of a measure: ``testbed/all`` of ``loss:testbed/all(block=64)``; empty without one."""
    return measure.partition(":")[2].partition("(")[0].strip()


def own_metrics(records: Iterable[Record]) -> list[str]:
    """Names of the metrics of some records, in order, without those that are the standard error of another."""
    names = {name for record in records for name in record.metrics}
    return sorted(name for name in names if not (name.endswith("_se") and name.removesuffix("_se") in names))


def setting_of(record: Record) -> Setting:
    """Model, measure and protocol of a record."""
    return Setting(
        model=record.model,
        model_hash=record.model_hash,
        measure=record.measure,
        protocol=digest(record.protocol)[:8],
    )


def is_dense(record: Record) -> bool:
    """Whether the record measures the model as it came."""
    return record.method is None


@functools.lru_cache(maxsize=16_384)
def _links(chain: str) -> tuple[Link, ...] | None:
    try:
        return parse(chain).links
    except ChainError:
        return None  # published tables name chains in their own words: such a chain is a series of its own


def series_of(record: Record) -> str:
    """The chain without the amount that varies along a curve: that of its first link.

    ``ffn@0.2 | lora@16k`` is a point of ``ffn | lora@16k``.
    """
    links = _links(record.chain)
    if not links:
        return record.method or record.chain
    first = replace(links[0], amount=None, fields={k: v for k, v in links[0].fields.items() if k != "of"})
    return str(Chain((first, *links[1:])))


def cut_of(record: Record) -> str:
    """The links of the chain before its recovery: the chain itself where there is none."""
    links = _links(record.chain)
    if not links or record.recovery is None:
        return record.chain
    names = [link.name for link in links]
    return str(Chain(links[: names.index(record.recovery)])) if record.recovery in names else record.chain


def cuts(records: Iterable[Record], kind: str, metric: str) -> list[Cut]:
    """Every chain's `metric` under measures of `kind`, averaged over seeds.

    Parameters
    ----------
    records : of any models, measures and seeds
    kind : such as ``loss`` or ``knowledge``
    metric : such as ``loss`` or ``top1``

    Returns
    -------
    dense models first, then by model, method, recovery with its corpus and tokens, and share removed
    """
    groups: dict[tuple[Setting, str], list[Record]] = defaultdict(list)
    for record in records:
        if kind_of(record.measure) == kind and metric in record.metrics and metric in record.base:
            groups[setting_of(record), record.chain].append(record)
    found = [_average(setting, sorted(group, key=lambda r: r.seed), metric) for (setting, _), group in groups.items()]
    return sorted(found, key=_order)


def _order(cut: Cut) -> tuple[object, ...]:
    model = cut.method is not None, cut.base_params, cut.setting.model
    # Recoveries by corpus and tokens: as text, 16k would come before 4k.
    return *model, cut.method or "", cut.recovery or "", cut.trained, cut.tokens, cut.series, cut.removed


def _average(setting: Setting, group: Sequence[Record], metric: str) -> Cut:
    first = group[0]
    values = [record.metrics[metric] for record in group]
    return Cut(
        setting=setting,
        series=DENSE if is_dense(first) else series_of(first),
        chain=first.chain,
        cut=cut_of(first),
        method=first.method,
        family=first.family,
        unit=first.unit,
        recovery=first.recovery,
        amount=first.amount,
        removed=statistics.fmean(record.removed for record in group),
        zeroed=statistics.fmean(record.zeroed for record in group),
        tokens=first.recovery_tokens,
        value=statistics.fmean(values),
        low=min(values),
        high=max(values),
        base=statistics.fmean(record.base[metric] for record in group),
        seeds=tuple(record.seed for record in group),
        n_params=first.n_params,
        base_params=first.base_params,
        trained=trained_on(first),
    )


def trained_on(record: Record) -> str:
    """The corpus that a recovery trained on: as its chain says, else as its step reports; empty where neither does."""
    for link in _links(record.chain) or ():
        if link.name == record.recovery and "corpus" in link.fields:
            return str(link.fields["corpus"])
    for step in record.steps:
        if record.recovery is not None and step.get("name") == record.recovery:
            return str(step.get("facts", {}).get("corpus") or "")
    return ""


def speeds(records: Sequence[Record], part: str) -> list[Cut]:
    """How many times as fast as the dense model, with the interval and the verdict of the measure.

    Parameters
    ----------
    records : of any measures
    part : ``prefill`` or ``decode``

    Returns
    -------
    cuts whose low and high are the ends of the interval: the widest over seeds, two standard errors where the measure
    gave none, the value itself where it gave neither
    """
    metric = f"speedup_{part}"
    own = [record for record in records if kind_of(record.measure) == "speed" and metric in record.metrics]
    groups: dict[tuple[Setting, str], list[Record]] = defaultdict(list)
    for record in own:
        groups[setting_of(record), record.chain].append(record)
    found: list[Cut] = []
    for cut in cuts(own, "speed", metric):
        group = groups[cut.setting, cut.chain]
        ends = [_speed_interval(record, part, metric) for record in group]
        verdicts = dict.fromkeys(str(record.details.get(part, {}).get("verdict") or "") for record in group)
        found.append(
            replace(
                cut,
                low=min(low for low, _ in ends),
                high=max(high for _, high in ends),
                verdict=", ".join(filter(None, verdicts)),
            )
        )
    return found


def _speed_interval(record: Record, part: str, metric: str) -> tuple[float, float]:
    value, error = record.metrics[metric], record.metrics.get(f"{metric}_se", 0.0)
    given = record.details.get(part, {}).get("interval")
    if isinstance(given, list | tuple):
        low, high = (float(end) for end in given)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return value - 2 * error, value + 2 * error


def by_measure(curves: Iterable[Series]) -> dict[str, list[Series]]:
    """Curves by what they were measured on, where a model was measured on several things; else all under ``""``.

    The names are those of `measure_labels`.
    """
    curves = list(curves)
    measures: dict[str, set[str]] = defaultdict(set)
    for curve in curves:
        measures[curve.setting.model_hash].add(curve.setting.measure)
    if all(len(own) == 1 for own in measures.values()):
        return {"": curves}
    return {
        label: [curve for curve in curves if curve.setting.measure == name]
        for name, label in measure_labels(curve.setting.measure for curve in curves).items()
    }


def measure_labels(measures: Iterable[str]) -> dict[str, str]:
    """A short name for each measure, in order: its corpus, or all of it where two differ in more than their corpus."""
    names = sorted(set(measures))
    corpora = [corpus_of(name) for name in names]
    labels = short_names(corpora) if len(set(corpora)) == len(corpora) and all(corpora) else names
    return dict(zip(names, labels, strict=True))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folder that all of them share: ``news`` of ``testbed/news``."""
    folders = {name.rpartition("/")[0] for name in names}
    return [name.rpartition("/")[2] for name in names] if len(folders) == 1 else list(names)


def most_lines(curves: Iterable[Series]) -> int:
    """Lines of the fullest panel when each setting has a panel of its own; 0 without curves."""
    return max(Counter(curve.setting for curve in curves).values(), default=0)


def recipe_of(cut: Cut) -> str:
    """The chain without amounts and without the corpus of its recovery: ``ffn | lora``."""
    links = _links(cut.chain)
    if not links:
        return cut.series
    return str(
        Chain(
            tuple(
                replace(link, amount=None, fields={k: v for k, v in link.fields.items() if k not in ("of", "corpus")})
                for link in links
            )
        )
    )


def repairs(found: Iterable[Cut], *, least: float) -> list[tuple[Cut, float]]:
    """Recovered cuts with the share of the damage that recovery repaired: 1 is the dense model's value, 0 the cut's.

    Parameters
    ----------
    found : cuts of one metric, recovered ones and those that they began as
    least : a cut that did less damage, in the metric's unit, is left out: there is nothing to repair
    """
    found = list(found)
    plain = {(cut.setting, cut.chain): cut for cut in found if cut.recovery is None}
    repaired: list[tuple[Cut, float]] = []
    for cut in found:
        before = plain.get((cut.setting, cut.cut)) if cut.recovery is not None else None
        if before is not None and abs(before.value - before.base) >= least:
            repaired.append((cut, (before.value - cut.value) / (before.value - before.base)))
    return repaired


def series(found: Iterable[Cut], *, least: int = 1) -> list[Series]:
    """Cuts as curves over the share removed, dense models left out.

    Parameters
    ----------
    found : cuts of one metric
    least : a curve with fewer cuts is left out
    """
    groups: dict[tuple[Setting, str], list[Cut]] = defaultdict(list)
    for cut in found:
        if cut.method is not None:
            groups[cut.setting, cut.series].append(cut)
    return [
        Series(setting=setting, name=name, cuts=tuple(sorted(group, key=lambda c: (c.removed, c.amount or 0))))
        for (setting, name), group in groups.items()
        if len(group) >= least
    ]


def recoveries(found: Iterable[Cut]) -> list[Series]:
    """Cuts as curves over recovery tokens: one for every cut that was recovered with two or more amounts of tokens.

    The unrecovered cut, where it was measured, is the point at zero tokens.
    """
    plain: dict[tuple[Setting, str], Cut] = {}
    groups: dict[tuple[Setting, str, str], list[Cut]] = defaultdict(list)
    for cut in found:
        if cut.recovery is None:
            plain[cut.setting, cut.chain] = cut
        else:
            groups[cut.setting, cut.cut, _without_tokens(cut)].append(cut)
    curves: list[Series] = []
    for (setting, before, name), group in groups.items():
        start = [plain[setting, before]] if (setting, before) in plain else []
        if len({cut.tokens for cut in group}) + len(start) >= 2:
            ordered = sorted(group, key=lambda c: c.tokens)
            curves.append(Series(setting=setting, name=name, cuts=(*start, *ordered)))
    return curves


def _without_tokens(cut: Cut) -> str:
    links = _links(cut.chain) or ()
    return (
        str(Chain(tuple(replace(link, amount=None) if link.name == cut.recovery else link for link in links)))
        or cut.chain
    )


def panel_names(settings: Iterable[Setting]) -> dict[Setting, str]:
    """A heading for each setting: the model's name, with the measure or protocol where the name alone is not enough."""
    settings = list(dict.fromkeys(settings))
    names: dict[Setting, str] = {}
    for setting in settings:
        namesakes = [other for other in settings if other.model == setting.model]
        name = setting.model
        if len({other.measure for other in namesakes}) > 1:
            name += f" · {corpus_of(setting.measure) or setting.measure}"
        if len([other for other in namesakes if other.measure == setting.measure]) > 1:
            name += f" · protocol {setting.protocol}"
        names[setting] = name
    return names


def share(value: float, digits: int = 0) -> str:
    """A fraction as a percentage with a narrow no-break space: ``14 %``."""
    return f"{_signless(100 * value, digits)}\u202f%"


def signed_share(value: float, digits: int = 1) -> str:
    """A relative change with its sign: ``+5.0 %``, ``−2.1 %``."""
    return ("+" if value >= 0 else "\u2212") + share(abs(value), digits)


def _signless(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    text = text.lstrip("-") if float(text) == 0 else text
    return text.replace("-", "\u2212")


def quantity(value: float) -> str:
    """A count short enough for a table: ``1.0M``, ``345k``, ``512``."""
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.{1 if abs(value) < 10 * scale else 0}f}{suffix}"
    return f"{value:.0f}"


def tokens_text(value: int) -> str:
    """Recovery tokens as a user types them: ``16k``, ``1M``."""
    return print_number(value)


def span(values: Iterable[int]) -> str:
    """Whole numbers as ranges: ``0-2, 5``."""
    ordered = sorted(set(values))
    runs: list[list[int]] = []
    for value in ordered:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}\u2013{run[-1]}" for run in runs)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of text: ``{"tokenizer.hash": "3fa2..."}``."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
        elif value is not None:
            flat[f"{prefix}{key}"] = str(value)
    return flat
