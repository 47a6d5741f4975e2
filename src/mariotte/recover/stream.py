"""The text that a recovery trains on: how much of it, in what order, read no further than needed.

Shapes: N rows, T tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mariotte.chain import print_number
from mariotte.data import corpora, tokens
from mariotte.errors import ChainError, DataError
from mariotte.models.model import Model

_WINDOW_TOKENS = 1 << 16
"""Text shuffled at once, and so the least that is read: tokenizing it takes a fraction of a second, and rows of about
twenty long articles, or of hundreds of stories, mix."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a number of recovery tokens means in rows and steps.

    Parameters
    ----------
    rows : rows of T tokens seen in all; the last batch holds what is left of them
    steps : steps in all
    leave : step at which the branch leaves the trunk, the last whole batch within 0.9 of the rows
    """

    rows: int
    steps: int
    leave: int

    @property
    def decay(self) -> int:
        """Steps with a falling learning rate; at least one."""
        return self.steps - self.leave


def course(who: str, recovery_tokens: int, block: int, batch: int) -> Course:
    """Rows and steps of a run that sees `recovery_tokens`, rounded down to whole rows.

    Parameters
    ----------
    who : the recovery that asks, for messages
    recovery_tokens : D, tokens seen, decay included
    block : tokens of a row
    batch : rows of a batch

    Raises
    ------
    ChainError
        When there is not one row.
    """
    rows = recovery_tokens // block
    if rows < 1:
        raise ChainError(
            f"{who} must see at least one row of {block} tokens, got {print_number(recovery_tokens)}: "
            f"write {who}@{block} or more, or a shorter block"
        )
    return Course(rows=rows, steps=-(-rows // batch), leave=rows * 9 // (10 * batch))


@dataclass(frozen=True)
class Stream:
    """Rows of text in the order of training: a function of the position alone, whatever is read later.

    Parameters
    ----------
    tokens_NT : (N, T) rows of the training split from its beginning
    window : rows that are shuffled among themselves
    permutation : of (epoch, window, rows in the window)
    """

    tokens_NT: Tensor
    window: int
    permutation: Callable[[int, int, int], Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows at positions from `start` up to `stop`, (stop - start, T)."""
        n = len(self.tokens_NT)
        found: list[Tensor] = []
        while start < stop:
            epoch, index = divmod(start, n)
            window, offset = divmod(index, self.window)
            size = min(self.window, n - window * self.window)
            taken = min(stop - start, size - offset)
            order = self.permutation(epoch, window, size)[offset : offset + taken]
            found.append(self.tokens_NT[window * self.window + order])
            start += taken
        return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Text to train on, not read yet.

    Parameters
    ----------
    name, corpus, tokenizer : what to read, and with what
    text : fingerprint of the training split; another one once the text was edited
    tokenizer_sha256 : of the tokenizer
    """

    name: str
    corpus: corpora.Corpus
    tokenizer: PreTrainedTokenizerBase
    text: str
    tokenizer_sha256: str

    def stream(self, block: int, rows: int, generator: Callable[[int, int], torch.Generator]) -> Stream:
        """The text in the order of training, read at least as far as `rows` rows need.

        Parameters
        ----------
        block : tokens of a row
        generator : of the order of a window, by epoch and window
        """
        window = max(1, _WINDOW_TOKENS // block)
        tokens_NT = _rows("train", self.text, self.tokenizer_sha256, block).first(-(-rows // window) * window, self)

        @functools.lru_cache(maxsize=2)
        def permutation(epoch: int, window: int, size: int) -> Tensor:
            return torch.randperm(size, generator=generator(epoch, window))

        return Stream(tokens_NT, window, permutation)

    def held_out(self, block: int, rows: int) -> Tensor:
        """The first rows of the validation split, or all of them where it holds fewer, (N, T).

        Raises
        ------
        DataError
            When the split holds not one row.
        """
        return _rows("valid", self.corpus.fingerprint("valid"), self.tokenizer_sha256, block).first(rows, self)


def find_source(who: str, name: str | None, model: Model) -> Source:
    """The text to train on.

    Parameters
    ----------
    who : the recovery that asks, for messages
    name : of a corpus

    Raises
    ------
    DataError
        When there is none, or no tokenizer to read it with.
    """
    if name is None:
        raise DataError(f"{who} needs text to train on, got none: name a corpus, such as {who}@1M(corpus=wikitext2)")
    if model.tokenizer is None:
        raise DataError(f"{who} cannot read {name!r} without a tokenizer: put tokenizer.json into the model folder")
    corpus = corpora.find(name)
    return Source(
        name=name,
        corpus=corpus,
        tokenizer=model.tokenizer,
        text=corpus.fingerprint("train"),
        tokenizer_sha256=_tokenizer_sha256(model.tokenizer),
    )


@dataclass
class _Rows:
    """The rows of a split, read from its beginning as far as they were asked for."""

    split: corpora.Split
    block: int
    tokens_NT: Tensor | None = None
    ended: bool = False

    def first(self, rows: int, source: Source) -> Tensor:
        """The first rows, or the whole split where it holds fewer, (N, T)."""
        known = 0 if self.tokens_NT is None else len(self.tokens_NT)
        if self.tokens_NT is None or (known < rows and not self.ended):
            # At least twice as many as before: amounts that grow one by one read the text twice, not over and over.
            wanted = max(rows, 2 * known)
            self.tokens_NT = tokens.blocks(
                source.corpus, self.split, source.tokenizer, self.block, wanted, at_most=True
            )
            self.ended = len(self.tokens_NT) < wanted
        return self.tokens_NT[:rows]


@functools.lru_cache(maxsize=4)
def _rows(split: corpora.Split, text: str, tokenizer_sha256: str, block: int) -> _Rows:
    """The rows of a text with this fingerprint, kept from call to call.

    Every cut of a study recovers on the same rows, and tokenizing them can cost more than a short recovery.
    """
    return _Rows(split, block)


_tokenizer_sha256 = functools.lru_cache(maxsize=8)(tokens.tokenizer_hash)
"""Asked for with every fingerprint of an experiment, and slow for a large vocabulary."""
