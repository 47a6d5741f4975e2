from __future__ import annotations

from pathlib import Path

import pytest

from mariotte import chain as chains
from mariotte.errors import ChainError, UnknownNameError
from mariotte.experiments import identity
from mariotte.models.load import load


def canonical(text: str) -> str:
    return " | ".join(str(part.link) for part in identity.resolve(chains.parse(text)))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ffn@0.30(criterion=obs)", "ffn@0.3"),
        ("ffn@0.3(criterion=norm, compensate=true)", "ffn@0.3(criterion=norm)"),
        ("magnitude@0.5:all", "magnitude@0.5"),
        ("magnitude@0.5:ffn", "magnitude@0.5:ffn"),
        ("slice@0 | lora@4000", "slice@0 | lora@4k"),
    ],
)
def test_what_equals_a_default_is_left_out(written: str, meant: str) -> None:
    assert canonical(written) == meant
    assert canonical(meant) == meant


@pytest.mark.parametrize(
    ("chain", "said", "kind"),
    [
        ("slcie@0.3", "no method named 'slcie'; did you mean 'slice'", UnknownNameError),
        ("slice@1.5", "the share of hidden to remove must be in [0, 1), got 1.5", ChainError),
        ("slice", "slice needs an amount of hidden, got none: write slice@0.3", ChainError),
        ("ffn@0.3(criteron=obs)", "ffn has no field 'criteron'; did you mean 'criterion'", ChainError),
        ("ffn@0.3(criterion=best)", "criterion", ChainError),
        ("ffn@0.3(compensate=3)", "field 'compensate' must be bool, got 3", ChainError),
        ("ffn@0.3(ridge=big)", "field 'ridge' must be float, got 'big'", ChainError),
        ("magnitude@0.3:norms", "magnitude has no scope 'norms'; it has all, attention, ffn, head", ChainError),
        ("lora@0.5", "tokens must be a whole number", ChainError),
    ],
)
def test_what_means_nothing_is_refused(chain: str, said: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        canonical(chain)
    assert said in str(caught.value)


def test_measures() -> None:
    measure = identity.resolve_measure("loss:testbed/all(split=test, rows=128, block=64)")
    assert identity.measure_text(measure) == "loss:testbed/all(block=64, rows=128)"
    with pytest.raises(UnknownNameError, match="no measure named 'los'; did you mean 'loss'"):
        identity.resolve_measure("los:wikitext2")
    with pytest.raises(ChainError, match="must say what it is measured on"):
        identity.resolve_measure("loss")
    with pytest.raises(ChainError, match="takes no amount"):
        identity.resolve_measure("loss@3:wikitext2")
    with pytest.raises(ChainError, match="loss has no field 'row'; did you mean 'rows'"):
        identity.resolve_measure("loss:wikitext2(row=3)")


def test_experiments_differ_exactly_when_their_results_may(model_folder: Path) -> None:
    model = load(model_folder)

    def key(chain: str, seed: int = 0, calibration: str = "c") -> str:
        parts = identity.resolve(chains.parse(chain))
        return identity.experiment_id(model, parts, seed, calibration, [{}] * len(parts))

    assert key("ffn@0.3") == key("ffn@0.30(criterion=obs)")
    assert key("slice@0") == key("slice@0.0")
    different = [
        key("ffn@0.3"),
        key("ffn@0.31"),
        key("ffn@0.3(criterion=norm)"),
        key("ffn@0.3", seed=1),
        key("ffn@0.3", calibration="d"),
    ]
    assert len(set(different)) == len(different)
    assert key("dense", seed=1) == key("dense", calibration="d")
