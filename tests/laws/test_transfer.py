"""From a pool to a new model: no point, one, several; a user's own pool; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mariotte.errors import FitError
from mariotte.laws import priors
from mariotte.laws.base import Point
from mariotte.laws.pool import Pool
from mariotte.laws.published import measurements, points
from mariotte.laws.result import Fit
from mariotte.laws.transfer import Target, learn_with, own_pool, transfer

TARGET = Target(metric="loss", base=2.0, family="slice", ratio_kind="k", protocol="p")


def point(ratio: float, value: float, **changes: Any) -> Point:
    values: dict[str, Any] = {"metric": "loss", "base": 2.0, "family": "slice", "ratio_kind": "k", "protocol": "p"}
    return Point(ratio=ratio, value=value, **{**values, **changes})


def width(fitted: Fit, ratio: float) -> float:
    found = fitted.predict(ratio, level=0.8)
    assert found.lo is not None, found.note
    assert found.hi is not None
    assert found.lo < found.mean < found.hi
    return found.hi - found.lo


def test_each_measurement_narrows_the_interval():
    shots = [(), (point(0.1, 2.08),), (point(0.1, 2.08), point(0.2, 2.2)), tuple(
        point(r, v) for r, v in ((0.1, 2.08), (0.2, 2.2), (0.25, 2.28)))]  # fmt: skip
    widths = [width(transfer(TARGET, own), 0.3) for own in shots]
    assert widths[0] > 1.4 * widths[1] > 2 * 1.4 * widths[2]
    assert widths[2] > widths[3]


def test_without_a_point_it_is_the_familys_curve_and_an_extrapolation():
    fitted = transfer(TARGET)
    assert fitted.report().n_points == 0
    assert fitted.report().remarks[0].startswith("no point of this model is known")
    assert not fitted.predict(0.3).inside_box
    assert fitted.predict(0.0).mean == 2.0
    found = fitted.critical(1.1, level=0.8)
    assert found.status == "beyond_box"
    assert found.r is not None
    assert found.lo is not None
    assert found.hi is not None
    assert found.lo < found.r < found.hi
    assert Fit.from_json(fitted.to_json()) == fitted
    harsher = transfer(replace(TARGET, family="depth"))
    assert harsher.predict(0.3).mean > fitted.predict(0.3).mean


def test_scores_and_recovered_series_transfer_too():
    score = transfer(Target(metric="avg7", base=0.65, family="width", chance=0.36))
    assert 0.36 < score.predict(0.6).mean < score.predict(0.2).mean < 0.65
    recovered = transfer(replace(TARGET, recovered=True))
    assert 2.0 < recovered.predict(0.3).mean < transfer(replace(TARGET, family="width")).predict(0.3).mean


def test_an_unknown_family_is_marked_and_wide():
    fitted = transfer(replace(TARGET, family="origami"))
    assert any("'origami' has no published series" in r for r in fitted.report().remarks)
    assert width(fitted, 0.3) > width(transfer(TARGET), 0.3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "speedup"}, "transfer is for losses and scores, 'speedup' is a speed"),
        ({"base": 0.0}, "the dense value of 'loss' must be positive"),
        ({"base": float("nan")}, "must be finite"),
        ({"metric": "mmlu", "base": 0.27, "chance": 0.25}, r"within 0.05 of chance \(0.25\) and cannot fall"),
        ({"metric": "mmlu", "base": 27.0}, "must be a fraction in"),
    ],
)
def test_targets_that_cannot_be_are_one_sentence(changes: dict[str, Any], said: str):
    with pytest.raises(FitError, match=said) as raised:
        replace(TARGET, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "wiki_ppl"},
        {"protocol": "q"},
        {"ratio_kind": "blocks"},
        {"family": "depth"},
        {"tokens": 5.0, "recovery": "lora"},
    ],
)
def test_points_of_something_else_are_refused(changes: dict[str, Any]):
    with pytest.raises(FitError, match="transfer each alone"):
        transfer(TARGET, [point(0.1, 2.1, **changes)])


def test_a_pool_of_ones_own_moves_the_curve(tmp_path: Path):
    rows = ["model,method,family,ratio,metric,base_value,value,source,protocol"]
    for i in range(6):
        rows += [f"own{i},fold,slice,{r},loss,2.0,{2.0 + 6.0 * r**1.3},here,p" for r in (0.1, 0.2, 0.3, 0.4)]
        rows += [f"own{i},fold,slice,{r},top1,0.9,{0.9 - r},here,p" for r in (0.1, 0.2)]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    pool = own_pool([str(path)])
    assert len(pool) == 36
    assert {p.metric for p in pool} == {"loss", "top1"}
    assert {p.group for p in pool} == {f"own{i} × slice" for i in range(6)}
    learned = learn_with(pool)
    before, after = transfer(TARGET).predict(0.3).mean, transfer(TARGET, priors=learned).predict(0.3).mean
    assert after > before + 0.1  # worse than anything published with slicing, and most of the clusters are not its own
    assert learned.hash != priors.frozen().hash
    own_alone = learn_with(pool, shipped=False)
    assert own_alone.curves["perplexity"]["slice"].clusters == 6
    assert transfer(TARGET, priors=own_alone).predict(0.3).mean == pytest.approx(2.0 + 6.0 * 0.3**1.3, rel=0.1)


def test_a_pool_without_losses_or_scores_is_refused(tmp_path: Path):
    path = tmp_path / "speeds.csv"
    path.write_text("model,method,ratio,metric,base_value,value\nm,cut,0.1,speedup,1.0,1.1\n", encoding="utf-8")
    with pytest.raises(FitError, match="has no loss and no score"):
        own_pool([str(path)])


def test_files_that_hold_no_priors_are_one_sentence(tmp_path: Path):
    with pytest.raises(FitError, match="is none"):
        priors.read(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FitError, match="has none: learn again"):
        priors.read(tmp_path / "other.json")


def test_one_mild_measurement_halves_the_error_on_published_series():
    """Zero- and one-shot to the perplexities of a model, with priors without its cluster, on its next two ratios."""
    own = [p for p in points() if p.model == "OPT-13B" and p.method == "SliceGPT" and p.metric == "wikitext2_ppl"]
    pool = Pool(points())
    law = pool.priors(lambda cluster: cluster == own[0].group)
    first = own[0]
    target = Target(metric=first.metric, base=first.base, family=first.family, ratio_kind=first.ratio_kind,
                    protocol=first.protocol)  # fmt: skip
    ordered = sorted(own, key=lambda p: p.ratio)
    errors = [
        sum(abs(transfer(target, ordered[:k], priors=law).predict(p.ratio).mean - p.value) for p in ordered[1:])
        for k in (0, 1)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_every_table_that_ships_can_be_read_as_a_pool(tmp_path: Path):
    rows = measurements("wanda_student_retest")
    path = tmp_path / "t.csv"
    path.write_text(
        "\n".join([",".join(rows[0]), *(",".join(f'"{v}"' for v in r.values()) for r in rows)]) + "\n",
        encoding="utf-8",
    )
    assert len(own_pool([str(path)])) == len(rows)
