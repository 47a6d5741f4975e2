"""The figures of the page: Vega-Lite specifications, one small chart for each model, in views that a reader can switch.

A specification holds no colours of its own: series take theirs from the category range of the page's theme, by their
place in a list that is the same for every figure, so that a method keeps its colour throughout and in the dark too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from mariotte.report.series import Cut, Series, Setting, panel_names, share, signed_share, span, tokens_text

HEIGHT = 250
"""Of one chart, pixels; the width is that of its container."""

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
"""Second mark of a series beside its colour, for readers who cannot tell the colours apart."""

LEAST_DAMAGE = 1e-3
"""Smallest rise of the loss in nats that the logarithmic view draws; below it seeds decide; chosen by us."""

TALLEST = 3.0
"""The linear view ends at this multiple of the largest dense loss: beyond it all models are useless; chosen by us."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: heading, and the specification."""

    title: str
    spec: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of looking at a figure's data.

    Parameters
    ----------
    name : on the button that selects it
    note : a sentence below the figure while it is shown
    """

    name: str
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
    """Views of the same data, and a legend that hides and shows series."""

    name: str
    keys: tuple[Key, ...]
    views: tuple[View, ...] = field(default=())


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
            self._keys[name] = Key(label=name, colour=place, shape=SHAPES[place % len(SHAPES)])
        for name, origin in recovered.items():
            place = len(self._keys)
            self._keys[name] = Key(label=name, colour=colours[origin], shape=SHAPES[place % len(SHAPES)], dashed=True)

    def keys(self, curves: Iterable[Series]) -> tuple[Key, ...]:
        """The legend of some curves, in the page's order."""
        present = {curve.name for curve in curves}
        return tuple(key for name, key in self._keys.items() if name in present)


def loss_figure(plain: Sequence[Series], recovered: Sequence[Series], palette: Palette) -> Figure:
    """Loss against the share removed: in nats, as rise over the dense model (logarithmic), and after recovery."""
    views: list[View] = []
    for name, curves in (("Loss", reducing(plain)), ("After recovery", reducing(recovered))):
        everything = [cut for curve in curves for cut in curve.cuts]
        if not everything:
            continue
        ceiling = min(max(cut.high for cut in everything), TALLEST * max(cut.base for cut in everything))
        floor = min(min(cut.low, cut.base) for cut in everything)
        above = sum(cut.value > ceiling for cut in everything)
        axis = _Axis(title="Loss, nats a token", format=".2f")
        panels = _panels(curves, palette, _over_share, "value", axis, (floor, ceiling))
        views.append(View(name=name, panels=panels, note=f"Above the frame: {above} collapsed." if above else ""))
    rising = [cut for curve in reducing(plain) for cut in curve.cuts if cut.value - cut.base > LEAST_DAMAGE]
    if rising:
        hidden = sum(cut.value - cut.base <= LEAST_DAMAGE for curve in reducing(plain) for cut in curve.cuts)
        axis = _Axis(title="Rise of the loss, nats a token", format="~g", logarithmic=True)
        domain = (0.8 * min(cut.value - cut.base for cut in rising), max(cut.high - cut.base for cut in rising))
        panels = _panels(reducing(plain), palette, _over_share, "rise", axis, domain)
        note = f"Left out: {hidden} with a rise below {LEAST_DAMAGE} nats." if hidden else ""
        views.insert(1, View(name="Rise, logarithmic", panels=panels, note=note))
    return Figure(name="loss", keys=palette.keys([*reducing(plain), *reducing(recovered)]), views=tuple(views))


def facts_figure(views: Mapping[str, Sequence[Series]], palette: Palette) -> Figure:
    """Share of facts known against the share removed; one view for each named metric."""
    drawn: list[View] = []
    for name, found in views.items():
        curves = reducing(found)
        if curves:
            axis = _Axis(title="Facts known, top-1", format=".0%")
            drawn.append(View(name=name, panels=_panels(curves, palette, _over_share, "value", axis, (0.0, 1.0))))
    everything = [curve for found in views.values() for curve in reducing(found)]
    return Figure(name="facts", keys=palette.keys(everything), views=tuple(drawn))


def recovery_figure(views: Mapping[str, Sequence[Series]], palette: Palette) -> Figure:
    """Loss, facts ... against recovery tokens after one cut; a view named ``Facts known`` has a percentage axis."""
    drawn: list[View] = []
    for name, curves in views.items():
        everything = [cut for curve in curves for cut in curve.cuts]
        percent = name.startswith("Facts")
        low, high = min(min(c.low, c.base) for c in everything), max(max(c.high, c.base) for c in everything)
        axis = _Axis(
            title="Facts known, top-1" if percent else "Loss, nats a token", format=".0%" if percent else ".2f"
        )
        range_ = (0.0, 1.0) if percent else (low, high)
        drawn.append(View(name=name, panels=_panels(curves, palette, _over_tokens, "value", axis, range_)))
    everything = [curve for curves in views.values() for curve in curves]
    return Figure(name="recovery", keys=palette.keys(everything), views=tuple(drawn))


@dataclass(frozen=True, kw_only=True)
class _Axis:
    title: str
    format: str
    logarithmic: bool = False


def reducing(curves: Sequence[Series]) -> list[Series]:
    """Series that take something away: the amounts of a quantizer all lie at zero share removed."""
    return [curve for curve in curves if any(abs(cut.removed) > 1e-9 for cut in curve.cuts)]


_XScale = Callable[[Sequence[Series]], tuple[Callable[[Cut], float], alt.X, tuple[float, float]]]


def _over_share(curves: Sequence[Series]) -> tuple[Callable[[Cut], float], alt.X, tuple[float, float]]:
    shares = [cut.removed for curve in curves for cut in curve.cuts]
    low, high = min(0.0, *shares), math.ceil(max(shares) * 20 + 0.2) / 20
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
    encoding = alt.X("x:Q", title="Recovery tokens (logarithmic; 0 = cut, not recovered)", scale=scale, axis=axis)
    return (lambda cut: float(cut.tokens or zero)), encoding, domain


def _row(cut: Cut, curve: Series, x: float) -> dict[str, Any]:
    percent = 0 <= cut.base <= 1 and cut.setting.kind != "loss"
    text: Callable[[float], str] = (lambda v: share(v, 1)) if percent else (lambda v: f"{v:.4f}")
    row: dict[str, Any] = {
        "series": curve.name,
        "x": x,
        "value": cut.value,
        "rise": cut.value - cut.base,
        "low": cut.low,
        "high": cut.high,
        "rise_low": cut.low - cut.base,
        "rise_high": cut.high - cut.base,
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
    return row


_TOOLTIP = ("model", "chain", "removed", "mean", "dense", "change", "tokens", "seeds", "measured by", "protocol")


def _panels(
    curves: Sequence[Series],
    palette: Palette,
    over: _XScale,
    field_: str,
    axis: _Axis,
    domain: tuple[float, float],
) -> tuple[Panel, ...]:
    """One chart for each setting, all on the same axes so that they can be compared."""
    place, x, x_domain = over(curves)
    names = panel_names(curve.setting for curve in curves)
    panels: list[Panel] = []
    for setting, title in names.items():
        mine = [curve for curve in curves if curve.setting == setting]
        panels.append(Panel(title=title, spec=_chart(setting, mine, palette, place, x, x_domain, field_, axis, domain)))
    return tuple(panels)


def _chart(
    setting: Setting,
    curves: Sequence[Series],
    palette: Palette,
    place: Callable[[Cut], float],
    x: alt.X,
    x_domain: tuple[float, float],
    field_: str,
    axis: _Axis,
    domain: tuple[float, float],
) -> dict[str, Any]:
    keys = palette.keys(curves)
    rows = [_row(cut, curve, place(cut)) for curve in curves for cut in curve.cuts]
    if axis.logarithmic:
        rows = [row for row in rows if row[field_] > LEAST_DAMAGE]
        for row in rows:
            row["rise_low"] = max(row["rise_low"], domain[0])
    base = curves[0].cuts[0].base
    pad = 0.08 * (domain[1] - domain[0])  # room for the dense model's label
    scale = (
        alt.Scale(type="log", domain=[domain[0], domain[1] * 1.15], nice=False)
        if axis.logarithmic
        else alt.Scale(domain=[domain[0] - (pad if domain[0] else 0), domain[1] + pad], nice=False, zero=False)
    )
    ticks = alt.Axis(format=axis.format, tickCount=5)
    y = alt.Y(f"{field_}:Q", title=axis.title, scale=scale, axis=ticks)
    low, high = ("rise_low", "rise_high") if field_ == "rise" else ("low", "high")
    colour = alt.Color(
        "series:N",
        legend=None,
        # The range is the theme's: one colour for each place in the palette, in order, repeated if need be.
        scale=alt.Scale(domain=[key.label for key in keys], range=[f"{{colour:{key.colour}}}" for key in keys]),
    )
    shape = alt.Shape(
        "series:N",
        legend=None,
        scale=alt.Scale(domain=[key.label for key in keys], range=[key.shape for key in keys]),
    )
    shown = alt.param(name="shown", value=[key.label for key in keys])
    visible = "indexof(shown, datum.series) >= 0"
    data = alt.Chart(alt.InlineData(values=rows)).transform_filter(visible)
    tooltip = [alt.Tooltip(f"{name}:N", title=name) for name in _TOOLTIP if any(name in row for row in rows)]
    order = alt.Order("x:Q")
    spread = data.mark_rule(clip=True, strokeWidth=1.5, opacity=0.5).encode(
        x=x, y=alt.Y(f"{low}:Q", title=axis.title, scale=scale, axis=ticks), y2=f"{high}:Q", color=colour
    )
    dash = alt.StrokeDash(
        "series:N",
        legend=None,
        scale=alt.Scale(domain=[key.label for key in keys], range=[[5, 3] if key.dashed else [1, 0] for key in keys]),
    )
    line = data.mark_line(clip=True, strokeWidth=1.8).encode(x=x, y=y, color=colour, strokeDash=dash, order=order)
    points = data.mark_point(filled=True, size=52, opacity=1, clip=True).encode(
        x=x, y=y, color=colour, shape=shape, tooltip=tooltip
    )
    layers: list[alt.Chart] = [line, spread, points]
    if not axis.logarithmic:
        layers = [*_dense(base, setting, x_domain, x, scale, axis, ticks), *layers]
    chart = (
        alt.layer(*layers)
        .add_params(shown)
        .properties(width="container", height=HEIGHT, description=f"{axis.title} of {setting.model} by method")
    )
    return chart.to_dict()


def _dense(
    base: float,
    setting: Setting,
    x_domain: tuple[float, float],
    x: alt.X,
    scale: alt.Scale,
    axis: _Axis,
    ticks: alt.Axis,
) -> list[alt.Chart]:
    """The dense model's value as a dashed line with its number at the right end."""
    text = share(base) if axis.format.endswith("%") else f"{base:.3f}"
    row = {
        "x": x_domain[1],
        "base": base,
        "text": f"dense {text}",
        "model": setting.model,
        "protocol": setting.protocol,
    }
    data = alt.Chart(alt.InlineData(values=[row]))
    y = alt.Y("base:Q", title=axis.title, scale=scale, axis=ticks)
    rule = data.mark_rule(strokeDash=[4, 4], strokeWidth=1.2, style="reference").encode(y=y)
    # On the side where no curve runs: above the line for scores, below it for losses.
    above = axis.format.endswith("%")
    words = data.mark_text(align="right", dx=-4, dy=-7 if above else 10, fontSize=11, style="reference-label").encode(
        x=x, y=y, text="text:N"
    )
    return [rule, words]
