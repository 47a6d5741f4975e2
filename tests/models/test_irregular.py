"""Classes of irregular models: one entry a family, which says of its parts what the architectures say."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from mariotte import architectures
from mariotte.models import modeling_mariotte
from mariotte.models.irregular import CLASSES
from mariotte.models.modeling_mariotte import FAMILIES
from mariotte.testing.tiny import tiny

SAME = ("blocks", "final_norm", "positions", "output", "fused", "gate", "up", "down", "fused_mlp", "whole_norms")


def test_every_dense_decoder_has_a_class():
    dense = {name for name, entry in architectures.FAMILIES.items() if entry.kind == "causal" and not entry.experts}
    assert set(FAMILIES) == set(CLASSES) == dense


@pytest.mark.parametrize("name", FAMILIES)
def test_an_entry_says_what_the_architectures_say(name):
    family, entry = FAMILIES[name], architectures.FAMILIES[name]
    for field in SAME:
        assert getattr(family, field) == (getattr(entry, field) or type(getattr(family, field))()), field
    if not family.fused:
        assert (family.query, family.key, family.value) == (entry.query, entry.key, entry.value)
    assert bool(family.head_dim) == bool(entry.head_dim)
    assert bool(family.parallel) == entry.parallel
    block = tiny(name).blocks[0]
    for names, path in ((family.attention_norm, entry.attention_norm), (family.mlp_norm, entry.mlp_norm)):
        assert next(name for name in names if hasattr(block.module, name)) == path


@pytest.mark.parametrize("name", FAMILIES)
def test_classes_are_named_for_the_familys_own_and_found_by_name(name):
    config, model = CLASSES[name]
    family = FAMILIES[name]
    for made, own in ((config, family.config), (model, family.model)):
        assert issubclass(made, own)
        assert made.__name__ == f"Mariotte{own.__name__}"
        assert getattr(modeling_mariotte, made.__name__) is made


def test_the_file_needs_nothing_of_mariotte():
    file = Path(inspect.getsourcefile(modeling_mariotte) or "")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.split(".")[0] == "mariotte" for name in named)
