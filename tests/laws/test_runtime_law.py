from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mariotte.cli.main import app
from mariotte.errors import FitError
from mariotte.laws import analysis
from mariotte.laws.base import LIMITS, Inputs, Point, collapsed, metric_kind, metric_unit
from mariotte.laws.catalogue import find
from mariotte.laws.fitting import fit
from mariotte.laws.forms.runtime_law import RuntimeLaw
from mariotte.laws.points import from_records
from mariotte.laws.validation import rolling
from mariotte.store.sql import open_store
from mariotte.testing.stores import make_record

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def timed(beta: float, level: float = 1.0, noise: float = 0.0, seed: int = 0, **fields: object) -> list[Point]:
    generator = np.random.default_rng(seed)
    made: dict[str, object] = {"base": 1.0, "ratio_kind": "parameters", "metric": "speedup_decode", "protocol": "p"}
    made |= {"model": "M", "method": "cut"} | fields
    return [
        Point(ratio=r, value=level * (1 + r) ** beta * math.exp(noise * generator.standard_normal()), **made)
        for r in RATIOS
    ]


def test_it_finds_the_exponents_that_the_paper_prints():
    # The paper's S is a time: a speed-up has the opposite exponent.
    for beta in (0.21, 1.93, 0.67):
        fitted = fit("runtime-law", timed(beta))
        assert fitted.theta == pytest.approx([1.0, beta])
        time_left = 1 / fitted.predict(0.9).mean
        assert time_left == pytest.approx(1.9**-beta)


def test_by_hand():
    # Two points determine it: S(0.25) = 1.25 and S(1 - tiny) would be 2 for C = β = 1.
    theta = np.array([1.1, 2.0])
    assert RuntimeLaw().f(theta, Inputs.at(1.0, 0.5, 0.0)) == pytest.approx([1.1 * 2.25])
    assert RuntimeLaw().f(theta, Inputs.at(40.0, 0.5, 0.0)) == pytest.approx([40 * 1.1 * 2.25])  # tokens a second
    assert RuntimeLaw().invert(theta, 1.1 * 2.25, 1.0, 0.0) == pytest.approx(0.5)
    assert RuntimeLaw().invert(np.array([1.0, 0.0]), 2.0, 1.0, 0.0) is None


def test_the_hold_out_compares_it_with_the_naive_and_with_no_law_of_losses():
    found = rolling([p for seed in range(3) for p in timed(1.5, noise=0.01, seed=seed, model=str(seed))])
    assert found.kind == "speed"
    assert found.laws == ("line", "persist", "runtime-law")
    scores = {s.law: s.mean for s in found.scores()}
    assert scores["runtime-law"] < scores["persist"]


def test_a_whole_analysis():
    points = [p for seed in range(5) for p in timed(1.0, noise=0.01, seed=seed, model=str(seed))]
    found = analysis.analyse(points, law="runtime-law")
    critical = found.critical[""]
    assert critical.status == "beyond_box"  # 5 % faster is reached before the mildest ratio that was timed
    assert critical.r == pytest.approx(0.05, abs=0.02)
    middle = found.fits[""].predict(0.5, level=0.8)
    assert middle.lo is not None
    assert middle.hi is not None
    assert middle.lo < 1.5 < middle.hi
    assert not found.left_out  # however fast, nothing is beyond collapse
    assert json.dumps(found.to_dict())
    again = found.fits[""].from_json(found.fits[""].to_json())
    assert again == found.fits[""]


def test_the_ratio_at_which_a_model_is_faster_by_half():
    assert fit("runtime-law", timed(1.0)).critical(1.5).r == pytest.approx(0.5)
    never = fit("runtime-law", timed(0.2)).critical(1.5)
    assert never.status == "unreachable"
    with pytest.raises(FitError, match=r"sigma must be above 1 for a speed, got 0\.95"):
        fit("runtime-law", timed(1.0)).critical(0.95)


def test_a_model_that_gets_slower_is_said_to():
    fitted = fit("runtime-law", timed(-0.3))
    assert any("made the model slower" in remark for remark in fitted.report().remarks)
    assert fitted.critical(1.05).status == "not_identified"
    assert "the fitted speed falls as more is removed" in fitted.critical(1.05).note


def test_noise_alone_has_no_exponent():
    fitted = fit("runtime-law", timed(0.0, noise=0.03, seed=1))
    assert fitted.critical(1.05).status == "not_identified"
    assert "contains 0" in fitted.critical(1.05).note


def test_c_and_one_ratio_are_remarked_on():
    assert any(
        "C is 1.2: with nothing removed" in remark for remark in fit("runtime-law", timed(1.0, 1.2)).report().remarks
    )
    same = [dataclasses.replace(p, ratio=0.5) for p in timed(1.0)]
    assert fit("runtime-law", same).report().coefficients[1].dropped == "all points have the same ratio, 0.5"


def test_it_describes_nothing_but_speeds():
    losses = [dataclasses.replace(p, metric="loss") for p in timed(1.0)]
    with pytest.raises(FitError, match="runtime-law describes speed metrics, 'loss' is a loss"):
        fit("runtime-law", losses)
    with pytest.raises(FitError, match="compression-law describes loss and score metrics, 'speedup_decode' is a speed"):
        fit("compression-law", timed(1.0))


@pytest.mark.parametrize(
    ("metric", "kind", "unit"),
    [
        ("speedup_prefill", "speed", "times dense"),
        ("speedup_decode", "speed", "times dense"),
        ("decode_tokens_per_s", "speed", "a second"),
        ("loss", "loss", "nats"),
        ("bits_per_byte", "loss", "bits"),
        ("heldout_top1", "score", "fraction"),
        ("decode_peak_bytes", "size", "bytes"),
        ("kv_bytes_per_token", "size", "bytes"),
    ],
)
def test_kinds_are_told_by_names(metric: str, kind: str, unit: str):
    assert metric_kind(metric) == kind
    assert metric_unit(metric) == unit


def test_a_speed_may_be_anything_positive_and_does_not_collapse():
    point = timed(3.0)[-1]
    assert point.value > 2
    assert point.before_collapse
    assert not collapsed(0.01, 1.0, "speed")
    assert LIMITS["speed"][1] > 1e6


def test_records_of_speed_become_points():
    records = [
        make_record(
            number,
            measure="speed:random",
            metrics={"speedup_decode": (1 + r) ** 0.8, "speedup_decode_se": 0.01, "decode_tokens_per_s": 900.0},
            base={"speedup_decode": 1.0, "decode_tokens_per_s": 500.0},
            ratio=r,
        )
        for number, r in ((1, 0.1), (3, 0.3), (5, 0.5))
    ]
    reading = from_records(records, metric="speedup_decode")
    assert [p.se for p in reading.points] == [0.01] * 3
    assert fit(find("runtime-law"), reading.points).theta == pytest.approx([1.0, 0.8])


def test_the_command_fits_a_store(tmp_path: Path):
    path = tmp_path / "speed.db"
    with open_store(path, create=True) as store:
        store.add(
            [
                make_record(
                    number,
                    measure="speed:random",
                    chain=f"width@{r}",
                    recovery=None,
                    recovery_tokens=0,
                    protocol={"repeatable": False},
                    metrics={"speedup_decode": 1.02 * (1 + r) ** 0.8, "decode_tokens_per_s": 900.0},
                    base={"speedup_decode": 1.0, "decode_tokens_per_s": 500.0},
                    ratio=r,
                )
                for number, r in ((1, 0.1), (3, 0.3), (5, 0.5), (7, 0.7))
            ]
        )
    words = ["fit", str(path), "--metric", "speedup_decode", "--law", "runtime-law"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "speedup_decode (times dense" in said.output
    assert "changes by +5 %" in said.output
    values = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert [c["estimate"] for c in values["fits"][0]["coefficients"]] == pytest.approx([1.02, 0.8])
    assert {score["law"] for score in values["hold_out"]["before_collapse"]} == {"line", "persist", "runtime-law"}
    assert values["hold_out"]["before_collapse"][0]["law"] == "runtime-law"


def test_a_size_falls_and_its_critical_ratio_is_where_it_is_smaller():
    sizes = [
        dataclasses.replace(p, metric="decode_peak_bytes", base=2e7, value=2e7 - 1.5e7 * p.ratio) for p in timed(1)
    ]
    assert all(p.kind == "size" and p.before_collapse for p in sizes)
    found = fit("line", sizes)
    assert found.critical(0.95).r == pytest.approx(0.05 * 2 / 1.5)
    with pytest.raises(FitError, match=r"sigma must be in \(0, 1\) for a size, got 1.05"):
        found.critical(1.05)
    with pytest.raises(
        FitError, match="compression-law describes loss and score metrics, 'decode_peak_bytes' is a size"
    ):
        fit("compression-law", sizes)
