"""What every recovery must do, as a test class: subclass it, say how the recovery is made, and run pytest."""

# ruff: noqa: D102  (the name of a test is its docstring)

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from mariotte.data import corpora, tokens
from mariotte.errors import ChainError, DataError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Counters, Prepared, Step, prepare_once
from mariotte.recover.methods.block import BlockLocal
from mariotte.recover.methods.distill import Distill
from mariotte.recover.methods.full import Full
from mariotte.recover.methods.lora import LoRA
from mariotte.recover.trunk import Recovery
from mariotte.testing.tiny import VOCAB, random_tokens, tiny, weights_hash

BLOCK = 16


def counting_corpus(folder: Path) -> str:
    """The name of a corpus of documents that count in steps of 1, 2 or 3: easy to learn, about 310 training rows."""
    lines = (
        " ".join(f"w{3 + (start + i * stride) % (VOCAB - 3)}" for i in range(24))
        for start in range(VOCAB)
        for stride in (1, 2, 3)
    )
    path = folder / "counting.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return f"file:{path}"


def tiny_reader(model_type: str, layers: int = 1) -> Model:
    """A tiny random model with a tokenizer whose words are w0, w1 ...: what the counting corpus is written in."""
    model = tiny(model_type, layers=layers, tied=model_type == "qwen2")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1", eos_token="w2")
    return model


def each_recovery(batch: int) -> list[Recovery]:
    """The recoveries that train, the first of them `lora`, with settings that learn something on a tiny model."""
    return [
        LoRA(batch=batch, lr=1e-2, warmup=3, rank=4),
        Full(batch=batch, lr=5e-3, warmup=3),
        Distill(batch=batch, lr=1e-2, warmup=3, rank=4, mix=0.5),
        BlockLocal(batch=batch, lr=5e-3, adapters=True, rank=4),
    ]


def context_of(model: Model, scratch: Path, corpus: str | None, seed: int = 0) -> Context:
    """What a recovery may use: its own folder, a corpus, rows of 16 tokens, new counters."""
    return Context(dense=model, scratch=scratch, seed=seed, corpus=corpus, block=BLOCK, counters=Counters())


def recovered(step: Step, model: Model, context: Context, amounts: Sequence[int]) -> dict[int, Model]:
    """The model at each of `amounts`, as the pipeline makes them: prepared once."""
    prepared = prepare_once(step, model, context, amounts)
    return {amount: step.apply(model, prepared, amount, context) for amount in amounts}


def module_names(model: Model) -> list[str]:
    """The paths of all modules: what an adapter that stays behind would change."""
    return list(dict(cast("Iterator[tuple[str, nn.Module]]", model.hf.named_modules())))


class StoppedError(Exception):
    """What interrupts a preparation in a test."""


def stop_after(calls: int) -> Callable[[str, float], None]:
    """A listener to progress that raises `StoppedError` once it has been called `calls` times."""
    left = iter(range(calls))

    def progress(stage: str, done: float) -> None:
        if next(left, None) is None:
            raise StoppedError(stage)

    return progress


class RecoveryConformance(ABC):
    """Tests of one recovery on tiny random models; what it must do is written in the names of the tests."""

    families: ClassVar[Sequence[str]] = ("llama", "qwen2")
    amounts: ClassVar[Sequence[int]] = (1_600, 330, 800)
    """Tokens, the largest first, none a multiple of a batch."""

    @abstractmethod
    def recovery(self) -> Step:
        """The recovery, with settings that learn something on a tiny model within a few thousand tokens."""

    @pytest.fixture
    def corpus(self, tmp_path: Path) -> str:
        return counting_corpus(tmp_path)

    @pytest.fixture
    def model(self) -> Model:
        return tiny_reader(self.families[0])

    def test_it_counts_in_tokens(self) -> None:
        assert (type(self.recovery()).unit, type(self.recovery()).family) == ("tokens", "recovery")

    def test_every_family_learns_and_the_input_stays_as_it_was(self, tmp_path: Path, corpus: str) -> None:
        amount = 4_000
        for family in self.families:
            model = tiny_reader(family, layers=2)
            before, flags = weights_hash(model), [p.requires_grad for p in model.hf.parameters()]
            names = module_names(model)
            result = recovered(self.recovery(), model, context_of(model, tmp_path / family, corpus), [amount])[amount]
            assert weights_hash(model) == before
            assert [p.requires_grad for p in model.hf.parameters()] == flags
            assert module_names(model) == names
            assert model.done == ()
            assert module_names(result) == names
            assert not result.hf.training
            test_rows = tokens.blocks(corpora.find(corpus), "test", model.tokenizer, BLOCK)
            assert token_nll(result, test_rows).mean() < token_nll(model, test_rows).mean() - 0.5

    def test_one_amount_does_not_depend_on_the_others(self, model: Model, tmp_path: Path, corpus: str) -> None:
        step = self.recovery()
        together = recovered(step, model, context_of(model, tmp_path / "all", corpus), self.amounts)
        for amount, result in together.items():
            alone = recovered(step, model, context_of(model, tmp_path / str(amount), corpus), [amount])[amount]
            assert weights_hash(alone) == weights_hash(result)
            assert alone.done == result.done

    def test_an_interrupted_preparation_goes_on_to_the_same_bits(
        self, model: Model, tmp_path: Path, corpus: str
    ) -> None:
        step = self.recovery()
        whole = recovered(step, model, context_of(model, tmp_path / "whole", corpus), self.amounts)
        for calls in (3, 12):
            context = context_of(model, tmp_path / f"stopped-{calls}", corpus)
            with pytest.raises(StoppedError):
                prepare_once(step, model, replace(context, progress=stop_after(calls)), self.amounts)
            assert Prepared.open(context.scratch) is None
            again = recovered(step, model, context, self.amounts)
            assert all(weights_hash(again[amount]) == weights_hash(whole[amount]) for amount in self.amounts)

    def test_amounts_asked_for_later_give_the_same_bits(self, model: Model, tmp_path: Path, corpus: str) -> None:
        step = self.recovery()
        whole = recovered(step, model, context_of(model, tmp_path / "whole", corpus), self.amounts)
        context = context_of(model, tmp_path / "grown", corpus)
        for amount in sorted(self.amounts, key=lambda a: (a == min(self.amounts), a)):
            grown = recovered(step, model, context, [amount])[amount]
            assert weights_hash(grown) == weights_hash(whole[amount])

    def test_a_rerun_prepares_nothing_and_leaves_the_global_generator_alone(
        self, model: Model, tmp_path: Path, corpus: str
    ) -> None:
        step, amount = self.recovery(), min(self.amounts)
        scratch = tmp_path / "scratch"
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first = recovered(step, model, context_of(model, scratch, corpus), [amount])[amount]
        assert torch.equal(torch.rand(3), expected)
        context = context_of(model, scratch, corpus)
        second = recovered(step, model, context, [amount])[amount]
        assert weights_hash(first) == weights_hash(second)
        assert (context.counters.trunks, context.counters.trunk_tokens, context.counters.preparations) == (0, 0, 0)

    def test_another_seed_gives_another_model(self, model: Model, tmp_path: Path, corpus: str) -> None:
        step, amount = self.recovery(), min(self.amounts)
        hashes: set[str] = set()
        for seed in (0, 1):
            context = context_of(model, tmp_path / str(seed), corpus, seed)
            hashes.add(weights_hash(recovered(step, model, context, [amount])[amount]))
        assert len(hashes) == 2

    def test_every_token_is_counted(self, model: Model, tmp_path: Path, corpus: str) -> None:
        told: list[tuple[str, float]] = []
        context = context_of(model, tmp_path / "scratch", corpus)

        def progress(stage: str, done: float) -> None:
            told.append((stage, done))

        context = replace(context, progress=progress)
        results = recovered(self.recovery(), model, context, self.amounts)
        for amount, result in results.items():
            (done,) = result.done
            assert amount - BLOCK < done.tokens <= amount
            assert (done.amount, done.obtained, done.unit, done.family) == (amount, done.tokens, "tokens", "recovery")
            assert done.step == str(self.recovery().link(amount))
            json.dumps(dict(done.facts))
        counters = context.counters
        assert counters.trunks == 1
        assert counters.trunk_tokens <= 0.9 * max(self.amounts)
        assert counters.decay_tokens <= 0.1 * sum(self.amounts) + 8 * BLOCK * len(self.amounts)
        assert told
        assert all(0 < share <= 1 for _, share in told)

    def test_the_result_is_a_plain_checkpoint(self, model: Model, tmp_path: Path, corpus: str) -> None:
        amount = min(self.amounts)
        result = recovered(self.recovery(), model, context_of(model, tmp_path / "scratch", corpus), [amount])[amount]
        assert result.measured_params() == result.counts.n_params == model.counts.n_params
        loaded = load(checkpoint.save(result, tmp_path / "plain"))
        probe = random_tokens(2, BLOCK)
        torch.testing.assert_close(loaded.logits(probe), result.logits(probe), atol=1e-5, rtol=1e-5)

    def test_what_it_reads_changes_with_the_text(self, model: Model, tmp_path: Path, corpus: str) -> None:
        step, amount = self.recovery(), 4_000
        context = context_of(model, tmp_path / "before", corpus)
        read = step.reads(model, context)
        before = recovered(step, model, context, [amount])[amount]
        assert step.reads(before, context) == read
        path = Path(corpus.removeprefix("file:"))
        documents = path.read_text(encoding="utf-8").split("\n\n")
        later = [" ".join(reversed(document.split())) for document in documents[100:]]
        path.write_text("\n\n".join(documents[:100] + later), encoding="utf-8")
        assert step.reads(model, context) != read
        after = recovered(step, model, context_of(model, tmp_path / "after", corpus), [amount])[amount]
        assert weights_hash(after) != weights_hash(before)
        stale = Prepared.open(context.scratch)
        assert stale is not None
        with pytest.raises(DataError, match="was trained with another text"):
            step.apply(model, stale, amount, context)

    def test_an_amount_below_one_row_is_refused_and_spoils_no_other(
        self, model: Model, tmp_path: Path, corpus: str
    ) -> None:
        step, short, amount = self.recovery(), BLOCK - 1, min(self.amounts)
        alone = recovered(step, model, context_of(model, tmp_path / "alone", corpus), [amount])[amount]
        context = context_of(model, tmp_path / "both", corpus)
        prepared = prepare_once(step, model, context, [short, amount])
        assert step.covers(prepared, [short, amount])
        with pytest.raises(ChainError, match=f"at least one row of {BLOCK} tokens, got {short}"):
            step.apply(model, prepared, short, context)
        assert weights_hash(step.apply(model, prepared, amount, context)) == weights_hash(alone)

    def test_rows_longer_than_the_positions_are_refused(self, model: Model, tmp_path: Path, corpus: str) -> None:
        positions = model.config["max_position_embeddings"]
        context = replace(context_of(model, tmp_path / "scratch", corpus), block=positions + 1)
        with pytest.raises(DataError, match=f"{positions + 1} tokens is longer than the {positions} positions"):
            self.recovery().prepare(model, context, [10 * positions])

    def test_no_text_and_no_tokenizer_are_refused(self, model: Model, tmp_path: Path, corpus: str) -> None:
        step, amount = self.recovery(), min(self.amounts)
        mute = tiny(self.families[0])
        for reader, text, said in ((model, None, "needs text to train on, got none"), (mute, corpus, "a tokenizer")):
            context = context_of(reader, tmp_path / said, text)
            with pytest.raises(DataError, match=said):
                step.prepare(reader, context, [amount])
            with pytest.raises(DataError, match=said):
                step.reads(reader, context)
