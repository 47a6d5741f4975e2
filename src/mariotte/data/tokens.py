"""Packed blocks: documents tokenized, joined and cut into rows of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

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
    documents : (n, T) int64, number of the document that each token belongs to, a separator to the one after it
    scored : (n, T) bool, tokens that this row is there to score; each token is scored in one row at most
    lengths : (n,) int64, tokens of each row; what follows them is padding
    n_documents : documents read, from the first
    corpus, split : where they come from
    sha256 : of the token ids, shape included: equal hashes mean equal rows
    tokenizer : SHA-256 of the tokenizer
    separator : the token put before every document, or None
    """

    tokens: Tensor
    n_bytes: Tensor
    documents: Tensor
    scored: Tensor
    lengths: Tensor
    n_documents: int
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
        codes = np.frombuffer(document.encode("utf-32-le"), "<u4")
        widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        ends = np.concatenate(([0], np.cumsum(widths)))[ends]
    return np.diff(ends, prepend=0)


def usual_block(corpus: Corpus, model: Model) -> int:
    """Tokens a window unless asked otherwise: the corpus' own number, or the model's positions if they are fewer."""
    return corpus.block if model.longest is None else min(corpus.block, model.longest)


def check_block(block: int, model: Model, who: str) -> None:
    """Refuse windows of text that a model has no positions for.

    Raises
    ------
    DataError
        When `block` tokens are more than the model's positions; says that `who` asked.
    """
    if model.longest is not None and block > model.longest:
        raise DataError(
            f"{who}: a window of {block} tokens is longer than the {model.longest} positions of {model.name}: "
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
    corpus: Corpus, split: Split, tokenizer: PreTrainedTokenizerBase, *, separated: bool = True
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Token ids and byte counts of each document, separator first where documents are to be `separated`."""
    separator = separator_of(tokenizer) if separated else None
    for batch in _batches(corpus.documents(split)):
        found = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids_of, offsets_of = cast("list[list[int]]", found["input_ids"]), cast("list[Any]", found["offset_mapping"])
        for document, ids, offsets in zip(batch, ids_of, offsets_of, strict=True):
            ends = np.asarray([end for _, end in offsets], np.int64)
            tokens, n_bytes = np.asarray(ids, np.int64), _document_bytes(document, ends)
            if separator is not None:
                tokens, n_bytes = np.insert(tokens, 0, separator), np.insert(n_bytes, 0, 0)
            yield tokens, n_bytes


def _required(corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None, block: int) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError(
            f"corpus {corpus.name!r} cannot be read without a tokenizer: put tokenizer.json into the model folder"
        )
    if block < 2:
        raise DataError(f"a block must hold at least 2 tokens, got {block}")
    return tokenizer


def _hash_rows(ids_NT: NDArray[np.int64]) -> str:
    return hashlib.sha256(repr(ids_NT.shape).encode() + np.ascontiguousarray(ids_NT, "<i4").tobytes()).hexdigest()


def _name_of(separator: int | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    return None if separator is None else cast(str, tokenizer.convert_ids_to_tokens(separator))


def read(
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    count: int | None = None,
    *,
    at_most: bool = False,
    stride: int | None = None,
) -> Blocks:
    """Documents of a split, tokenized, joined end to end and cut into rows; what does not fill a row is left out.

    Parameters
    ----------
    corpus, split : where the text comes from
    tokenizer : of the model; the separator (see `separator_of`) goes before every document
    block : tokens a row, T
    count : rows wanted; None takes all that the split holds
    at_most : take all that the split holds where it holds fewer than `count`, but at least one
    stride : tokens from the start of a row to the start of the next; None for `block`, so that rows share no token.
        Of a row that overlaps the one before it only the last `stride` tokens are scored, so that each token is scored
        once, with at least ``block - stride`` tokens of context; of any other row, all but its first

    Raises
    ------
    DataError
        When the model has no tokenizer, or the split holds not one row or, unless `at_most`, fewer than asked for.
    """
    tokenizer = _required(corpus, tokenizer, block)
    step = block if stride is None else stride
    hashed = tokenizer_hash(tokenizer)
    wanted = None if count is None else block + (count - 1) * step
    tokens: list[NDArray[np.int64]] = []
    n_bytes: list[NDArray[np.int64]] = []
    total = 0
    for document_tokens, document_bytes in _tokenized(corpus, split, tokenizer):
        tokens.append(document_tokens)
        n_bytes.append(document_bytes)
        total += len(document_tokens)
        if wanted is not None and total >= wanted:
            break
    rows = 0 if total < block else (total - block) // step + 1
    if count is not None:
        rows = min(rows, count) if at_most else count
    if total < block + (max(rows, 1) - 1) * step:
        least = f"{rows:,} blocks" if rows > 1 else "one block"
        advice = "it is empty; give it text" if not total else "give it more text, or ask for fewer or shorter blocks"
        raise DataError(
            f"the {split} split of corpus {corpus.name!r} holds {total:,} tokens, "
            f"fewer than {least} of {block}: {advice}"
        )
    places_NT = torch.arange(rows)[:, None] * step + torch.arange(block)

    def packed(parts: list[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts))[places_NT]

    ids_NT = packed(tokens)
    documents_NT = packed([np.full(len(part), number, np.int64) for number, part in enumerate(tokens)])
    scored_NT = torch.ones(rows, block, dtype=torch.bool)
    scored_NT[:, 0] = False
    if step < block:
        scored_NT[1:, : block - step] = False
    return Blocks(
        tokens=ids_NT,
        n_bytes=packed(n_bytes),
        documents=documents_NT,
        scored=scored_NT,
        lengths=torch.full((rows,), block),
        n_documents=int(documents_NT.max()) + 1,
        corpus=corpus.name,
        split=split,
        sha256=_hash_rows(ids_NT.numpy()),
        tokenizer=hashed,
        separator=_name_of(separator_of(tokenizer), tokenizer),
    )


def windows(n_tokens: int, block: int, stride: int, *, context: int = 0) -> list[tuple[int, int, int]]:
    """Windows over a text that score each of its tokens once, as (start, first scored, end) of each.

    Parameters
    ----------
    n_tokens : of the text
    block : tokens of the longest window
    stride : tokens scored by every window after the first, at most ``block - context``; the last one may score fewer
    context : tokens at the beginning of the text that are not scored: 1 where the first has none before it

    Notes
    -----
    The last window ends where the text ends and is as long as the others, so that its tokens have as much context as
    any: lm-eval's rolling windows of n tokens are those of ``block = n + 1, stride = n, context = 1``.
    """
    assert 1 <= stride <= block - context, f"stride {stride} of blocks of {block} with context {context}"
    if n_tokens <= context:
        return []
    found = [(0, context, min(block, n_tokens))]
    while (done := found[-1][2]) < n_tokens:
        end = min(done + stride, n_tokens)
        found.append((max(0, end - block), done, end))
    return found


Context = Literal["separator", "none", "half"]
"""What of a document stands before the first token scored: its separator, nothing, or the first half."""


def read_documents(
    corpus: Corpus,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    count: int | None = None,
    *,
    stride: int | None = None,
    context: Context = "separator",
) -> Blocks:
    """Documents of a split, each tokenized and cut into rows by itself; rows are as long as what they hold.

    Parameters
    ----------
    corpus, split, tokenizer : as in `read`
    block : tokens of the longest row
    count : documents wanted, from the first; None takes all
    stride : tokens scored by each row of a document after its first, see `windows`; None for as many as leave room for
        the context of a first row
    context : ``separator``: the separator goes before each document as the context of its first token, and where the
        tokenizer has none, the first token is context itself. ``none``: every token is scored, for models that see
        both sides of it. ``half``: of the first row of a document the first half is not scored

    Raises
    ------
    DataError
        When the model has no tokenizer, the split has fewer documents than asked for, or not one token to score.
    """
    tokenizer = _required(corpus, tokenizer, block)
    hashed = tokenizer_hash(tokenizer)
    rows: list[tuple[NDArray[np.int64], NDArray[np.int64], int, int]] = []
    n_documents = 0

    def unscored(n_tokens: int) -> int:
        return {"separator": 1, "none": 0, "half": max(1, min(block, n_tokens) // 2)}[context]

    step = block - unscored(block) if stride is None else stride
    for ids, n_bytes in _tokenized(corpus, split, tokenizer, separated=context == "separator"):
        if n_documents == count:
            break
        for start, first, end in windows(len(ids), block, step, context=unscored(len(ids))):
            rows.append((ids[start:end], n_bytes[start:end], first - start, n_documents))
        n_documents += 1
    if count is not None and n_documents < count:
        raise DataError(
            f"the {split} split of corpus {corpus.name!r} holds {n_documents:,} documents, fewer than {count:,}: "
            "give it more text, or ask for fewer rows"
        )
    if not rows:
        raise DataError(f"the {split} split of corpus {corpus.name!r} holds no token to score: give it text")
    lengths_N = torch.tensor([len(ids) for ids, *_ in rows])
    ids_NT, bytes_NT = (torch.zeros(len(rows), int(lengths_N.max()), dtype=torch.int64) for _ in range(2))
    documents_NT = torch.tensor([document for *_, document in rows])[:, None].expand_as(ids_NT)
    for number, (ids, n_bytes, _, _) in enumerate(rows):
        ids_NT[number, : len(ids)] = torch.from_numpy(ids)
        bytes_NT[number, : len(ids)] = torch.from_numpy(n_bytes)
    first_N = torch.tensor([first for _, _, first, _ in rows])
    places_T = torch.arange(ids_NT.shape[1])
    return Blocks(
        tokens=ids_NT,
        n_bytes=bytes_NT,
        documents=documents_NT,
        scored=(places_T >= first_N[:, None]) & (places_T < lengths_N[:, None]),
        lengths=lengths_N,
        n_documents=n_documents,
        corpus=corpus.name,
        split=split,
        sha256=_hash_rows(np.concatenate([lengths_N.numpy()[:, None], ids_NT.numpy()], axis=1)),
        tokenizer=hashed,
        separator=_name_of(separator_of(tokenizer) if context == "separator" else None, tokenizer),
    )


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after one text: ``[CLS]`` and ``[SEP]``, none and ``</s>``.

    Raises
    ------
    DataError
        When its rule changes the text between them, so that it cannot be told where they end.
    """
    bare = cast("list[int]", tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = cast("list[int]", tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise DataError(
        f"the special tokens that {type(tokenizer).__name__} puts around a text cannot be told from it: "
        "its tokenizer.json needs a post-processor that leaves the text as it is"
    )


PADDING = -1
"""What follows the tokens of a shorter row in `hidden`; no token."""

MASK_RATE = 0.15
"""Share of a window's tokens that an encoder does not see, as in its training."""


def hidden(found: Blocks, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Rows of tokens as an encoder reads them in training: pieces of one document each, some tokens hidden.

    Parameters
    ----------
    found : of `read`, for rows no longer than its
    tokenizer : of the model, with a mask token

    Returns
    -------
    (n, T) ids: each row a piece of a document between the tokenizer's special tokens, of whose n tokens
    ``round(0.15 n)``, at least one, are replaced by the mask; `PADDING` behind it. A function of `found` alone

    Raises
    ------
    DataError
        When the tokenizer has no mask token, or leaves no room beside its special tokens.
    """
    mask = cast("int | None", tokenizer.mask_token_id)
    if mask is None:
        raise DataError(
            f"calibration of an encoder hides tokens, and {type(tokenizer).__name__} has no mask token to do so: "
            "add it to the tokenizer"
        )
    before, after = frame(tokenizer)
    block = found.tokens.shape[1]
    room = block - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"calibration blocks of {block} tokens leave no room beside {block - room} special ones: "
            "ask for longer blocks"
        )
    text_M = (found.n_bytes > 0).flatten()  # all but what separates documents
    ids_M, of_M = found.tokens.flatten()[text_M], found.documents.flatten()[text_M]
    rows: list[Tensor] = []
    lengths = cast("list[int]", cast(Tensor, of_M.unique_consecutive(return_counts=True)[1]).tolist())
    for document_K in torch.split(ids_M, lengths):
        for piece_K in torch.split(document_K, room):
            chosen = np.random.default_rng([0, len(rows)]).permutation(len(piece_K))
            seen_K = piece_K.clone()
            seen_K[torch.from_numpy(chosen[: max(1, round(MASK_RATE * len(piece_K)))])] = mask
            row_T = torch.full((block,), PADDING)
            whole = torch.cat([torch.tensor(before, dtype=torch.int64), seen_K, torch.tensor(after, dtype=torch.int64)])
            row_T[: len(whole)] = whole
            rows.append(row_T)
    return torch.stack(rows)


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
