"""The figures of the page: which series each of them draws, in views that a reader can switch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mariotte.report.chart import LEAST_DAMAGE, Axis, Figure, Palette, View, over_share, over_tokens, view_of
from mariotte.report.series import (
    Series,
    Setting,
    by_measure,
    corpus_of,
    most_lines,
    recipe_of,
    short_names,
    tokens_text,
)

TALLEST = 3.0
"""The linear view ends at this multiple of the largest dense loss: beyond it all models are useless; chosen by us."""

MOST_LINES = 8
"""Lines that a panel holds: as many as there are colours, and more cannot be told apart; chosen by us."""


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
    return view_of(
        (name, corpus), curves, palette, over_share, axis, (floor, ceiling), note=" ".join(filter(None, notes))
    )


def _rise_view(corpus: str, curves: Sequence[Series], palette: Palette) -> list[View]:
    everything = [cut for curve in curves for cut in curve.cuts]
    rising = [cut for cut in everything if cut.value - cut.base > LEAST_DAMAGE]
    if not rising:
        return []
    hidden = len(everything) - len(rising)
    axis = Axis(title="Rise of the loss, nats a token", format="~g", logarithmic=True)
    domain = (0.8 * min(cut.value - cut.base for cut in rising), max(cut.high - cut.base for cut in rising))
    note = f"Left out: {hidden} with a rise below {LEAST_DAMAGE} nats." if hidden else ""
    return [view_of(("Rise, logarithmic", corpus), curves, palette, over_share, axis, domain, note=note)]


def facts_figure(views: Mapping[str, Sequence[Series]], palette: Palette) -> Figure:
    """Share of facts known against the share removed; one view for each named metric."""
    drawn: list[View] = []
    everything: list[Series] = []
    for name, found in views.items():
        for measured, curves in by_measure(reducing(found)).items():
            kept, note = _few(curves) if any(c.cuts[0].recovery for c in curves) else (curves, "")
            if kept:
                axis = Axis(title="Facts known, top-1", format=".0%")
                drawn.append(view_of((name, measured), kept, palette, over_share, axis, (0.0, 1.0), note=note))
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
    axis = Axis(title="Accuracy", format=".0%")
    for (task, state), found in views.items():
        curves = reducing(found)
        kept, note = _few(curves) if any(c.cuts[0].recovery for c in curves) else (curves, "")
        if not kept:
            continue
        own = {setting: chance for (setting, metric), chance in chances.items() if metric == metrics[task]}
        drawn.append(view_of((task, state), kept, palette, over_share, axis, (0.0, 1.0), chances=own, note=note))
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
        axis = Axis(title="S, times as fast as dense", format=".2f")
        # Intervals of few rounds can be very wide: the marks fill the panel, a stroke may end beyond it.
        domain = (0.9 * min(1.0, *values), 1.1 * max(1.0, *values))
        drawn.append(view_of((name,), curves, palette, over_share, axis, domain))
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
        axis = Axis(title="Facts known, top-1" if choices[0].startswith("Facts") else "Accuracy", format=".0%")
        domain = (0.0, 1.0)
    return view_of(choices, curves, palette, over_tokens, axis, domain, note=note)


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


def _loss_axis(low: float, high: float) -> Axis:
    # Five ticks within a tenth of a nat would have the same two digits.
    return Axis(title="Loss, nats a token", format=".2f" if high - low >= 0.1 else ".3f")


def reducing(curves: Sequence[Series]) -> list[Series]:
    """Series that take something away: the amounts of a quantizer all lie at zero share removed."""
    return [curve for curve in curves if any(abs(cut.removed) > 1e-9 for cut in curve.cuts)]
