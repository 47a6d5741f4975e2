from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest

from mariotte.laws.base import Law
from mariotte.laws.catalogue import LAWS, applicable, find
from mariotte.testing.laws import CHECKS, Check


@pytest.mark.parametrize("name", LAWS.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_law_conforms(name: str, check: Check):
    check(find(name))


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
    text = (Path(__file__).resolve().parents[2] / "docs" / "laws.md").read_text(encoding="utf-8")
    for name in LAWS.names():
        assert f"`{name}`" in text
        assert find(name).formula in text
        assert all(defect in " ".join(text.split()) for defect in find(name).defects), name


def test_all_laws_of_a_kind_are_found():
    assert [law.name for law in applicable("loss")] == LAWS.names()
