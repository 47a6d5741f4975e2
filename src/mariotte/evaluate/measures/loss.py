"""Test loss: mean negative log-likelihood in nats per token, and bits per byte so that tokenizers compare."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from mariotte.architectures import Kind
from mariotte.data import corpora, tokens
from mariotte.data.corpora import Split
from mariotte.data.tokens import Blocks, Context
from mariotte.errors import ChainError, DataError
from mariotte.evaluate.base import Measure, Measurement, MetricKind, batch_by_batch
from mariotte.models.model import Model
from mariotte.models.nll import TOKENS_AT_ONCE, conditional_nll, hidden_nll, scored_nll, token_nll

__all__ = ["Loss"]

Windows = Literal["packed", "documents"]
Objective = Literal["next", "masked", "pseudo", "conditional"]

OBJECTIVES: Mapping[str, tuple[Objective, ...]] = {
    "causal": ("next",),
    "masked": ("masked", "pseudo"),
    "seq2seq": ("conditional", "pseudo"),
}
"""What can be asked of each kind of model, the usual one first."""

SENTINEL = "<extra_id_0>"
"""What encoder-decoders with sentinels read in the place of the first gap, and write before what belongs there."""

Hidden = list[tuple[int, list[int]]]
"""For each time that a row is read, its number and the places in it that are hidden together."""


@functools.lru_cache(maxsize=32)
def _blocks(
    corpus: str,
    text: str,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    hashed: str,
    block: int,
    stride: int,
    rows: int | None,
    context: Context | None,
) -> Blocks:
    """The blocks, read once for all models of one tokenizer, as long as the text's fingerprint is the same.

    ``context`` is None for documents that are joined.
    """
    if context is None:
        return tokens.read(corpora.find(corpus), split, tokenizer, block, rows, stride=stride)
    return tokens.read_documents(corpora.find(corpus), split, tokenizer, block, rows, stride=stride, context=context)


class _Cut(NamedTuple):
    """How text is cut for one model.

    Parameters
    ----------
    objective : what is asked of the model
    block : tokens of a window, special ones among them
    room : tokens of text in it
    stride : tokens from a window to the next
    context : of documents by themselves, what is not scored; None for documents that are joined
    before, after : special tokens around a text
    """

    objective: Objective
    block: int
    room: int
    stride: int
    context: Context | None
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Loss(Measure):
    """Mean negative log-likelihood of a corpus, for every kind of model.

    Parameters
    ----------
    on : corpus
    split : test, valid, calibration or train
    block : tokens a window; None takes the corpus' own (64 for the testbed, 512 for text), or fewer for a short model
    rows : windows scored, or documents where each is scored by itself; None scores the whole split
    windows : ``packed`` joins documents, a separator before each, and cuts them into windows of equal length;
        ``documents`` cuts each document by itself. None takes packed for causal models; all others go by documents
    stride : tokens from a window to the next; None takes as many as leave out no token that can be scored. Where
        windows overlap, each token is scored once, in the first window that holds it
    objective : what is asked, see the notes; None takes ``next`` of causal models, ``masked`` of encoders,
        ``conditional`` of encoder-decoders
    mask_rate : of ``masked``, share of a window's scored tokens that are hidden at once, at least one token
    draws : of ``masked``, times that each window is read, with other tokens hidden; ``1 / mask_rate`` hide all once
    seed : of ``masked``, which tokens are hidden

    Notes
    -----
    *next.* Every token that a window scores is scored given those before it in the window. Packed windows without
    overlap score all but their first token, which is context only: quick, and the rule unless another is asked for.
    With a stride below the block every token but the first of all is scored, after at least ``block - stride`` tokens.
    By documents, every token of a text is scored, the first given the separator; ``windows=documents, block=n+1`` is
    what lm-eval's ``loglikelihood_rolling`` computes with a maximal length of n.

    *masked.* A window is a piece of one document between the tokenizer's special tokens. Of its n scored tokens
    ``round(mask_rate n)`` are chosen without replacement, all are replaced by the mask (never by other words or by
    themselves, as in training), and scored given all the others. The choice depends on the seed and the number of the
    window alone, and its hash is part of the protocol, so that models are compared on the same tokens.

    *pseudo.* Pseudo-log-likelihood [salazar2020masked]_: every token is hidden alone and scored given all the others
    of its window, one forward pass a token. Encoders read their mask; encoder-decoders read their first sentinel, and
    are scored on the token that they write after it, which is how T5's kind was trained. It is no likelihood of the
    text: not to be compared with a causal loss.

    *conditional.* The encoder reads what comes before the scored tokens of a window, between the tokenizer's special
    tokens; the decoder is scored on the rest, each token given those before. The first window of a document is read to
    its half; with the usual stride of half a block, all later tokens of the document are scored. No end is asked for.

    Bits per byte divide by the UTF-8 bytes of exactly the scored tokens. ``loss_se`` is the standard error of the loss
    over windows, or over documents where each is scored by itself, where there are two or more.

    The details keep for each document, in the corpus' order, the sum of its losses in nats (to five decimals), its
    scored tokens and their bytes; a separator belongs to the document after it.

    References
    ----------
    .. [salazar2020masked] section 2.
    """

    split: str = "test"
    block: int | None = None
    rows: int | None = None
    windows: str | None = None
    stride: int | None = None
    objective: str | None = None
    mask_rate: float = 0.15
    draws: int = 1
    seed: int = 0

    metrics: ClassVar = {"loss": "loss", "bits_per_byte": "loss"}

    def __post_init__(self) -> None:
        choices = (
            ("split", self.split, get_args(Split)),
            ("windows", self.windows, (None, *get_args(Windows))),
            ("objective", self.objective, (None, *get_args(Objective))),
        )
        for name, value, known in choices:
            if value not in known:
                raise ChainError(f"loss: {name} must be one of {', '.join(filter(None, known))}, got {value!r}")
        least_of = (("block", self.block, 2), ("rows", self.rows, 1), ("stride", self.stride, 1))
        for name, value, least in (*least_of, ("draws", self.draws, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise ChainError(f"loss: {name} must be at least {least}, got {value}")
        if not 0 < self.mask_rate <= 1:
            raise ChainError(f"loss: mask_rate must be above 0 and at most 1, got {self.mask_rate}")

    @property
    @override
    def finds(self) -> Mapping[str, MetricKind]:
        return self.metrics

    @property
    @override
    def tokens(self) -> int:
        corpus = corpora.find(self.on)
        block = self.block or corpus.block
        reads = block if self.objective == "pseudo" else self.draws
        return (self.rows or 400) * block * reads  # a test split has some hundred blocks

    @override
    def check(self) -> None:
        corpora.find(self.on).fingerprint(cast(Split, self.split))

    @override
    def whole(self, kind: Kind) -> str | None:
        return batch_by_batch(kind)

    def _cut(self, model: Model) -> _Cut:
        """How this measure cuts text for a model."""
        if model.tokenizer is None:
            raise DataError(
                f"{model.name} has no tokenizer: put tokenizer.json into its folder to measure a loss on text"
            )
        possible = OBJECTIVES[model.kind]
        objective = cast("Objective", self.objective or possible[0])
        if objective not in possible:
            raise DataError(
                f"loss: {model.name} is a {model.kind} model, which cannot be asked for objective={objective}: "
                f"ask for {' or '.join(possible)}"
            )
        apart = self.windows == "documents" if model.kind == "causal" else True
        if self.windows == "packed" and apart:
            raise DataError(
                f"loss: {model.name} is a {model.kind} model, whose windows are pieces of one document: "
                "leave windows out, or ask for windows=documents"
            )
        block = self.block or tokens.usual_block(corpora.find(self.on), model)
        tokens.check_block(block, model, "loss")
        before, after = ((), ()) if objective == "next" else tokens.frame(model.tokenizer)
        room = block if objective in ("next", "conditional") else block - len(before) - len(after)
        if room < 1:
            raise DataError(
                f"loss: a window of {block} tokens has no room for text beside {len(before + after)} special ones: "
                "ask for a longer block"
            )
        context: Context | None = None
        unscored = 0
        if objective == "conditional":
            context, unscored = "half", room // 2
        elif objective != "next":
            context = "none"
        elif apart:
            context, unscored = "separator", 1
        if self.stride is not None and self.stride > room - unscored:
            raise DataError(
                f"loss: a stride of {self.stride} leaves out tokens between windows of {block}: "
                f"ask for at most {room - unscored}"
            )
        return _Cut(objective, block, room, self.stride or room - unscored, context, before, after)

    def _read(self, model: Model, cut: _Cut) -> Blocks:
        tokenizer = cast(PreTrainedTokenizerBase, model.tokenizer)
        hashed = tokens.tokenizer_hash(tokenizer)
        split = cast(Split, self.split)
        text = corpora.find(self.on).fingerprint(split)
        return _blocks(self.on, text, split, tokenizer, hashed, cut.room, cut.stride, self.rows, cut.context)

    def _mask(self, model: Model) -> int:
        """The token that hides another."""
        tokenizer = cast(PreTrainedTokenizerBase, model.tokenizer)
        if model.kind == "masked":
            found, wanted = tokenizer.mask_token_id, "mask token"
        else:
            found, wanted = cast("Mapping[str, int]", tokenizer.get_vocab()).get(SENTINEL), f"sentinel {SENTINEL}"
        if found is None:
            raise DataError(
                f"loss: the tokenizer of {model.name} has no {wanted} to hide tokens with: "
                "add it to its tokenizer, or measure another model"
            )
        return cast(int, found)

    def _hidden(self, cut: _Cut, found: Blocks) -> Hidden:
        """Which tokens of each row are hidden at once, every time that it is read."""
        hidden: Hidden = []
        for row, scored_T in enumerate(found.scored):
            places = scored_T.nonzero().flatten().numpy()
            size = 1
            if cut.objective == "masked":
                size = max(1, round(self.mask_rate * len(places)))
                places = places[np.argsort(np.random.default_rng([self.seed, row]).random(len(places)))]
                places = places[: size * self.draws]
            hidden += [(row, sorted(places[start : start + size].tolist())) for start in range(0, len(places), size)]
        return hidden

    def _scored(self, cut: _Cut, found: Blocks) -> tuple[Tensor, Tensor]:
        """(M,), (M,) row and place of each scored token, in the order that `_losses` gives their losses."""
        if cut.objective in ("masked", "pseudo"):
            hidden = self._hidden(cut, found)
            pairs = [(row, place) for row, places in hidden for place in places]
            return torch.tensor([row for row, _ in pairs]), torch.tensor([place for _, place in pairs])
        rows_M, places_M = found.scored.nonzero().unbind(1)
        return rows_M, places_M

    @override
    def protocol(self, model: Model) -> dict[str, Any]:
        cut = self._cut(model)
        found = self._read(model, cut)
        return self._stated(model, cut, found, self._scored(cut, found))

    def _stated(self, model: Model, cut: _Cut, found: Blocks, scored: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """The protocol of what was read and is scored."""
        protocol = {
            **found.protocol(),
            "block": cut.block,
            "stride": cut.stride,
            "first_token": "context only",
            "scored_tokens": len(scored[0]),
            "scored_bytes": int(found.n_bytes[scored].sum()),
            "dtype": str(model.hf.dtype).removeprefix("torch."),
        }
        # Said only where it is not the rule of packed windows without overlap, whose records are older than the choice.
        if cut.context is not None:
            protocol["windows"] = "each document by itself, its last window as long as the others"
            protocol["documents"] = found.n_documents
        if found.separator is not None and cut.context == "separator":
            protocol["first_token"] = "scored after the separator"
        if cut.stride < cut.room:
            protocol["overlap"] = "context only"
        if cut.objective != "next":
            tokenizer = cast(PreTrainedTokenizerBase, model.tokenizer)
            names = [cast("list[str]", tokenizer.convert_ids_to_tokens([*part])) for part in (cut.before, cut.after)]
            protocol |= {"objective": cut.objective, "special_tokens": {"before": names[0], "after": names[1]}}
            if cut.objective == "conditional":
                protocol["input"] = "what comes before the scored tokens of a window: the first half of a first one"
                protocol["target"] = "the scored tokens, without an end"
            else:
                protocol["first_token"] = "scored"
                protocol["mask"] = cast(str, tokenizer.convert_ids_to_tokens(self._mask(model)))
                protocol["hidden"] = "one token at a time"
            if cut.objective == "masked":
                protocol["hidden"] = "round(rate x tokens of a window), at least one, all replaced by the mask"
                drawn = np.stack([part.numpy() for part in scored]).astype("<i4")
                protocol |= {"mask_rate": self.mask_rate, "draws": self.draws, "seed": self.seed}
                protocol["hidden_sha256"] = hashlib.sha256(drawn.tobytes()).hexdigest()
        return protocol

    def _losses(self, model: Model, cut: _Cut, found: Blocks) -> Tensor:
        """(M,) float32 losses of the scored tokens, in the order of `_scored`."""
        block = found.tokens.shape[1]
        if cut.context is None and cut.stride == block:
            # Batches, shapes and order are part of a float's last bits: those of every record so far.
            return token_nll(model, found.tokens, batch=max(1, TOKENS_AT_ONCE // block)).flatten()
        if cut.objective == "next":
            return scored_nll(model, found.tokens, found.scored, found.lengths)
        before, after = torch.tensor(cut.before, dtype=torch.int64), torch.tensor(cut.after, dtype=torch.int64)
        rows = [row_T[: int(length)] for row_T, length in zip(found.tokens, found.lengths, strict=True)]
        if cut.objective == "conditional":
            firsts = [int(first) for first in found.scored.int().argmax(1)]
            sources = [torch.cat([before, row_T[:first], after]) for row_T, first in zip(rows, firsts, strict=True)]
            return conditional_nll(model, sources, [row_T[first:] for row_T, first in zip(rows, firsts, strict=True)])
        framed = [torch.cat([before, row_T, after]) for row_T in rows]
        hidden = [(row, [len(before) + place for place in places]) for row, places in self._hidden(cut, found)]
        return hidden_nll(model, framed, hidden, self._mask(model))

    @override
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        # Each once: the tokenizer's hash and the config are as long as their files.
        cut = self._cut(model)
        found = self._read(model, cut)
        scored = self._scored(cut, found)
        bytes_M, documents_M = found.n_bytes[scored], found.documents[scored]
        nll_M = self._losses(model, cut, found).double()
        n_bytes = int(bytes_M.sum())
        if not n_bytes:
            raise DataError(
                f"loss: the scored tokens of {self.on!r} stand for no text; is its tokenizer's separator all there is?"
            )
        metrics = {"loss": float(nll_M.mean()), "bits_per_byte": float(nll_M.sum()) / math.log(2) / n_bytes}
        # Neighbouring packed windows may come from one document: over them the error is a lower bound.
        if (error := _standard_error(nll_M, scored[0] if cut.context is None else documents_M)) is not None:
            metrics["loss_se"] = error
        details = {"documents": _by_document(nll_M, documents_M, bytes_M, found.n_documents)}
        return Measurement(metrics=metrics, protocol=self._stated(model, cut, found, scored), details=details)


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
