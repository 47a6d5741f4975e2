"""How well does the default law predict what it has not seen? The published hold-out, with nothing of a cluster known.

    python benchmarks/laws_holdout.py [--nested] [--write benchmarks/results/laws_holdout.md]

Every prior of the family law, and every calibration of its intervals, is learned without the cluster (base model ×
family, over all sources) of the series that it predicts. `--nested` also chooses its hyper-parameters without that
cluster, which takes minutes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mariotte import __version__
from mariotte.errors import FitError
from mariotte.laws.analysis import analyse
from mariotte.laws.axes import DEFAULTS, Settings, scale_of
from mariotte.laws.base import Law, Point, values
from mariotte.laws.catalogue import LAWS, find
from mariotte.laws.forms.family import Family
from mariotte.laws.learning import Missed, coverage, half_width, laws_without, learn, missed, strict
from mariotte.laws.pool import Pool
from mariotte.laws.published import points
from mariotte.laws.validation import Fold, HoldOut, cluster_ratio, folds, predicted, protocol_series, rolling

BESIDE = ("family", "pruning-law", "line", "compression-law", "persist")
GRID: Mapping[str, Sequence[float]] = {
    "floor": (0.004, 0.008, 0.016),
    "slope": (0.3, 0.45, 0.7),
    "smooth": (0.12, 0.25, 0.5),
    "bend": (0.06, 0.12, 0.24),
}

Rows = list[tuple[str, int, str, dict[str, float], dict[str, float]]]


def errors(held_out: HoldOut, laws: Sequence[str], *, all_ratios: bool = False) -> Rows:
    """Family, k, cluster, RMSE by law, and error of the next step by law, of every fold."""
    found: dict[tuple[object, int], list] = {}
    for row in held_out.rows:
        if all_ratios or row.point.before_collapse:
            found.setdefault((row.point.series, row.k), []).append(row)
    rows: Rows = []
    for (_, k), own in found.items():
        rms = {
            law: math.sqrt(np.mean([(r.predictions[law] - r.point.value) ** 2 for r in own]))
            for law in laws
            if all(law in r.predictions for r in own)
        }
        following = {
            law: abs(r.predictions[law] - r.point.value) for r in own if r.step == 1 for law in laws if law in rms
        }
        rows.append((own[0].point.family or "", k, own[0].point.group, rms, following))
    return rows


def table(rows: Rows, laws: Sequence[str]) -> list[str]:
    """Mean / median by group, one row a law."""
    groups: list[tuple[str, Callable[[str, int], bool]]] = [("all", lambda f, k: True)]
    for name in sorted({r[0] for r in rows}):
        groups.append((name, lambda f, k, own=name: f == own))
    for low, high in ((2, 2), (3, 3), (4, 4), (5, 99)):
        label = f"k = {low}" if low == high else f"k ≥ {low}"
        groups.append((label, lambda f, k, low=low, high=high: low <= k <= high))
    counts = [sum(1 for r in rows if keep(r[0], r[1])) for _, keep in groups]
    lines = ["| law | " + " | ".join(f"{g} ({n})" for (g, _), n in zip(groups, counts, strict=True)) + " | next step |"]
    lines.append("|" + "---|" * (len(groups) + 2))
    for law in laws:
        cells = []
        for _, keep in groups:
            own = [r[3][law] for r in rows if keep(r[0], r[1]) and law in r[3]]
            n = sum(1 for r in rows if keep(r[0], r[1]))
            mark = "" if len(own) == n else f" on {len(own)}"
            cells.append(f"{np.mean(own):.3f} / {np.median(own):.3f}{mark}" if own else "-")
        own = [r[4][law] for r in rows if law in r[4]]
        cells.append(f"{np.mean(own):.3f} / {np.median(own):.3f}" if own else "-")
        lines.append(f"| {law} | " + " | ".join(cells) + " |")
    return lines


def pooled(series: Sequence[Sequence[Point]]) -> Callable[[Law, Fold], Law]:
    """Odds with the exponent of at least three other series of its family, as the protocol has it."""
    from mariotte.laws.forms.odds_pooled import OddsPooled

    def prepare(law: Law, fold: Fold) -> Law:
        if not isinstance(law, OddsPooled):
            return law
        first = fold.train[0]
        others = [
            own
            for own in series
            if own[0].family == first.family
            and scale_of(own[0].metric) == scale_of(first.metric)
            and (own[0].model, own[0].method) != (first.model, first.method)
        ]
        if len(others) < 3:
            raise FitError("fewer than three other series")
        return OddsPooled.of(others)

    return prepare


def merged(one: HoldOut, other: HoldOut) -> HoldOut:
    """The predictions of two hold-outs of the same points."""
    rows = tuple(
        replace(a, predictions={**a.predictions, **b.predictions}) for a, b in zip(one.rows, other.rows, strict=True)
    )
    return replace(one, laws=(*one.laws, *other.laws), rows=rows)


def half(level_rows: Sequence[tuple[Missed, float | None]], laws: Mapping[str, Family]) -> tuple[str, str, str]:
    """Covered share with its binomial interval, and median half-width."""
    known = [(r, k) for r, k in level_rows if k is not None]
    if len(known) < 100 or len({r.point.group for r, _ in known}) < 5:
        return f"{len(known)}", "not calibrated", "-"
    inside = [r.by <= k for r, k in known]
    share, n = float(np.mean(inside)), len(inside)
    spread = 1.96 * math.sqrt(share * (1 - share) / n)
    widths = [half_width(laws[r.point.group], r, k) for r, k in known]
    return f"{n}", f"{share:.1%} ({share - spread:.1%} to {share + spread:.1%})", f"{np.median(widths):.3f}"


def nested(pool_points: Sequence[Point], series: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Mean and median error when the hyper-parameters, too, are chosen without the cluster, strictly."""
    losses = [p for p in pool_points if p.kind == "loss"]
    clusters = sorted({s[0].group for s in series})
    cuts = {c: [f for s in series if s[0].group == c for f in folds(s)] for c in clusters}

    def rms(law: Family, own: Sequence[Fold]) -> list[float]:
        found = []
        for fold in own:
            kept = np.array([p.before_collapse for p in fold.test])
            if kept.any():
                miss = (predicted(law, fold.train, fold.test) - values(fold.test))[kept]
                found.append(float(np.sqrt(np.mean(miss**2))))
        return found

    best: dict[str, tuple[float, Mapping[str, Settings]]] = {}
    for floor, slope, smooth, bend in itertools.product(*GRID.values()):
        own = DEFAULTS["perplexity"]
        sd = (own.family_sd[0], own.family_sd[1], bend)
        chosen = {**DEFAULTS, "perplexity": replace(own, floor=floor, slope=slope, smooth=smooth, family_sd=sd)}
        pool = Pool(losses, chosen)
        inner: dict[tuple[str, str], list[float]] = {}
        for one, other in itertools.combinations(clusters, 2):
            law = Family(pool.priors(lambda c, left=(one, other): c in left))
            inner[one, other], inner[other, one] = rms(law, cuts[other]), rms(law, cuts[one])
        for cluster in clusters:
            score = float(np.mean([e for other in clusters if other != cluster for e in inner[cluster, other]]))
            if cluster not in best or score < best[cluster][0]:
                best[cluster] = (score, chosen)
    outer: list[float] = []
    for cluster in clusters:
        pool = Pool(losses, best[cluster][1])
        outer += rms(Family(pool.priors(lambda c, left=cluster: c == left)), cuts[cluster])
    return float(np.mean(outer)), float(np.median(outer))


def thousand() -> tuple[float, float]:
    """Seconds (wall, processor) of `analyse` on 1,000 points: hold-out, one fit a series, intervals."""
    generator = np.random.default_rng(0)
    records = [
        Point(
            value=2.0 + 1.3 * math.exp(0.2 * generator.standard_normal()) * (r / (1 - r)) ** 1.4,
            base=2.0,
            ratio=r,
            ratio_kind="parameters",
            metric="loss",
            protocol="p",
            model=f"m{i}",
            method="slice",
            family="slice",
        )
        for i in range(100)
        for r in np.linspace(0.05, 0.5, 10).tolist()
    ]
    wall, processor = time.perf_counter(), time.process_time()
    found = analyse(records, by="series")
    assert len(found.fits) == 100
    assert all(ratio.lo is not None for ratio in found.critical.values())
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nested", action="store_true", help="also choose hyper-parameters without the cluster")
    parser.add_argument("--write", type=Path, help="file to write the page to")
    options = parser.parse_args()
    start = time.process_time()
    known = points()
    pool = Pool(known)
    series = protocol_series(known)
    out: list[str] = []
    beside = [*BESIDE, *(["odds-pooled"] if "odds-pooled" in LAWS.names() else [])]
    for scale, title in (("perplexity", "ln perplexity, nats"), ("score", "accuracy"), ("answer", "answers, nats")):
        own = [p for s in series if scale_of(s[0].metric) == scale for p in s]
        of_scale = [s for s in series if scale_of(s[0].metric) == scale]
        names = [n for n in beside if own[0].kind in find(n).metric_kinds]
        if scale == "score" and "chance-pruning-law" in LAWS.names():
            names.append("chance-pruning-law")
        held_out = strict(own, [n for n in names if n != "odds-pooled"], pool)
        if "odds-pooled" in names:
            held_out = merged(held_out, rolling(own, ["odds-pooled"], prepare=pooled(of_scale)))
        out += [f"## {title}: {len(of_scale)} series, {len({p.group for p in own})} clusters", ""]
        out += [
            "Before collapse, RMSE of a fold, mean / median over folds:",
            "",
            *table(errors(held_out, names), names),
        ]
        out += ["", "All ratios:", "", *table(errors(held_out, names, all_ratios=True), names), ""]
        for other in ("pruning-law", "line"):
            ratio, low, high = cluster_ratio(held_out, "family", other)
            out.append(f"family ÷ {other}, means: {ratio:.3f}, 95 % cluster bootstrap {low:.3f} to {high:.3f}.")
        out.append("")
    rows = list(missed(pool))
    laws = laws_without(pool, (r.point.group for r in rows))
    out += [
        "## Intervals",
        "",
        "Priors and calibration without the cluster. Half-widths are medians, in nats or as a fraction.",
        "",
    ]
    out += ["| scale | of | level | points | covered (binomial 95 %) | half-width |", "|---|---|---|---|---|---|"]
    kinds: list[tuple[str, Callable[[Missed], bool]]] = [
        ("protocol, before collapse", lambda r: r.n_ratios >= 4 and r.k >= 2 and r.point.before_collapse),
        ("protocol, all ratios", lambda r: r.n_ratios >= 4 and r.k >= 2),
        ("all series, no point known", lambda r: r.k == 0),
        ("all series, one point known", lambda r: r.k == 1),
        ("all series, two or more", lambda r: r.k >= 2),
    ]
    for level in (0.8, 0.9):
        covered = coverage(rows, level)
        for scale in ("perplexity", "score", "answer"):
            for name, keep in kinds:
                n, share, width = half(
                    [c for c in covered if scale_of(c[0].point.metric) == scale and keep(c[0])], laws
                )
                out.append(f"| {scale} | {name} | {level:.0%} | {n} | {share} | {width} |")
    out.append("")
    if options.nested:
        text = [s for s in series if scale_of(s[0].metric) == "perplexity"]
        mean, median = nested(known, text)
        out += [
            "## Nested",
            "",
            f"Hyper-parameters ({math.prod(map(len, GRID.values()))} settings of floor, slope, smooth and bend) chosen "
            f"without the cluster, too: {mean:.3f} / {median:.3f} before collapse.",
            "",
        ]
    begun = time.process_time()
    learn(known)
    learned = time.process_time() - begun
    wall, processor = thousand()
    out += [
        "## Speed",
        "",
        f"1,000 records in 100 series: hold-out, 100 fits and critical ratios with intervals in {wall:.2f} s "
        f"({processor:.2f} s of the processor). Learning priors and calibration from all {len(known)} points: "
        f"{learned:.2f} s of the processor. All of this page: {time.process_time() - start:.0f} s.",
        "",
    ]
    head = [
        "# Hold-out of the default law on published series",
        "",
        f"`python benchmarks/laws_holdout.py{' --nested' if options.nested else ''}`. Mariotte {__version__}, numpy "
        f"{np.__version__}, Python {platform.python_version()}, one thread of two shared CPU cores, "
        f"{time.strftime('%Y-%m-%d')}. Priors and intervals of the family law know nothing of the cluster (base model "
        "× family, over all sources) that is predicted. Its settings were chosen on the same series: see Nested.",
        "",
        "odds-pooled learns its exponent from other model × method of its family, as the protocol has it, on the folds "
        "for which there are three such series.",
        "",
    ]
    page = "\n".join([*head, *out])
    print(page)
    if options.write is not None:
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
