"""How a figure is drawn: a Vega-Lite specification a view, with one small chart for each model.

A specification holds no colours of its own: series take theirs from the category range of the page's theme, by their
place in a list that is the same for every figure, so that a method keeps its colour throughout and in the dark too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from mariotte.report.series import (
    Cut,
    Series,
    Setting,
    panel_names,
    share,
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


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What stands on the vertical axis, how its numbers are written, and whether its scale is logarithmic."""

    title: str
    format: str
    logarithmic: bool = False


_XScale = Callable[[Sequence[Series]], tuple[Callable[[Cut], float], alt.X, tuple[float, float]]]


def over_share(curves: Sequence[Series]) -> tuple[Callable[[Cut], float], alt.X, tuple[float, float]]:
    """Over the share removed: where a cut stands, the encoding, and the ends of the axis."""
    shares = [cut.removed for curve in curves for cut in curve.cuts]
    # Some methods add parameters: their marks are whole, too.
    low, high = min(0.0, min(shares) - 0.015), math.ceil(max(shares) * 20 + 0.2) / 20
    axis = alt.Axis(format=".0%", tickCount=5, labelFlush=False)
    encoding = alt.X(
        "x:Q", title="Parameters removed or zeroed", scale=alt.Scale(domain=[low, high], nice=False), axis=axis
    )
    return (lambda cut: cut.removed), encoding, (low, high)


def over_tokens(curves: Sequence[Series]) -> tuple[Callable[[Cut], float], alt.X, tuple[float, float]]:
    """Over recovery tokens, likewise."""
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


def view_of(
    choices: tuple[str, ...],
    curves: Sequence[Series],
    palette: Palette,
    over: _XScale,
    axis: Axis,
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
    axis: Axis,
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


def _reference_text(value: float, axis: Axis) -> str:
    return share(value) if axis.format.endswith("%") else f"{value:.3f}"


def _chart(
    keys: Sequence[Key],
    panels: Sequence[Panel],
    x: alt.X,
    axis: Axis,
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


def _reference(name: str, x: alt.X, y: alt.Y, axis: Axis) -> list[alt.Chart]:
    """A value to compare with, such as the dense model's, as a dashed line with its number at the right end."""
    data = alt.Chart(alt.NamedData(name=name))
    rule = data.mark_rule(strokeDash=[4, 4], strokeWidth=1.2, style="reference").encode(y=y)
    # On the side where no curve runs: above the dense model's scores, below its losses and below chance.
    above = axis.format.endswith("%") and name == "dense"
    words = data.mark_text(align="right", dx=-4, dy=-7 if above else 10, fontSize=11, style="reference-label").encode(
        x=x, y=y, text="text:N"
    )
    return [rule, words]
