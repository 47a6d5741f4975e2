"""The figures of the page: Vega-Lite specifications, one small chart for each model, in views that a reader can switch.

A specification holds no colours of its own: series take theirs from the category range of the page's theme, by their
place in a list that is the same for every figure, so that a method keeps its colour throughout and in the dark too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import altair as alt

from mariotte.report.series import (
    Cut,
    Series,
    Setting,
    by_measure,
    corpus_of,
    most_lines,
    panel_names,
    recipe_of,
    share,
    short_names,
    signed_share,
    span,
    tokens_text,
)

HEIGHT = 250
"""Of one chart, pixels; the width is that of its container."""

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
"""Second mark of a series beside its colour, for readers who cannot tell the colours apart."""

LEAST_DAMAGE = 1e-3
"""Smallest rise of the loss in nats that the logarithmic view draws; below it seeds decide; chosen by us."""

TALLEST = 3.0
"""The linear view ends at this multiple of the largest dense loss: beyond it all models are useless; chosen by us."""


MOST_LINES = 8
"""Lines that a panel holds: as many as there are colours, and more cannot be told apart; chosen by us."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The data of one chart of a view.

    Parameters
    ----------
    title : heading
    columns, rows : the marks, values in the order of the columns; None where a mark has no such value
    common : what all marks share, written once
    references : values to compare with, such as the dense model's, by the name of their data set
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]
    common: Mapping[str, Any]
    references: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of looking at a figure's data.

    Parameters
    ----------
    choices : the buttons that select it, one from each of the figure's rows of buttons
    spec : Vega-Lite specification of every panel, but for its data
    panels : one for each setting
    note : a sentence below the figure while it is shown
    """

    choices: tuple[str, ...]
    spec: Mapping[str, Any]
    panels: tuple[Panel, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a figure's legend: label, place in the theme's colours, shape, and dashes for what was recovered."""

    label: str
    colour: int
    shape: str
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Views of the same data, and a legend that hides and shows series.

    Parameters
    ----------
    name : of the element on the page
    keys : of all views; a view shows those that it draws
    views : the first is shown first
    asks : what each row of buttons chooses
    """

    name: str
    keys: tuple[Key, ...]
    views: tuple[View, ...] = field(default=())
    asks: tuple[str, ...] = ("What is drawn",)

    @property
    def buttons(self) -> list[tuple[int, str, list[str]]]:
        """Place, question and answers of each row of buttons that leaves something to choose."""
        rows = [
            (place, ask, list(dict.fromkeys(view.choices[place] for view in self.views)))
            for place, ask in enumerate(self.asks)
        ]
        return [(place, ask, answers) for place, ask, answers in rows if len(answers) > 1]


class Palette:
    """Gives every curve its colour and shape, the same in all figures.

    Parameters
    ----------
    plain : names of the series without recovery; each takes a colour
    recovered : name of a recovered curve to the name of the series it began as, whose colour it shares
    """

    def __init__(self, plain: Iterable[str], recovered: Mapping[str, str]) -> None:
        colours = {name: place for place, name in enumerate(dict.fromkeys([*plain, *recovered.values()]))}
        self._keys: dict[str, Key] = {}
        for name, place in colours.items():
            # The ninth series has the first one's colour again, and therefore another shape.
            shape = SHAPES[(place + place // len(SHAPES)) % len(SHAPES)]
            self._keys[name] = Key(label=name, colour=place, shape=shape)
        for name, origin in recovered.items():
            place = len(self._keys)
            self._keys[name] = Key(label=name, colour=colours[origin], shape=SHAPES[place % len(SHAPES)], dashed=True)

    @classmethod
    def ranked(cls, groups: Iterable[Sequence[str]]) -> Palette:
        """A palette of groups that are never drawn together: the first of each has the first colour, and so on."""
        palette = cls((), {})
        for group in groups:
            for place, name in enumerate(group):
                palette._keys[name] = Key(label=name, colour=place, shape=SHAPES[place % len(SHAPES)])
        return palette

    def keys(self, curves: Iterable[Series]) -> tuple[Key, ...]:
        """The legend of some curves, in the page's order."""
        present = {curve.name for curve in curves}
        return tuple(key for name, key in self._keys.items() if name in present)


def loss_figure(plain: Sequence[Series], recovered: Sequence[Series], palette: Palette) -> Figure:
    """Loss against the share removed: in nats, as rise over the dense model (logarithmic), and after recovery.

    Models that were measured on several corpora have a view for each, so that a view has one panel for each model.
    """
    views: list[View] = []
    drawn: list[Series] = []
    for corpus, curves in by_measure(reducing(plain)).items():
        if curves:
            views += [_loss_view("Loss", corpus, curves, palette), *_rise_view(corpus, curves, palette)]
            drawn += curves
    for corpus, curves in by_measure(reducing(recovered)).items():
        kept, left_out = _few(curves)
        if kept:
            views.append(_loss_view("After recovery", corpus, kept, palette, left_out))
            drawn += kept
    return Figure(name="loss", keys=palette.keys(drawn), views=tuple(views), asks=("What is drawn", "Measured on"))


def _loss_view(name: str, corpus: str, curves: Sequence[Series], palette: Palette, note: str = "") -> View:
    everything = [cut for curve in curves for cut in curve.cuts]
    ceiling = min(max(cut.high for cut in everything), TALLEST * max(cut.base for cut in everything))
    floor = min(min(cut.low, cut.base) for cut in everything)
    above = sum(cut.value > ceiling for cut in everything)
    axis = _loss_axis(floor, ceiling)
    notes = [f"Above the frame: {above} collapsed." if above else "", note]
    return _view(
        (name, corpus), curves, palette, _over_share, axis, (floor, ceiling), note=" ".join(filter(None, notes))
    )


def _rise_view(corpus: str, curves: Sequence[Series], palette: Palette) -> list[View]:
    everything = [cut for curve in curves for cut in curve.cuts]
    rising = [cut for cut in everything if cut.value - cut.base > LEAST_DAMAGE]
    if not rising:
        return []
    hidden = len(everything) - len(rising)
    axis = _Axis(title="Rise of the loss, nats a token", format="~g", logarithmic=True)
    domain = (0.8 * min(cut.value - cut.base for cut in rising), max(cut.high - cut.base for cut in rising))
    note = f"Left out: {hidden} with a rise below {LEAST_DAMAGE} nats." if hidden else ""
    return [_view(("Rise, logarithmic", corpus), curves, palette, _over_share, axis, domain, note=note)]


def facts_figure(views: Mapping[str, Sequence[Series]], palette: Palette) -> Figure:
    """Share of facts known against the share removed; one view for each named metric."""
    drawn: list[View] = []
    everything: list[Series] = []
    for name, found in views.items():
        for measured, curves in by_measure(reducing(found)).items():
            kept, note = _few(curves) if any(c.cuts[0].recovery for c in curves) else (curves, "")
            if kept:
                axis = _Axis(title="Facts known, top-1", format=".0%")
                drawn.append(_view((name, measured), kept, palette, _over_share, axis, (0.0, 1.0), note=note))
                everything += kept
    return Figure(
        name="facts", keys=palette.keys(everything), views=tuple(drawn), asks=("What is drawn", "Measured on")
    )


def tasks_figure(
    views: Mapping[tuple[str, str], Sequence[Series]],
    chances: Mapping[tuple[Setting, str], float],
    metrics: Mapping[str, str],
    palette: Palette,
) -> Figure:
    """Accuracy against the share removed, with chance as a second dashed line.

    Parameters
    ----------
    views : curves by task and state, such as ``("events", "Cut")``
    chances : accuracy of guessing, by setting and metric; a task without has no line
    metrics : the metric of each task's name on the page
    palette : of the page
    """
    drawn: list[View] = []
    everything: list[Series] = []
    axis = _Axis(title="Accuracy", format=".0%")
    for (task, state), found in views.items():
        curves = reducing(found)
        kept, note = _few(curves) if any(c.cuts[0].recovery for c in curves) else (curves, "")
        if not kept:
            continue
        own = {setting: chance for (setting, metric), chance in chances.items() if metric == metrics[task]}
        drawn.append(_view((task, state), kept, palette, _over_share, axis, (0.0, 1.0), chances=own, note=note))
        everything += kept
    return Figure(name="tasks", keys=palette.keys(everything), views=tuple(drawn), asks=("Task", "What is drawn"))


def speed_figure(views: Mapping[str, Sequence[Series]], palette: Palette) -> Figure:
    """S, how many times as fast as the dense model, against the share removed; strokes are the measure's intervals."""
    drawn: list[View] = []
    everything: list[Series] = []
    for name, found in views.items():
        curves = reducing(found)
        values = [cut.value for curve in curves for cut in curve.cuts]
        if not values:
            continue
        axis = _Axis(title="S, times as fast as dense", format=".2f")
        # Intervals of few rounds can be very wide: the marks fill the panel, a stroke may end beyond it.
        domain = (0.9 * min(1.0, *values), 1.1 * max(1.0, *values))
        drawn.append(_view((name,), curves, palette, _over_share, axis, domain))
        everything += curves
    return Figure(name="speed", keys=palette.keys(everything), views=tuple(drawn))


def recovery_figure(views: Mapping[str, Sequence[Series]], palette: Palette) -> Figure:
    """Loss, accuracy, facts ... against recovery tokens after one cut; all but ``Loss`` have a percentage axis.

    Where a panel would hold more than `MOST_LINES`, or a model was measured on several corpora, there is a view for
    each method and training corpus instead, with a line for each amount: see `many_recoveries`.
    """
    if many_recoveries(views):
        return _recoveries_by_recipe(views)
    drawn = [_recovery_view((name,), curves, palette) for name, curves in views.items()]
    everything = [curve for curves in views.values() for curve in curves]
    return Figure(name="recovery", keys=palette.keys(everything), views=tuple(drawn))


def many_recoveries(views: Mapping[str, Sequence[Series]]) -> bool:
    """Whether recoveries are too many to be drawn side by side."""
    return any(most_lines(curves) > MOST_LINES or len(by_measure(curves)) > 1 for curves in views.values())


def _recovery_view(choices: tuple[str, ...], curves: Sequence[Series], palette: Palette, note: str = "") -> View:
    """One metric, the first of the choices, over recovery tokens."""
    everything = [cut for curve in curves for cut in curve.cuts]
    if choices[0] == "Loss":
        domain = min(min(c.low, c.base) for c in everything), max(max(c.high, c.base) for c in everything)
        axis = _loss_axis(*domain)
    else:
        axis = _Axis(title="Facts known, top-1" if choices[0].startswith("Facts") else "Accuracy", format=".0%")
        domain = (0.0, 1.0)
    return _view(choices, curves, palette, _over_tokens, axis, domain, note=note)


def _recoveries_by_recipe(views: Mapping[str, Sequence[Series]]) -> Figure:
    """A view for each metric, recipe and training corpus; the loss is on the test corpus of the same name."""
    cuts_of: dict[str, dict[str, float]] = defaultdict(dict)  # by recipe without recovery: cut -> amount
    for curve in (curve for curves in views.values() for curve in curves):
        last = curve.cuts[-1]
        cuts_of[last.cut.partition("@")[0]][last.cut] = last.amount or 0.0
    shown = {method: _evenly(sorted(amounts, key=lambda cut: amounts[cut])) for method, amounts in cuts_of.items()}
    palette = Palette.ranked(shown.values())
    kept_cuts = {cut for chosen in shown.values() for cut in chosen}
    drawn: list[View] = []
    everything: list[Series] = []
    trained = sorted({curve.cuts[-1].trained for curves in views.values() for curve in curves})
    corpora = dict(zip(trained, short_names(trained), strict=True))
    for name, curves in views.items():
        for recipe in sorted({recipe_of(curve.cuts[-1]) for curve in curves}):
            for corpus in trained:
                own = [c for c in curves if recipe_of(c.cuts[-1]) == recipe and c.cuts[-1].trained == corpus]
                chosen, measured = _on_its_own_corpus(own, corpus)
                lines = [replace(curve, name=curve.cuts[-1].cut) for curve in chosen if curve.cuts[-1].cut in kept_cuts]
                if not lines:
                    continue
                left = len(own) - len(lines)
                note = f"Measured on {', '.join(measured)}."
                note += f" Trained on {corpus}." if corpus else ""
                note += f" Left out: {left} lines of other test corpora or amounts between these." if left else ""
                drawn.append(_recovery_view((name, recipe, corpora[corpus]), lines, palette, note))
                everything += lines
    return Figure(
        name="recovery",
        keys=palette.keys(everything),
        views=tuple(drawn),
        asks=("What is drawn", "Method and recovery", "Trained on"),
    )


def _on_its_own_corpus(curves: Sequence[Series], corpus: str) -> tuple[list[Series], list[str]]:
    """Curves measured on the corpus of their training, else on each model's first; and what those measures are."""
    measures: dict[str, list[str]] = defaultdict(list)
    for curve in curves:
        measures[curve.setting.model_hash].append(curve.setting.measure)
    chosen = {
        model: next((name for name in sorted(names) if corpus_of(name) == corpus), min(names))
        for model, names in measures.items()
    }
    found = [curve for curve in curves if curve.setting.measure == chosen[curve.setting.model_hash]]
    return found, sorted({corpus_of(name) or name for name in chosen.values()})


def _evenly(names: Sequence[str]) -> list[str]:
    """At most `MOST_LINES` of some names, the first and the last among them."""
    if len(names) <= MOST_LINES:
        return list(names)
    return [names[round(place * (len(names) - 1) / (MOST_LINES - 1))] for place in range(MOST_LINES)]


def _few(curves: Sequence[Series]) -> tuple[list[Series], str]:
    """Recovered curves, at most `MOST_LINES` a panel, and a sentence on those that were left out.

    First go those whose recovery trained on another corpus than the one measured, then those with fewer tokens.
    """
    kept = list(curves)
    reasons: list[str] = []

    def tokens(curve: Series) -> int:
        return max(cut.tokens for cut in curve.cuts)

    most = max(map(tokens, kept), default=0)
    tests: tuple[tuple[str, Callable[[Series], bool]], ...] = (
        ("recoveries that trained on other corpora", lambda c: c.cuts[0].trained == corpus_of(c.setting.measure)),
        (f"those with fewer than {tokens_text(most)} tokens", lambda c: tokens(c) == most),
    )
    for words, passes in tests:
        narrower = [curve for curve in kept if passes(curve)]
        if most_lines(kept) > MOST_LINES and 0 < len(narrower) < len(kept):
            kept = narrower
            reasons.append(words)
    if most_lines(kept) > MOST_LINES:
        names: dict[Setting, list[str]] = defaultdict(list)
        for curve in sorted(kept, key=lambda c: c.name):
            names[curve.setting].append(curve.name)
        kept = [curve for curve in kept if curve.name in names[curve.setting][:MOST_LINES]]
        reasons.append(f"all but {MOST_LINES} of the rest")
    note = f"Left out: {' and '.join(reasons)}; the table and the store have their numbers." if reasons else ""
    return kept, note


@dataclass(frozen=True, kw_only=True)
class _Axis:
    title: str
    format: str
    logarithmic: bool = False


def _loss_axis(low: float, high: float) -> _Axis:
    # Five ticks within a tenth of a nat would have the same two digits.
    return _Axis(title="Loss, nats a token", format=".2f" if high - low >= 0.1 else ".3f")


def reducing(curves: Sequence[Series]) -> list[Series]:
    """Series that take something away: the amounts of a quantizer all lie at zero share removed."""
    return [curve for curve in curves if any(abs(cut.removed) > 1e-9 for cut in curve.cuts)]


_XScale = Callable[[Sequence[Series]], tuple[Callable[[Cut], float], alt.X, tuple[float, float]]]


def _over_share(curves: Sequence[Series]) -> tuple[Callable[[Cut], float], alt.X, tuple[float, float]]:
    shares = [cut.removed for curve in curves for cut in curve.cuts]
    # Some methods add parameters: their marks are whole, too.
    low, high = min(0.0, min(shares) - 0.015), math.ceil(max(shares) * 20 + 0.2) / 20
    axis = alt.Axis(format=".0%", tickCount=5, labelFlush=False)
    encoding = alt.X(
        "x:Q", title="Parameters removed or zeroed", scale=alt.Scale(domain=[low, high], nice=False), axis=axis
    )
    return (lambda cut: cut.removed), encoding, (low, high)


def _over_tokens(curves: Sequence[Series]) -> tuple[Callable[[Cut], float], alt.X, tuple[float, float]]:
    levels = sorted({cut.tokens for curve in curves for cut in curve.cuts if cut.tokens})
    # A logarithmic axis has no zero: the unrecovered cut stands one usual step to the left of the fewest tokens.
    step = (levels[-1] / levels[0]) ** (1 / (len(levels) - 1)) if len(levels) > 1 else 4.0
    zero = levels[0] / step
    shown = levels if len(levels) <= 6 else levels[:: math.ceil(len(levels) / 6)]
    names = {zero: "0"} | {float(level): tokens_text(level) for level in shown}
    texts = " : ".join(f"abs(datum.value / {value!r} - 1) < 0.01 ? {text!r}" for value, text in names.items())
    axis = alt.Axis(values=list(names), labelExpr=f"{texts} : ''", labelOverlap=False, grid=False)
    domain = (zero / step**0.25, levels[-1] * step**0.25)
    scale = alt.Scale(type="log", domain=list(domain), nice=False)
    encoding = alt.X("x:Q", title="Recovery tokens, logarithmic; 0 is the cut itself", scale=scale, axis=axis)
    return (lambda cut: float(cut.tokens or zero)), encoding, domain


def _row(cut: Cut, curve: Series, x: float, subtract: float = 0.0) -> dict[str, Any]:
    percent = 0 <= cut.base <= 1 and cut.setting.kind not in ("loss", "speed")
    text: Callable[[float], str] = (lambda v: share(v, 1)) if percent else (lambda v: f"{v:.4f}")
    row: dict[str, Any] = {
        "series": curve.name,
        "x": _rounded(x),
        "value": _rounded(cut.value - subtract),
        "low": _rounded(cut.low - subtract),
        "high": _rounded(cut.high - subtract),
        "chain": cut.chain,
        "model": cut.setting.model,
        "measured by": cut.setting.measure,
        "protocol": cut.setting.protocol,
        "removed": share(cut.removed, 1) + (" (zeroed)" if cut.zeroed > 0.5 * abs(cut.removed) > 0 else ""),
        "mean": text(cut.value),
        "dense": text(cut.base),
        "change": signed_share(cut.change) if math.isfinite(cut.change) else "",
        "seeds": span(cut.seeds),
    }
    if cut.recovery is not None:
        row["tokens"] = tokens_text(cut.tokens)
    if cut.verdict:
        row["verdict"] = f"{cut.verdict}, {cut.low:.2f} to {cut.high:.2f}"
    return row


def _rounded(value: float) -> float:
    """To six digits: more than a screen shows, and half the size of the page."""
    return float(f"{value:.6g}")


_TOOLTIP = (
    "model",
    "chain",
    "removed",
    "mean",
    "dense",
    "change",
    "verdict",
    "tokens",
    "seeds",
    "measured by",
    "protocol",
)


def _view(
    choices: tuple[str, ...],
    curves: Sequence[Series],
    palette: Palette,
    over: _XScale,
    axis: _Axis,
    domain: tuple[float, float],
    *,
    chances: Mapping[Setting, float] | None = None,
    note: str = "",
) -> View:
    """One chart for each setting, all on the same axes so that they can be compared.

    A logarithmic axis is of the rise over the dense model, any other of the values themselves.
    """
    place, x, x_domain = over(curves)
    panels: list[Panel] = []
    by_setting = {
        setting: [curve for curve in curves if curve.setting == setting]
        for setting in dict.fromkeys(c.setting for c in curves)
    }
    spread_out = any(cut.low < cut.high for curve in curves for cut in curve.cuts)
    for setting, title in panel_names(by_setting).items():
        mine = by_setting[setting]
        values = {} if axis.logarithmic else {"dense": mine[0].cuts[0].base}
        values |= {"chance": chances[setting]} if chances and setting in chances else {}
        references = {
            name: [{"x": x_domain[1], "base": value, "text": f"{name} {_reference_text(value, axis)}"}]
            for name, value in values.items()
        }
        rows, common = _rows(mine, place, axis, domain, spread_out=spread_out)
        columns = tuple(dict.fromkeys(name for row in rows for name in row))
        table = [[row.get(name) for name in columns] for row in rows]
        panels.append(Panel(title=title, columns=columns, rows=table, common=common, references=references))
    return View(
        choices=choices,
        spec=_chart(palette.keys(curves), panels, x, axis, domain, spread_out=spread_out),
        panels=tuple(panels),
        note=note,
    )


def _rows(
    curves: Sequence[Series],
    place: Callable[[Cut], float],
    axis: _Axis,
    domain: tuple[float, float],
    *,
    spread_out: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The marks of a panel, and what they have in common of what a tooltip says."""
    rows = [
        _row(cut, curve, place(cut), cut.base if axis.logarithmic else 0.0) for curve in curves for cut in curve.cuts
    ]
    if axis.logarithmic:
        rows = [row for row in rows if row["value"] > LEAST_DAMAGE]
        for row in rows:
            row["low"] = max(row["low"], domain[0])
    common = {
        name: rows[0][name]
        for name in _TOOLTIP
        if rows and all(name in row and row[name] == rows[0][name] for row in rows)
    }
    dropped = set(common) if spread_out else {*common, "low", "high"}
    return [{name: value for name, value in row.items() if name not in dropped} for row in rows], common


def _reference_text(value: float, axis: _Axis) -> str:
    return share(value) if axis.format.endswith("%") else f"{value:.3f}"


def _chart(
    keys: Sequence[Key],
    panels: Sequence[Panel],
    x: alt.X,
    axis: _Axis,
    domain: tuple[float, float],
    *,
    spread_out: bool,
) -> dict[str, Any]:
    """The specification that some panels share: their data sets are named in it and given by each."""
    pad = 0.08 * (domain[1] - domain[0])  # room for the dense model's label
    scale = (
        alt.Scale(type="log", domain=[domain[0], domain[1] * 1.15], nice=False)
        if axis.logarithmic
        else alt.Scale(domain=[domain[0] - (pad if domain[0] else 0), domain[1] + pad], nice=False, zero=False)
    )
    ticks = alt.Axis(format=axis.format, tickCount=5)

    def vertical(name: str) -> alt.Y:
        return alt.Y(f"{name}:Q", title=axis.title, scale=scale, axis=ticks)

    labels = [key.label for key in keys]
    colour = alt.Color(
        "series:N",
        legend=None,
        # The range is the theme's: one colour for each place in the palette, in order, repeated if need be.
        scale=alt.Scale(domain=labels, range=[f"{{colour:{key.colour}}}" for key in keys]),
    )
    shape = alt.Shape("series:N", legend=None, scale=alt.Scale(domain=labels, range=[key.shape for key in keys]))
    dash = alt.StrokeDash(
        "series:N",
        legend=None,
        scale=alt.Scale(domain=labels, range=[[5, 3] if key.dashed else [1, 0] for key in keys]),
    )
    said = {name for panel in panels for name in (*panel.common, *panel.columns)}
    tooltip = [alt.Tooltip(f"{name}:N", title=name) for name in _TOOLTIP if name in said]
    data = alt.Chart(alt.NamedData(name="cuts")).transform_filter("indexof(shown, datum.series) >= 0")
    line = data.mark_line(clip=True, strokeWidth=1.8).encode(
        x=x, y=vertical("value"), color=colour, strokeDash=dash, order="x:Q"
    )
    spread = data.mark_rule(clip=True, strokeWidth=1.5, opacity=0.5).encode(
        x=x, y=vertical("low"), y2="high:Q", color=colour
    )
    points = data.mark_point(filled=True, size=52, opacity=1, clip=True).encode(
        x=x, y=vertical("value"), color=colour, shape=shape, tooltip=tooltip
    )
    layers: list[alt.Chart] = [line, spread, points] if spread_out else [line, points]
    for name in ("dense", "chance"):
        if any(name in panel.references for panel in panels):
            layers = [*_reference(name, x, vertical("base"), axis), *layers]
    chart = alt.layer(*layers).add_params(alt.param(name="shown", value=labels))
    return chart.properties(width="container", height=HEIGHT, description=f"{axis.title}, by method").to_dict()


def _reference(name: str, x: alt.X, y: alt.Y, axis: _Axis) -> list[alt.Chart]:
    """A value to compare with, such as the dense model's, as a dashed line with its number at the right end."""
    data = alt.Chart(alt.NamedData(name=name))
    rule = data.mark_rule(strokeDash=[4, 4], strokeWidth=1.2, style="reference").encode(y=y)
    # On the side where no curve runs: above the dense model's scores, below its losses and below chance.
    above = axis.format.endswith("%") and name == "dense"
    words = data.mark_text(align="right", dx=-4, dy=-7 if above else 10, fontSize=11, style="reference-label").encode(
        x=x, y=y, text="text:N"
    )
    return [rule, words]
