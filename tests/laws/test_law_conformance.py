from __future__ import annotations

import dataclasses
import importlib.resources
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import override

from mariotte.laws import result
from mariotte.laws.base import Array, Estimate, Inputs, Law, Param
from mariotte.laws.catalogue import LAWS, applicable, find
from mariotte.laws.forms.pruning_law import PruningLaw
from mariotte.laws.linear import LinearLaw
from mariotte.testing.laws import CHECKS, Check, is_anchored_if_it_says_so, stays_possible


@pytest.mark.parametrize("name", LAWS.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_law_conforms(name: str, check: Check):
    check(find(name))


class Anchored(LinearLaw):
    """L = L0 · (1 - r)^α, of a package that is none of ours."""

    name = "anchored"
    formula = "L = L0 · (1 - r)^α"
    reference = ""
    inputs = ("base", "ratio")
    params = (Param("α", typical=-0.6),)
    anchored = True
    ratio_param = "α"
    intercept = False
    log_link = True

    @override
    def offset(self, x: Inputs) -> Array:
        return np.log(x.base_M)

    @override
    def terms(self, x: Inputs) -> Array:
        return np.log1p(-x.ratio_M)[:, None]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_anchored_law_of_another_package_conforms(check: Check, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(result, "find", lambda name: {"anchored": Anchored()}[name])
    check(Anchored())


class SaysItIsAnchored(PruningLaw):
    anchored = True


class DoesNotSayThatItIs(Anchored):
    anchored = False


class EstimatesTheImpossible(PruningLaw):
    @override
    def estimate(self, x: Inputs, y_M: Array) -> Estimate:
        found = super().estimate(x, y_M)
        return dataclasses.replace(found, theta=found.theta * [-1, 1])

    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return super().f(np.abs(theta) * [1, -1], x)


class GivesNoNumber(PruningLaw):
    @override
    def f(self, theta: Array, x: Inputs) -> Array:
        return np.where(x.base_M > 100, np.nan, super().f(theta, x))


@pytest.mark.parametrize(
    ("law", "check", "said"),
    [
        (SaysItIsAnchored(), is_anchored_if_it_says_so, "times the dense value"),
        (DoesNotSayThatItIs(), is_anchored_if_it_says_so, "times the dense value"),
        (EstimatesTheImpossible(), stays_possible, "P0 = -.* has no logarithm"),
        (GivesNoNumber(), stays_possible, "no number for L0 = 1000"),
    ],
)
def test_the_checks_find_what_they_look_for(law: Law, check: Check, said: str):
    with pytest.raises(AssertionError, match=said):
        check(law)


def test_laws_of_one_class_are_equal():
    assert find("line") == find("line")
    assert find("line") != find("persist")
    assert len({find("line"), find("line"), find("persist")}) == 2


@pytest.mark.parametrize("name", LAWS.names())
def test_a_law_says_what_it_is(name: str):
    law = find(name)
    assert isinstance(law, Law)
    assert law.name == name
    assert law.defects
    assert law.ratio_param is None or law.ratio_param in [p.name for p in law.params]


def test_every_reference_is_in_the_bibliography():
    text = (importlib.resources.files("mariotte") / "references.bib").read_text(encoding="utf-8")
    for reference in {find(name).reference for name in LAWS.names()} - {""}:
        assert f"{{{reference}," in text


def test_the_documentation_describes_every_law_and_defect():
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = "".join(page.read_text(encoding="utf-8") for page in (docs / "laws.md", *(docs / "laws").glob("*.md")))
    for name in LAWS.names():
        assert f"`{name}`" in text
        assert find(name).formula in text
        assert all(defect in " ".join(text.split()) for defect in find(name).defects), name


def test_all_laws_of_a_kind_are_found():
    every = {kind: [law.name for law in applicable(kind)] for kind in ("loss", "score", "speed", "size")}
    # Slow and special forms are tried where they are named: a hold-out of all of them would take minutes.
    unasked = [name for name in LAWS.names() if find(name).screened and name != "runtime-law"]
    assert every["loss"] == every["score"] == unasked
    assert {"compression-law", "line", "persist", "pruning-law"} <= set(unasked)
    assert not {"odds", "quadratic", "p2", "recovery-curve"} & set(unasked)
    assert every["speed"] == ["line", "persist", "runtime-law"]
    assert every["size"] == ["line", "persist"]
