from __future__ import annotations

from mariotte.laws.catalogue import LAWS, find
from mariotte.laws.forms.odds_pooled import EXPONENTS, UNKNOWN
from mariotte.laws.published.constants import MARKS, constants


def test_every_constant_has_a_law_a_number_and_a_mark():
    rows = constants()
    assert rows
    for row in rows:
        assert row["law"] in LAWS.names()
        assert float(row["value"]) > 0
        assert row["mark"] in MARKS
        assert bool(row["source"]) == (row["mark"] != "ours")
    assert [row["parameter"] for row in constants("precision-law")] == ["C_T", "γD", "γN", "γP"]
    assert constants("line") == []


def test_the_law_uses_the_exponents_that_ship():
    assert {row["scope"]: float(row["value"]) for row in constants("odds-pooled")} == dict(EXPONENTS)
    assert sorted(EXPONENTS.values())[2] == UNKNOWN


def test_typical_exponents_of_precision_are_those_that_are_known():
    known = {row["parameter"]: float(row["value"]) for row in constants("precision-law")}
    typical = {p.name: p.typical for p in find("precision-law").params}
    assert typical["γN"] == known["γN"]
    assert typical["γP"] == known["γP"]
