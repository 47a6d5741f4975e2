"""A model run block by block: what stands around the blocks is the family's own, and nobody notices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mariotte.models.blockwise import Blockwise, finals, logits
from mariotte.models.model import Model
from mariotte.testing.tiny import random_tokens, tiny

# Soft caps, scaled logits, sliding windows, positions of a table, blocks that give tuples, experts.
FAMILIES = ("llama", "gemma2", "granite", "qwen3", "gpt2", "opt", "falcon", "gpt_neox", "mixtral", "gpt_oss")


def by_blocks(model: Model, tokens_BT: Tensor) -> tuple[Blockwise, Tensor]:
    """The stream behind the last block."""
    apart = Blockwise(model)
    beside = apart.beside(tokens_BT)
    stream_BTD = apart.enter(tokens_BT)
    for index, given in enumerate(beside):
        stream_BTD = apart.run(index, stream_BTD, given)
    return apart, stream_BTD


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_after_another_give_the_logits_of_the_model(family: str) -> None:
    model, tokens_BT = tiny(family), random_tokens(3, 20)
    with torch.no_grad():
        expected = model.logits(tokens_BT)
    apart, stream_BTD = by_blocks(model, tokens_BT)
    assert torch.equal(apart.leave(tokens_BT, stream_BTD), expected)
    assert torch.equal(apart.leave(tokens_BT, stream_BTD, 4), next(logits(model, [tokens_BT], [4])))
    assert torch.equal(apart.final(tokens_BT, stream_BTD), next(finals(model, [tokens_BT])))


def test_nobody_who_watches_a_block_sees_more_than_its_run() -> None:
    model, tokens_BT = tiny("mixtral"), random_tokens(3, 20)
    seen: list[torch.Size] = []
    block = model.blocks[0].module
    for module in (block, block.get_submodule("mlp.experts"), block.get_submodule("self_attn.o_proj")):
        module.register_forward_hook(lambda _module, given, _output: seen.append(given[0].shape))
    apart, stream_BTD = by_blocks(model, tokens_BT)
    assert sorted(seen) == [(3, 20, 32), (3, 20, 32), (60, 32)]
    apart.leave(tokens_BT, stream_BTD)
    assert len(seen) == 3


def test_a_model_is_left_as_it_was() -> None:
    model, tokens_BT = tiny("llama"), random_tokens(3, 20)
    first, second = (block.module for block in model.blocks)
    own = first.forward
    vars(first)["forward"] = patched = lambda *places, **names: own(*places, **names)  # type: ignore[misc]
    apart, stream_BTD = by_blocks(model, tokens_BT)
    apart.leave(tokens_BT, stream_BTD)
    assert vars(first)["forward"] is patched
    assert "forward" not in vars(second)
    with pytest.raises(IndexError):
        model.logits(torch.full((1, 4), 10**6))
    with pytest.raises(IndexError):
        apart.beside(torch.full((1, 4), 10**6))
    assert vars(first)["forward"] is patched
    assert "forward" not in vars(second)
