"""Log-likelihood of the choices of multiple-choice items: what every task is scored by.

A causal model continues the context. An encoder-decoder reads it, with its sentinel for what is missing where it has
one, and writes the choice. An encoder has no likelihood of a text; it gives each token of a choice a probability from
all the others, and the product of these stands in for one (pseudo-likelihood).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mariotte.architectures import Kind
from mariotte.data.tokens import frame, separator_of
from mariotte.errors import DataError
from mariotte.models.blockwise import logits
from mariotte.models.model import Model
from mariotte.testbed.tasks import Item

ROWS_AT_ONCE = 256
"""Rows in one forward pass: bounds memory; the result does not depend on it beyond float tolerance."""

SENTINEL = "<extra_id_0>"
"""What T5 and its kind read in the place of the first missing span, and write before it."""

Tokens = tuple[int, ...]
_Group = dict[tuple[Tokens, Tokens], list[tuple[Tokens, int, int]]]
"""Source and row, with the choices asked for after them: their tokens, and the number and place of their sum."""


@dataclass(frozen=True)
class Question:
    """An item as a model's tokens.

    Parameters
    ----------
    context : what stands before a choice: the tokenizer's separator, where it has one, and the text; of an
        encoder-decoder, what its decoder starts with
    choices : the tokens that each choice adds to the context
    gold : index of the right choice
    after : what stands after a choice where a model sees both sides of it
    source : what an encoder-decoder reads
    """

    context: Tokens
    choices: tuple[Tokens, ...]
    gold: int
    after: Tokens = ()
    source: Tokens = ()


def encode(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, kind: Kind = "causal", start: int | None = None
) -> list[Question]:
    """Items as tokens: a choice is what the text with it has after the tokens of the text without it.

    Parameters
    ----------
    items : contexts and choices as text, joined by a space
    kind : of the model that is asked
    start : the token that an encoder-decoder begins to write with
    """

    def ids(texts: Iterable[str]) -> list[list[int]]:
        return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    contexts = ids(item.context for item in items)
    whole = iter(ids(f"{item.context} {choice}" for item in items for choice in item.choices))
    found = [
        (tuple(context), tuple(tuple(next(whole)[len(context) :]) for _ in item.choices), item.gold)
        for item, context in zip(items, contexts, strict=True)
    ]
    if kind == "causal":
        separator = separator_of(tokenizer)
        first = () if separator is None else (separator,)
        return [Question((*first, *context), choices, gold) for context, choices, gold in found]
    before, after = frame(tokenizer)
    if kind == "masked":
        return [Question((*before, *context), choices, gold, after) for context, choices, gold in found]
    assert start is not None
    known = SENTINEL in cast("Mapping[str, int]", tokenizer.get_vocab())
    missing = (cast(int, tokenizer.convert_tokens_to_ids(SENTINEL)),) if known else ()
    return [
        Question((start, *missing), choices, gold, source=(*before, *context, *missing, *after))
        for context, choices, gold in found
    ]


def decoder_start(model: Model) -> int:
    """The token that an encoder-decoder begins to write with.

    Raises
    ------
    DataError
        When its config does not say.
    """
    found = model.config.get("decoder_start_token_id")
    if not isinstance(found, int):
        raise DataError(
            f"the config of {model.name} must state decoder_start_token_id to write an answer, got {found!r}: add it"
        )
    return found


@torch.no_grad()
def log_likelihoods(model: Model, questions: Sequence[Question], *, batch: int = ROWS_AT_ONCE) -> list[list[float]]:
    """Log-probability of each choice after its context, in nats, summed over the choice's tokens.

    Of an encoder the pseudo-log-likelihood: see `pseudo_log_likelihoods`.

    Parameters
    ----------
    questions : as `encode` makes them for this kind of model, of any lengths, every choice at least one token
    batch : rows in one forward pass

    Notes
    -----
    A row is a context and a choice without its last token, whose logits nobody asks for. Rows that are equal are
    computed once: choices of one token share one row, and choices that differ in their last token only share theirs.
    Rows of one length go together, without padding or mask, and only the logits of a choice's tokens are computed.
    """
    if model.kind == "masked":
        texts = [(q.context, choice, q.after) for q in questions for choice in q.choices]
        sums = iter(pseudo_log_likelihoods(model, texts, batch=batch))
        return [[next(sums) for _ in question.choices] for question in questions]
    # By length of source, row and choice: each row with the tokens asked for after it, and where the sum belongs.
    groups: defaultdict[tuple[int, int, int], _Group] = defaultdict(dict)
    for number, question in enumerate(questions):
        for index, choice in enumerate(question.choices):
            row = (*question.context, *choice[:-1])
            lengths = len(question.source), len(row), len(choice)
            groups[lengths].setdefault((question.source, row), []).append((choice, number, index))
    found = [[0.0] * len(question.choices) for question in questions]
    parts = [
        (group, rows[start : start + batch])
        for group in groups.values()
        for rows in [list(group)]
        for start in range(0, len(rows), batch)
    ]
    for (group, chosen), logits_BTV in zip(parts, _logits(model, parts), strict=True):
        asked = [(position, *one) for position, row in enumerate(chosen) for one in group[row]]
        # M choices of T tokens each, after B rows.
        rows_M = torch.tensor([position for position, *_ in asked], device=model.device)
        choices_MT = torch.tensor([choice for _, choice, *_ in asked], device=model.device)
        sums_M = _sums(logits_BTV, rows_M, choices_MT)
        for (_, _, number, index), value in zip(asked, sums_M, strict=True):
            found[number][index] = float(value)
    return found


def _logits(model: Model, parts: Sequence[tuple[_Group, Sequence[tuple[Tokens, Tokens]]]]) -> Iterator[Tensor]:
    """Logits of the places before the tokens of a choice, (B, T, V), for each part."""
    lengths = [len(group[chosen[0]][0][0]) for group, chosen in parts]
    if model.kind == "causal":
        yield from logits(model, [torch.tensor([row for _, row in chosen]) for _, chosen in parts], lengths)
        return
    for (_, chosen), n_tokens in zip(parts, lengths, strict=True):
        sources_BS, rows_BT = (torch.tensor(part, device=model.device) for part in zip(*chosen, strict=True))
        yield model.logits(sources_BS, rows_BT)[:, -n_tokens:]


def _sums(logits_BTV: Tensor, rows_M: Tensor, choices_MT: Tensor) -> Tensor:
    """(M,) float64: log-likelihood of each choice after its row, the logarithm taken in float32 as in `token_nll`."""
    logs_BTV = logits_BTV.float().log_softmax(-1)
    positions_T = torch.arange(choices_MT.shape[1], device=logits_BTV.device)
    return logs_BTV[rows_M[:, None], positions_T, choices_MT].double().sum(1).cpu()


@torch.no_grad()
def pseudo_log_likelihoods(
    model: Model, texts: Sequence[tuple[Tokens, Tokens, Tokens]], *, batch: int = ROWS_AT_ONCE
) -> list[float]:
    """Pseudo-log-likelihood of a choice between what stands before and after it, in nats, from an encoder.

    Each token of the choice is masked by itself while all other tokens are read, and the log-probabilities of the
    tokens in their own places are summed [salazar2020masked]_.

    Parameters
    ----------
    texts : what stands before, the choice, and what stands after, special tokens included
    batch : rows in one forward pass

    Raises
    ------
    DataError
        When the tokenizer has no mask token.

    Notes
    -----
    Rows that are equal are computed once: choices of one token share a row. Rows of one length go together without
    padding.

    References
    ----------
    [salazar2020masked]_
    """
    mask = None if model.tokenizer is None else cast("int | None", model.tokenizer.mask_token_id)
    if mask is None:
        raise DataError(
            f"the tokenizer of {model.name} must have a mask token for pseudo-likelihood, and has none: add it"
        )
    # By length: each row with its mask's place, the tokens asked for there, and the texts that they belong to.
    groups: defaultdict[int, dict[tuple[Tokens, int], list[tuple[int, int]]]] = defaultdict(dict)
    for number, (before, choice, after) in enumerate(texts):
        for index, token in enumerate(choice):
            row = (*before, *choice[:index], mask, *choice[index + 1 :], *after)
            groups[len(row)].setdefault((row, len(before) + index), []).append((token, number))
    found = [0.0] * len(texts)
    for group in groups.values():
        rows = list(group)
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            places_B = torch.tensor([place for _, place in chosen])
            logits_BTV = model.logits(torch.tensor([row for row, _ in chosen]))
            logs_BV = logits_BTV[torch.arange(len(chosen)), places_B].float().log_softmax(-1).double().cpu()
            for logs_V, row in zip(logs_BV, chosen, strict=True):
                for token, number in group[row]:
                    found[number] += float(logs_V[token])
    return found
