"""What Mariotte asks of every method and law, asked of these; and that all three are found by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from mariotte_example.relative_magnitude import RelativeMagnitude, relative_magnitudes
from mariotte_example.tangent import Tangent
from typer.testing import CliRunner

from mariotte import compress_model, load, measure
from mariotte.cli.main import app
from mariotte.compress import METHODS
from mariotte.laws import LAWS
from mariotte.testing.laws import CHECKS
from mariotte.testing.methods import MethodConformance, cases


def test_relative_magnitudes_by_hand():
    found = relative_magnitudes(torch.tensor([[1.0, -3.0], [0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[1 / 4 + 1, 3 / 4 + 3 / 4], [0, 1 + 1 / 4]]).double())


@pytest.mark.parametrize(("step", "family"), cases([RelativeMagnitude()], ["llama"]))
class TestRelativeMagnitude(MethodConformance):
    """Everything that is asked of a method."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_law_conforms(check):
    check(Tangent())


def test_a_chain_with_the_method_is_measured_with_the_measure():
    dense = load("testbed/qwen2-46k")
    cut = compress_model(dense, "relative-magnitude@0.3 | int8")
    assert [done.name for done in cut.done] == ["relative-magnitude", "int8"]
    found = [measure(model, "entropy:testbed/news(rows=4)").metrics["entropy"] for model in (dense, cut)]
    assert 0 < found[0] != found[1] < math.log(dense.shape.vocab)


def test_the_command_line_lists_what_is_there():
    assert METHODS.find("relative-magnitude") is RelativeMagnitude
    assert LAWS.find("tangent") is Tangent
    for command, name in (("methods", "relative-magnitude"), ("laws", "tangent"), ("measures", "entropy")):
        result = CliRunner().invoke(app, [command, "--json"])
        assert result.exit_code == 0, result.output
        assert name in {row["name"] for row in json.loads(result.output)}, command
