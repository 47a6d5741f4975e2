"""Narrower experts: what the kept neurons take over, and experts that nothing is known of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mariotte.compress.methods.expert_ffn import ExpertFFN
from mariotte.compress.mixture import Routed, expert_downs, watch_experts
from mariotte.errors import ChainError, ModelError
from mariotte.experiments.pipeline import compress_model
from mariotte.models.model import Model
from mariotte.models.step import Context, prepare_once
from mariotte.testing.tiny import random_tokens, tiny

MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def weighed(model: Model, context: Context) -> dict[tuple[int, int], torch.Tensor]:
    """By block and expert: (S, F) hidden values of the tokens that take it, times its share."""
    found: dict[tuple[int, int], list[torch.Tensor]] = {}

    def gather(index: int, routed: Routed) -> None:
        own = routed.hidden_SF.double() * routed.share_S.double()[:, None]
        found.setdefault((index, routed.expert), []).append(own)

    watch_experts(model, context, "test", gather, lambda tokens: None)
    return {key: torch.cat(rows) for key, rows in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_kept_neurons_are_the_least_squares_of_all_of_them(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    context = Context(dense=model, scratch=tmp_path, calibration=random_tokens(48, 32))
    hidden = weighed(model, context)
    cuts = {}
    for compensate in (True, False):
        step = ExpertFFN(compensate=compensate, ridge=1e-9, round_to=4)
        own = Context(dense=model, scratch=tmp_path / str(compensate), calibration=context.calibration)
        cuts[compensate] = step.apply(model, prepare_once(step, model, own, [0.5]), 0.5, own)
    orders = prepare_once(ExpertFFN(ridge=1e-9, round_to=4), model, Context(
        dense=model, scratch=tmp_path / "again", calibration=context.calibration), [0.5])  # fmt: skip
    solved = 0
    for (index, expert), rows_SF in hidden.items():
        width = cuts[True].shape.ffn
        kept_K = orders.get(f"block-{index}")["order"][expert, :width].sort().values
        wanted_SD = rows_SF @ expert_downs(model.blocks[index])[expert].double().T
        errors = {}
        for compensate, cut in cuts.items():
            down_DK = expert_downs(cut.blocks[index])[expert].double()
            errors[compensate] = float((rows_SF[:, kept_K] @ down_DK.T - wanted_SD).square().sum())
        assert errors[True] <= errors[False] * (1 + 1e-6)
        if len(rows_SF) > 2 * rows_SF.shape[1]:
            best_KD = torch.linalg.lstsq(rows_SF[:, kept_K], wanted_SD).solution
            best = float((rows_SF[:, kept_K] @ best_KD - wanted_SD).square().sum())
            assert errors[True] == pytest.approx(best, rel=1e-3, abs=1e-9)
            solved += errors[True] < 0.99 * errors[False]
    assert solved  # of at least one expert the kept neurons have something to make up for


@torch.no_grad()
def test_an_expert_that_is_never_taken_keeps_its_largest_neurons_as_they_are(tmp_path: Path) -> None:
    model = tiny("mixtral")
    # The same token everywhere is the same stream everywhere: two experts of four take all of it.
    context = Context(dense=model, scratch=tmp_path, calibration=torch.full((2, 8), 5))
    taken = {expert for index, expert in weighed(model, context) if index == 0}
    step = ExpertFFN(round_to=4)
    cut = step.apply(model, prepare_once(step, model, context, [0.5]), 0.5, context)
    for expert in set(range(4)) - taken:
        before_DF, after_DK = (expert_downs(m.blocks[0])[expert] for m in (model, cut))
        largest = before_DF.norm(dim=0).argsort(descending=True)[: cut.shape.ffn].sort().values
        assert torch.allclose(after_DK, before_DF[:, largest], atol=1e-6)
    assert len(taken) == 2


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ModelError, match="needs a mixture of experts"):
        compress_model(tiny("llama"), "expert-ffn@0.5")
    with pytest.raises(ChainError, match="ridge must be positive"):
        ExpertFFN(ridge=0.0)
    with pytest.raises(ChainError, match="round_to must be a positive"):
        ExpertFFN(round_to=0)
