"""No gradient leaves a block; blocks are matched by their place in the dense model; other spaces are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.errors import ChainError, ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models.model import Done, Model
from mariotte.models.step import Context
from mariotte.recover.losses import Loss, text_loss
from mariotte.recover.methods.block import BlockLocal, relative_error, spans
from mariotte.testing.recoveries import RecoveryConformance, context_of, counting_corpus, recovered, tiny_reader
from mariotte.testing.tiny import random_tokens, tiny, weights_hash

STEP = BlockLocal(batch=5, lr=5e-3, warmup=3, rank=4, adapters=True)


def removed(*gone: int) -> Done:
    return Done(
        step="shortgpt@0.3",
        name="shortgpt",
        unit="blocks",
        family="depth",
        amount=0.3,
        obtained=0.3,
        facts={"removed_blocks": list(gone)},
    )


class _AlsoText(BlockLocal):
    """With the text's loss beside it: the suite's dense model is the model itself, which teaches nothing."""

    @classmethod
    @override
    def name(cls) -> str:
        return "block"

    @override
    def loss(self, model: Model, context: Context) -> Loss:
        local = super().loss(model, context)

        def both(module: nn.Module, tokens_BT: Tensor) -> Tensor:
            return local(module, tokens_BT) + text_loss(module, tokens_BT)

        return both


class TestConformance(RecoveryConformance):
    @override
    def recovery(self) -> BlockLocal:
        return _AlsoText(batch=5, lr=1e-2, warmup=3, rank=4)


def damaged(model: Model) -> Model:
    result = model.copy()
    with torch.no_grad():
        for matrix in result.matrices("ffn"):
            matrix.weight.add_(0.1 * torch.randn(matrix.weight.shape, generator=torch.Generator().manual_seed(1)))
    return result


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("inputs", ["dense", "stream"])
def test_blocks_come_nearer_to_the_dense_model_s(inputs: str, adapters: bool, tmp_path: Path) -> None:
    corpus = counting_corpus(tmp_path)
    dense = tiny_reader("qwen2", layers=2)
    context = context_of(dense, tmp_path / "scratch", corpus)
    step = replace(STEP, inputs=inputs, adapters=adapters, lr=5e-3 if adapters else 2e-3)
    result = recovered(step, damaged(dense), context, [4_800])[4_800]
    assert result.done[-1].facts["loss_end"] < 0.6 * result.done[-1].facts["loss_begin"]
    assert torch.equal(result.embeddings.weight, dense.embeddings.weight)
    assert torch.equal(result.final_norm.weight, dense.final_norm.weight)


@pytest.mark.parametrize("inputs", ["dense", "stream"])
def test_no_gradient_leaves_a_block(inputs: str, tmp_path: Path) -> None:
    """The second block alone differs, and so it alone has something to learn."""
    dense = tiny_reader("llama", layers=2)
    other = dense.copy()
    with torch.no_grad():
        other.blocks[1].down.weight.mul_(0.5)
    step = replace(STEP, inputs=inputs, adapters=False)
    module = step.learner(other, context_of(dense, tmp_path, None)).module
    step.loss(other, context_of(dense, tmp_path, None))(module, random_tokens(2, 16)).backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(name.startswith(other.entry.blocks) for name in found)
    first = [g for name, g in found.items() if ".layers.0." in name]
    second = [g for name, g in found.items() if ".layers.1." in name]
    assert all(g is not None and not g.any() for g in first)
    assert any(g is not None and g.any() for g in second)


def test_the_error_is_a_share_of_what_the_block_adds() -> None:
    entered, wanted = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert relative_error(entered, wanted, entered).item() == 1.0
    assert relative_error(1.5 * wanted, wanted, entered).item() == 0.25


def test_blocks_are_matched_by_their_place_in_the_dense_model() -> None:
    model = tiny("llama", layers=3)
    assert spans(tiny("llama", layers=6).after(removed()), 6)[2] == (2, 3)
    assert spans(model.after(removed(1, 4, 5)), 6) == [(0, 2), (2, 3), (3, 6)]
    assert spans(model.after(removed(0, 1)).after(removed(1)), 6) == [(0, 4), (4, 5), (5, 6)]
    with pytest.raises(ModelError, match="which of its 6 blocks the 3 of tiny-llama were is not known"):
        spans(model, 6)


def test_after_removed_blocks_the_one_before_bridges_the_gap(tmp_path: Path) -> None:
    dense = tiny_reader("llama", layers=4)
    short = compress_model(dense, "shortgpt@0.5", calibration=(corpus := counting_corpus(tmp_path)), rows=8, block=16)
    result = recovered(STEP, short, context_of(dense, tmp_path / "scratch", corpus), [4_800])[4_800]
    assert result.done[-1].facts["loss_end"] < result.done[-1].facts["loss_begin"]


def test_a_turned_or_narrower_stream_is_refused(tmp_path: Path) -> None:
    model = tiny_reader("qwen2", layers=2)
    turned = replace(removed(), name="slice", family="slice", facts={})
    context = context_of(model, tmp_path / "scratch", counting_corpus(tmp_path))
    with pytest.raises(ModelError, match=r"after slice those of .* do not live in the same space: recover it"):
        STEP.prepare(model.copy().after(turned), context, [900])
    assert not context.scratch.exists()
    with pytest.raises(ModelError, match="have 32 values where the dense model's have 64"):
        STEP.loss(model, context_of(tiny("qwen2", hidden=64), tmp_path, None))


def test_a_search_counts_as_the_steps_that_it_took(tmp_path: Path) -> None:
    dense = tiny_reader("llama", layers=4)
    given = {"calibration": counting_corpus(tmp_path), "rows": 8, "block": 16}
    found = compress_model(dense, "auto@0.4(over=shortgpt+ffn, search=2)", **given)
    chain = found.done[-1].facts["chain"]
    assert "shortgpt" in chain
    by_hand = compress_model(dense, chain, **given)
    assert spans(found, 4) == spans(by_hand, 4)
    recovery = "block@1600(batch=5, lr=0.005)"
    results = [compress_model(dense, f"{cut} | {recovery}", **given) for cut in (found.done[-1].step, chain)]
    assert weights_hash(results[0]) == weights_hash(results[1])
    sliced = compress_model(dense, "auto@0.3(over=slice, search=1)", **given)
    with pytest.raises(ModelError, match="after slice those of"):
        STEP.loss(sliced, context_of(dense, tmp_path, None))


def test_what_a_checkpoint_went_through_before_is_part_of_the_dense_model(tmp_path: Path) -> None:
    turned = replace(removed(), name="slice", family="slice", facts={})
    dense, later = (tiny_reader("llama", layers=n).after(removed(1, 4)).after(turned) for n in (4, 3))
    assert spans(later.after(removed(2)), 4, before=2) == [(0, 1), (1, 3), (3, 4)]
    STEP.loss(dense, context_of(dense, tmp_path, None))


def test_impossible_fields_are_refused() -> None:
    with pytest.raises(ChainError, match="inputs must be dense or stream, got 'both'"):
        BlockLocal(inputs="both")
