"""Test loss: mean negative log-likelihood in nats per token, and bits per byte so that tokenizers compare."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from mariotte.data import corpora, tokens
from mariotte.data.corpora import Split
from mariotte.data.tokens import Blocks
from mariotte.errors import ChainError, DataError
from mariotte.evaluate.base import Measure, Measurement
from mariotte.models.model import Model
from mariotte.models.nll import token_nll

__all__ = ["Loss"]

TOKENS_AT_ONCE = 4096
"""Tokens scored in one forward pass: bounds memory; the result does not depend on it beyond float tolerance."""


@functools.lru_cache(maxsize=32)
def _blocks(
    corpus: str, text: str, split: Split, tokenizer: PreTrainedTokenizerBase, hashed: str, block: int, rows: int | None
) -> Blocks:
    """The blocks, read once for all models of one tokenizer, as long as the text's fingerprint is the same."""
    return tokens.read(corpora.find(corpus), split, tokenizer, block, rows)


@dataclass(frozen=True, kw_only=True)
class Loss(Measure):
    """Mean negative log-likelihood of a corpus.

    Parameters
    ----------
    on : corpus
    split : test, valid, calibration or train
    block : tokens a window; None takes the corpus' own (64 for the testbed, 512 for text), or fewer for a short model
    rows : windows scored; None scores the whole split

    Notes
    -----
    Documents are joined, a separator before each, and cut into windows that do not overlap. Every token of a window
    is scored given those before it in the window; its first token is context only. Bits per byte divide by the UTF-8
    bytes of exactly the scored tokens. ``loss_se`` is the standard error of the loss over windows, where there are
    two or more.
    """

    split: str = "test"
    block: int | None = None
    rows: int | None = None

    metrics: ClassVar = {"loss": "loss", "bits_per_byte": "loss"}

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ChainError(f"loss: split must be one of {', '.join(get_args(Split))}, got {self.split!r}")
        for name, value, least in (("block", self.block, 2), ("rows", self.rows, 1)):
            if value is not None and value < least:
                raise ChainError(f"loss: {name} must be at least {least}, got {value}")

    @property
    @override
    def tokens(self) -> int:
        corpus = corpora.find(self.on)
        return (self.rows or 400) * (self.block or corpus.block)  # a test split has some hundred blocks

    @override
    def check(self) -> None:
        corpora.find(self.on).fingerprint(cast(Split, self.split))

    def _read(self, model: Model) -> Blocks:
        if model.tokenizer is None:
            raise DataError(
                f"{model.name} has no tokenizer: put tokenizer.json into its folder to measure a loss on text"
            )
        block = self.block or tokens.usual_block(corpora.find(self.on), model)
        tokens.check_block(block, model, "loss")
        hashed = tokens.tokenizer_hash(model.tokenizer)
        split = cast(Split, self.split)
        text = corpora.find(self.on).fingerprint(split)
        return _blocks(self.on, text, split, model.tokenizer, hashed, block, self.rows)

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        found = self._read(model)
        scored = found.n_bytes[:, 1:]
        return {
            **found.protocol(),
            "stride": found.tokens.shape[1],
            "first_token": "context only",
            "scored_tokens": scored.numel(),
            "scored_bytes": int(scored.sum()),
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        found = self._read(model)
        nll_NT = token_nll(model, found.tokens, batch=max(1, TOKENS_AT_ONCE // found.tokens.shape[1])).double()
        n_bytes = int(found.n_bytes[:, 1:].sum())
        if not n_bytes:
            raise DataError(
                f"loss: the scored tokens of {self.on!r} stand for no text; is its tokenizer's separator all there is?"
            )
        metrics = {"loss": float(nll_NT.mean()), "bits_per_byte": float(nll_NT.sum()) / math.log(2) / n_bytes}
        if len(nll_NT) > 1:
            # Over windows: neighbouring ones may come from one document, so this is a lower bound of the error.
            metrics["loss_se"] = float(nll_NT.mean(1).std() / math.sqrt(len(nll_NT)))
        return Measurement(metrics=metrics, protocol=self.protocol(model))
