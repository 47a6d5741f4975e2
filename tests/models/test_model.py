"""A model seen through its family's entry."""

from __future__ import annotations

import pytest
import torch

from mariotte.architectures import FAMILIES
from mariotte.data.tokens import check_block
from mariotte.errors import DataError
from mariotte.testing.tiny import tiny

LIMITED = {
    "roberta": {"max_position_embeddings": 12, "pad_token_id": 1},
    **{family: {"max_position_embeddings": 10} for family in ("gpt2", "opt", "bert", "distilbert", "albert", "bart")},
}
"""Families with a table of positions, and configs with which they read ten tokens."""


@pytest.mark.parametrize("family", LIMITED)
def test_as_many_tokens_as_it_says_are_read_and_one_more_is_too_many(family: str) -> None:
    model = tiny(family, **LIMITED[family])
    assert model.longest == 10
    tokens_BT = torch.full((2, 11), 5)
    assert bool(model.logits(tokens_BT[:, :10]).isfinite().all())
    with pytest.raises((IndexError, RuntimeError)):
        model.logits(tokens_BT)


def test_families_without_a_table_of_positions_go_by_their_config() -> None:
    assert {family for family, entry in FAMILIES.items() if not entry.positions} == {*FAMILIES} - {*LIMITED}
    assert tiny("llama").longest == 128
    t5 = tiny("t5")
    del t5.hf.config.max_position_embeddings
    assert t5.longest is None
    check_block(10_000, t5, "loss")


@pytest.mark.parametrize("block", [513, 514])
def test_roberta_has_fewer_positions_than_rows(block: int) -> None:
    model = tiny("roberta", max_position_embeddings=514, pad_token_id=1)
    check_block(512, model, "calibration")
    with pytest.raises(
        DataError, match=f"^calibration: a window of {block} tokens is longer than the 512 positions of .*: ask for a"
    ):
        check_block(block, model, "calibration")
