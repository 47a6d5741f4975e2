from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mariotte.errors import ChainError, DataError, ModelError
from mariotte.evaluate.measures.loss import Loss
from mariotte.models.load import load
from mariotte.models.model import Model


@pytest.fixture
def model(model_folder: Path) -> Model:
    return load(model_folder)


def test_a_uniform_model_scores_ln_v_and_its_bits_per_byte(model: Model) -> None:
    with torch.no_grad():
        model.final_norm.weight.zero_()  # the head is tied: this makes every logit zero
    found = Loss(on="testbed/all", rows=20).measure(model)
    protocol = found.protocol
    assert found.metrics["loss"] == pytest.approx(math.log(model.shape.vocab), abs=1e-6)
    bits = found.metrics["loss"] / math.log(2) * protocol["scored_tokens"] / protocol["scored_bytes"]
    assert found.metrics["bits_per_byte"] == pytest.approx(bits)
    assert found.metrics["loss_se"] == pytest.approx(0, abs=1e-6)


def test_the_protocol_is_explicit(model: Model) -> None:
    protocol = Loss(on="testbed/news", rows=5).protocol(model)
    assert (protocol["corpus"], protocol["split"], protocol["rows"], protocol["block"]) == (
        "testbed/news",
        "test",
        5,
        64,
    )
    assert protocol["scored_tokens"] == 5 * 63
    assert protocol["dtype"] == "float32"
    assert {"tokens_sha256", "tokenizer_sha256", "stride", "first_token", "separator"} <= set(protocol)


def test_other_text_is_another_protocol(model: Model) -> None:
    protocols = [
        Loss(on=on, rows=rows).protocol(model)
        for on, rows in (("testbed/news", 5), ("testbed/news", 6), ("testbed/all", 5))
    ]
    assert len({p["tokens_sha256"] for p in protocols}) == 3


def test_by_hand(model: Model) -> None:
    measure = Loss(on="testbed/all", rows=3)
    from mariotte.data import corpora, tokens

    rows = tokens.blocks(corpora.find("testbed/all"), "test", model.tokenizer, 64, 3)
    with torch.no_grad():
        logs = model.logits(rows).log_softmax(-1)
    by_hand = -sum(logs[i, t, rows[i, t + 1]] for i in range(3) for t in range(63)) / (3 * 63)
    assert measure.measure(model).metrics["loss"] == pytest.approx(float(by_hand), rel=1e-5)


def test_a_broken_model_is_said_to_be_broken(model: Model) -> None:
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="loss must be a finite number, got nan"):
        Loss(on="testbed/all", rows=2).measure(model)


def test_windows_longer_than_the_positions_are_refused(model: Model) -> None:
    with pytest.raises(DataError, match=r"a window of 512 tokens is longer than the 128 positions"):
        Loss(on="testbed/all", block=512).protocol(model)


def test_without_a_tokenizer(model: Model) -> None:
    model.tokenizer = None
    with pytest.raises(DataError, match="has no tokenizer"):
        Loss(on="testbed/all").protocol(model)


@pytest.mark.parametrize(
    ("fields", "said"), [({"split": "dev"}, "split must be one of"), ({"block": 1}, "block"), ({"rows": 0}, "rows")]
)
def test_fields_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ChainError, match=said):
        Loss(on="testbed/all", **fields)


def test_it_equals_the_loss_of_stories260k_measured_elsewhere(shared: Path) -> None:
    """A greedy check against the published stories: its note states 1.5130 for another protocol, near ours."""
    model = load(shared / "data/models/stories260K")
    found = Loss(on=f"file:{shared}/data/tinystories/tinystories_sample.txt", block=256, rows=20).measure(model)
    assert found.metrics["loss"] == pytest.approx(1.52, abs=0.12)
    assert found.metrics["bits_per_byte"] == pytest.approx(1.10, abs=0.1)
