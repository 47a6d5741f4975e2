"""Log-likelihood of the choices of multiple-choice items: what every task is scored by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mariotte.data.tokens import separator_of
from mariotte.models.model import Model
from mariotte.testbed.tasks import Item

ROWS_AT_ONCE = 256
"""Rows in one forward pass: bounds memory; the result does not depend on it beyond float tolerance."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """An item as a model's tokens.

    Parameters
    ----------
    context : with the tokenizer's separator before it, where it has one
    choices : the tokens that each choice adds to the context
    gold : index of the right choice
    """

    context: Tokens
    choices: tuple[Tokens, ...]
    gold: int


def encode(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Items as tokens: a choice is what the text with it has after the tokens of the text without it.

    Parameters
    ----------
    items : contexts and choices as text, joined by a space
    """
    separator = separator_of(tokenizer)
    first = () if separator is None else (separator,)

    def ids(texts: Iterable[str]) -> list[list[int]]:
        return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    contexts = ids(item.context for item in items)
    whole = iter(ids(f"{item.context} {choice}" for item in items for choice in item.choices))
    return [
        Question((*first, *context), tuple(tuple(next(whole)[len(context) :]) for _ in item.choices), item.gold)
        for item, context in zip(items, contexts, strict=True)
    ]


@torch.no_grad()
def log_likelihoods(model: Model, questions: Sequence[Question], *, batch: int = ROWS_AT_ONCE) -> list[list[float]]:
    """Log-probability of each choice after its context, in nats, summed over the choice's tokens.

    Parameters
    ----------
    questions : of any lengths, every choice at least one token
    batch : rows in one forward pass

    Notes
    -----
    A row is a context and a choice without its last token, whose logits nobody asks for. Rows that are equal are
    computed once: choices of one token share one row, and choices that differ in their last token only share theirs.
    Rows of one length go together, without padding or mask, and only the logits of a choice's tokens are computed.
    """
    # By length of the row and of the choice: each row with the tokens asked for after it, and where the sum belongs.
    groups: defaultdict[tuple[int, int], dict[Tokens, list[tuple[Tokens, int, int]]]] = defaultdict(dict)
    for number, question in enumerate(questions):
        for index, choice in enumerate(question.choices):
            row = (*question.context, *choice[:-1])
            groups[len(row), len(choice)].setdefault(row, []).append((choice, number, index))
    found = [[0.0] * len(question.choices) for question in questions]
    for group in groups.values():
        rows = list(group)
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            asked = [(position, *one) for position, row in enumerate(chosen) for one in group[row]]
            # M choices of T tokens each, after B rows.
            rows_M = torch.tensor([position for position, *_ in asked], device=model.device)
            choices_MT = torch.tensor([choice for _, choice, *_ in asked], device=model.device)
            sums_M = _sums(model, torch.tensor(chosen, device=model.device), rows_M, choices_MT)
            for (_, _, number, index), value in zip(asked, sums_M, strict=True):
                found[number][index] = float(value)
    return found


def _sums(model: Model, rows_BT: Tensor, rows_M: Tensor, choices_MT: Tensor) -> Tensor:
    """(M,) float64: log-likelihood of each choice after its row, the logarithm taken in float32 as in `token_nll`."""
    n_tokens = choices_MT.shape[1]
    logits_BTV = model.hf(input_ids=rows_BT, use_cache=False, logits_to_keep=n_tokens).logits.float()
    logs_BTV = logits_BTV.log_softmax(-1)
    positions_T = torch.arange(n_tokens, device=model.device)
    return logs_BTV[rows_M[:, None], positions_T, choices_MT].double().sum(1).cpu()
