from __future__ import annotations

import sys

import pytest

from mariotte.errors import UnknownNameError
from mariotte.named import Catalogue

LAWS = Catalogue("law", "mariotte.laws.forms", "mariotte.laws", "mariotte.laws.base:Law")


def test_listing_names_imports_none_of_them() -> None:
    for name in [m for m in sys.modules if m.startswith("mariotte.laws.forms.")]:
        sys.modules.pop(name)
    assert {"compression-law", "line", "persist", "pruning-law"} <= set(LAWS.names())
    assert not [m for m in sys.modules if m.startswith("mariotte.laws.forms.")]


def test_the_file_is_the_name() -> None:
    assert LAWS.find("pruning-law").__module__ == "mariotte.laws.forms.pruning_law"


def test_an_unknown_name_is_answered_with_its_neighbours() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no law named 'prunning-law'; did you mean 'pruning-law' or .*\? \(known: .*line"
    ):
        LAWS.find("prunning-law")
