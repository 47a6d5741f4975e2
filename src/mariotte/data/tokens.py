"""Packed blocks: documents tokenized, joined and cut into rows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mariotte.data.corpora import Corpus, Split
from mariotte.errors import DataError
from mariotte.models.model import Model

CHARACTERS_AT_ONCE = 1 << 17
"""Text handed to the tokenizer at once: a reader that wants a few rows never waits for hundreds of long documents."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Rows of tokens with what identifies them.

    Parameters
    ----------
    tokens : (n, T) int64 token ids
    n_bytes : (n, T) int64, UTF-8 bytes of text that each token stands for; 0 for a separator
    corpus, split : where they come from
    sha256 : of the token ids, shape included: equal hashes mean equal rows
    tokenizer : SHA-256 of the tokenizer
    separator : the token put before every document, or None
    """

    tokens: Tensor
    n_bytes: Tensor
    corpus: str
    split: Split
    sha256: str
    tokenizer: str
    separator: str | None

    def protocol(self) -> dict[str, Any]:
        """What of these rows is part of every number measured on them."""
        return {
            "corpus": self.corpus,
            "split": self.split,
            "tokens_sha256": self.sha256,
            "tokenizer_sha256": self.tokenizer,
            "separator": self.separator,
            "rows": self.tokens.shape[0],
            "block": self.tokens.shape[1],
        }


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything a fast tokenizer does.

    Raises
    ------
    DataError
        For a tokenizer without the fast backend, whose byte counts cannot be had.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{type(tokenizer).__name__} has no tokenizer.json: convert it to a fast tokenizer first")
    return hashlib.sha256(cast(str, backend.to_str()).encode()).hexdigest()


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token put before every document: the beginning-of-text token, else end-of-text, else none."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return cast("int | None", found)


def _document_bytes(document: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes from the end of one token to the end of the next, so that skipped spaces count with the word after them."""
    if not document.isascii():
        widths = np.fromiter((len(c.encode()) for c in document), np.int64, len(document))
        ends = np.concatenate(([0], np.cumsum(widths)))[ends]
    return np.diff(ends, prepend=0)


def usual_block(corpus: Corpus, model: Model) -> int:
    """Tokens a window unless asked otherwise: the corpus' own number, or the model's positions if they are fewer."""
    longest = model.config.get("max_position_embeddings")
    return min(corpus.block, longest) if isinstance(longest, int) else corpus.block


def check_block(block: int, model: Model, who: str) -> None:
    """Refuse windows of text that a model has no positions for.

    Raises
    ------
    DataError
        When `block` tokens are more than the model's positions; says that `who` asked.
    """
    longest = model.config.get("max_position_embeddings")
    if isinstance(longest, int) and block > longest:
        raise DataError(
            f"{who}: a window of {block} tokens is longer than the {longest} positions of {model.name}: "
            "ask for a shorter block"
        )


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenized(
    corpus: Corpus, split: Split, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Token ids and byte counts of each document, separator first."""
    separator = separator_of(tokenizer)
    for batch in _batches(corpus.documents(split)):
        found = tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids_of, offsets_of = cast("list[list[int]]", found["input_ids"]), cast("list[Any]", found["offset_mapping"])
        for document, ids, offsets in zip(batch, ids_of, offsets_of, strict=True):
            ends = np.asarray([end for _, end in offsets], np.int64)
            tokens, n_bytes = np.asarray(ids, np.int64), _document_bytes(document, ends)
            if separator is not None:
                tokens, n_bytes = np.insert(tokens, 0, separator), np.insert(n_bytes, 0, 0)
            yield tokens, n_bytes


def read(
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    count: int | None = None,
    *,
    at_most: bool = False,
) -> Blocks:
    """Documents of a split, tokenized, joined end to end and cut into rows; what does not fill a row is left out.

    Parameters
    ----------
    corpus, split : where the text comes from
    tokenizer : of the model; the separator (see `separator_of`) goes before every document
    block : tokens a row, T
    count : rows wanted; None takes all that the split holds
    at_most : take all that the split holds where it holds fewer than `count`, but at least one

    Raises
    ------
    DataError
        When the model has no tokenizer, or the split holds not one row or, unless `at_most`, fewer than asked for.
    """
    if tokenizer is None:
        raise DataError(
            f"corpus {corpus.name!r} cannot be read without a tokenizer: put tokenizer.json into the model folder"
        )
    if block < 2:
        raise DataError(f"a block must hold at least 2 tokens, got {block}")
    hashed = tokenizer_hash(tokenizer)
    wanted = None if count is None else count * block
    tokens: list[NDArray[np.int64]] = []
    n_bytes: list[NDArray[np.int64]] = []
    total = 0
    for document_tokens, document_bytes in _tokenized(corpus, split, tokenizer):
        tokens.append(document_tokens)
        n_bytes.append(document_bytes)
        total += len(document_tokens)
        if wanted is not None and total >= wanted:
            break
    rows = total // block
    if count is not None:
        rows = min(rows, count) if at_most else count
    if total < max(rows, 1) * block:
        least = f"{rows:,} blocks" if rows > 1 else "one block"
        advice = "it is empty; give it text" if not total else "give it more text, or ask for fewer or shorter blocks"
        raise DataError(
            f"the {split} split of corpus {corpus.name!r} holds {total:,} tokens, "
            f"fewer than {least} of {block}: {advice}"
        )

    def packed(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.concatenate(parts)[: rows * block].reshape(rows, block)

    ids = packed(tokens)
    separator = separator_of(tokenizer)
    return Blocks(
        tokens=torch.from_numpy(ids),
        n_bytes=torch.from_numpy(packed(n_bytes)),
        corpus=corpus.name,
        split=split,
        sha256=hashlib.sha256(repr(ids.shape).encode() + np.ascontiguousarray(ids, "<i4").tobytes()).hexdigest(),
        tokenizer=hashed,
        separator=None if separator is None else cast(str, tokenizer.convert_ids_to_tokens(separator)),
    )


def blocks(
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    block: int = 64,
    count: int | None = None,
    *,
    at_most: bool = False,
) -> Tensor:
    """The tokens of `read`, (n, T)."""
    return read(corpus, split, tokenizer, block, count, at_most=at_most).tokens
