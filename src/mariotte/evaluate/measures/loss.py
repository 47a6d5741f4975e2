"""Test loss: mean negative log-likelihood in nats per token, and bits per byte so that tokenizers compare."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from mariotte.data import corpora, tokens
from mariotte.data.corpora import Split
from mariotte.data.tokens import Blocks, Context
from mariotte.errors import ChainError, DataError
from mariotte.evaluate.base import Measure, Measurement
from mariotte.models.model import Model
from mariotte.models.nll import TOKENS_AT_ONCE, scored_nll, token_nll

__all__ = ["Loss"]

Windows = Literal["packed", "documents"]


@functools.lru_cache(maxsize=32)
def _blocks(
    corpus: str,
    text: str,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    hashed: str,
    block: int,
    stride: int | None,
    rows: int | None,
    context: Context | None,
) -> Blocks:
    """The blocks, read once for all models of one tokenizer, as long as the text's fingerprint is the same.

    ``context`` is None for documents that are joined.
    """
    if context is None:
        return tokens.read(corpora.find(corpus), split, tokenizer, block, rows, stride=stride)
    return tokens.read_documents(corpora.find(corpus), split, tokenizer, block, rows, stride=stride, context=context)


@dataclass(frozen=True, kw_only=True)
class Loss(Measure):
    """Mean negative log-likelihood of a corpus.

    Parameters
    ----------
    on : corpus
    split : test, valid, calibration or train
    block : tokens a window; None takes the corpus' own (64 for the testbed, 512 for text), or fewer for a short model
    rows : windows scored, or documents where each is scored by itself; None scores the whole split
    windows : ``packed`` joins documents, a separator before each, and cuts them into windows of equal length;
        ``documents`` cuts each document by itself, its separator before it
    stride : tokens from a window to the next. None leaves no overlap when packed, and one token by documents. Where
        windows overlap, each token is scored once, in the first window that holds it

    Notes
    -----
    Every token that a window scores is scored given those before it in the window. Packed windows without overlap
    score all but their first token, which is context only: quick, and the rule unless another is asked for. With a
    stride below the block every token but the first of all is scored, after at least ``block - stride`` tokens.
    By documents, every token of a text is scored, the first given the separator; ``windows=documents, block=n+1`` is
    what lm-eval's ``loglikelihood_rolling`` computes with a maximal length of n.

    Bits per byte divide by the UTF-8 bytes of exactly the scored tokens. ``loss_se`` is the standard error of the loss
    over windows, or over documents where each is scored by itself, where there are two or more.

    The details keep for each document, in the corpus' order, the sum of its losses in nats (to five decimals), its
    scored tokens and their bytes; a separator belongs to the document after it.
    """

    split: str = "test"
    block: int | None = None
    rows: int | None = None
    windows: str = "packed"
    stride: int | None = None

    metrics: ClassVar = {"loss": "loss", "bits_per_byte": "loss"}

    def __post_init__(self) -> None:
        for name, value, known in (
            ("split", self.split, get_args(Split)),
            ("windows", self.windows, get_args(Windows)),
        ):
            if value not in known:
                raise ChainError(f"loss: {name} must be one of {', '.join(known)}, got {value!r}")
        for name, value, least in (("block", self.block, 2), ("rows", self.rows, 1), ("stride", self.stride, 1)):
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

    def _block(self, model: Model) -> int:
        block = self.block or tokens.usual_block(corpora.find(self.on), model)
        tokens.check_block(block, model, "loss")
        most = block - (self.windows == "documents")
        if self.stride is not None and self.stride > most:
            raise DataError(
                f"loss: a stride of {self.stride} leaves out tokens between windows of {block}: ask for at most {most}"
            )
        return block

    def _read(self, model: Model) -> Blocks:
        if model.tokenizer is None:
            raise DataError(
                f"{model.name} has no tokenizer: put tokenizer.json into its folder to measure a loss on text"
            )
        block = self._block(model)
        hashed = tokens.tokenizer_hash(model.tokenizer)
        split = cast(Split, self.split)
        text = corpora.find(self.on).fingerprint(split)
        context = None if self.windows == "packed" else "separator"
        return _blocks(self.on, text, split, model.tokenizer, hashed, block, self.stride, self.rows, context)

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        found, block = self._read(model), self._block(model)
        apart = self.windows == "documents"
        stride = self.stride or (block - 1 if apart else block)
        protocol = {
            **found.protocol(),
            "block": block,
            "stride": stride,
            "first_token": "context only",
            "scored_tokens": int(found.scored.sum()),
            "scored_bytes": int(found.n_bytes[found.scored].sum()),
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }
        # Said only where it is not the rule of packed windows without overlap, whose records are older than the choice.
        if apart:
            protocol["windows"] = "each document by itself, its last window as long as the others"
            protocol["documents"] = found.n_documents
            if found.separator is not None:
                protocol["first_token"] = "scored after the separator"
        if stride < block:
            protocol["overlap"] = "context only"
        return protocol

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        found = self._read(model)
        if self.windows == "packed" and (self.stride or found.tokens.shape[1]) == found.tokens.shape[1]:
            # Batches, shapes and order are part of a float's last bits: those of every record so far.
            batch = max(1, TOKENS_AT_ONCE // found.tokens.shape[1])
            nll_M = token_nll(model, found.tokens, batch=batch).double().flatten()
        else:
            nll_M = scored_nll(model, found.tokens, found.scored, found.lengths).double()
        n_bytes = int(found.n_bytes[found.scored].sum())
        if not n_bytes:
            raise DataError(
                f"loss: the scored tokens of {self.on!r} stand for no text; is its tokenizer's separator all there is?"
            )
        metrics = {"loss": float(nll_M.mean()), "bits_per_byte": float(nll_M.sum()) / math.log(2) / n_bytes}
        documents_M = found.documents[found.scored]
        # Neighbouring packed windows may come from one document: over them the error is a lower bound.
        windows_M = found.scored.nonzero()[:, 0]
        if (error := _standard_error(nll_M, windows_M if self.windows == "packed" else documents_M)) is not None:
            metrics["loss_se"] = error
        details = {"documents": _by_document(nll_M, documents_M, found.n_bytes[found.scored], found.n_documents)}
        return Measurement(metrics=metrics, protocol=self.protocol(model), details=details)


def _standard_error(nll_M: Tensor, groups_M: Tensor) -> float | None:
    """Standard error of the mean over tokens that come in groups, by linearising the ratio of sums; None for one group.

    For groups of equal size it is the standard deviation of their means over the root of their number.
    """
    groups_M = cast(Tensor, groups_M.unique(return_inverse=True)[1])
    n_tokens_G = torch.bincount(groups_M)
    count = len(n_tokens_G)
    if count < 2:
        return None
    residuals_G = torch.bincount(groups_M, weights=nll_M - nll_M.mean())
    return float((residuals_G.square().sum() * count / (count - 1)).sqrt() / n_tokens_G.sum())


def _by_document(nll_M: Tensor, documents_M: Tensor, bytes_M: Tensor, count: int) -> dict[str, list[float] | list[int]]:
    """Sums over the scored tokens of each document, in the corpus' order."""

    def sums(values_M: Tensor | None = None) -> list[float]:
        found_D = torch.bincount(documents_M, weights=values_M, minlength=count)
        return cast("list[float]", found_D.tolist())

    return {
        "nll": [round(value, 5) for value in sums(nll_M)],
        "tokens": [int(value) for value in sums()],
        "bytes": [int(value) for value in sums(bytes_M.double())],
    }
