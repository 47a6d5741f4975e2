"""Token losses: what every loss, knowledge probe and training record is made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from mariotte.models.model import Model

TOKENS_AT_ONCE = 4096
"""Tokens scored in one forward pass: bounds memory; the result does not depend on it beyond float tolerance."""


@torch.no_grad()
def token_nll(model: Model, tokens_NT: Tensor, *, batch: int = 32) -> Tensor:
    """Negative log-likelihood of every token but the first of each row, given those before it.

    Parameters
    ----------
    model : a causal model
    tokens_NT : (N, T) token ids, T at least 2
    batch : rows scored at once; changes time and memory, not the result beyond float tolerance

    Returns
    -------
    (N, T - 1) float32 on the CPU, nats; the logarithm is taken in float32 whatever the model's dtype
    """
    losses: list[Tensor] = []
    for start in range(0, len(tokens_NT), batch):
        rows_BT = tokens_NT[start : start + batch].to(model.device)
        logits_MV = model.logits(rows_BT)[:, :-1].float().flatten(0, 1)
        losses.append(
            functional.cross_entropy(logits_MV, rows_BT[:, 1:].flatten(), reduction="none").view(len(rows_BT), -1)
        )
    return torch.cat(losses).cpu()


def batches(lengths_N: Tensor, at_once: int = TOKENS_AT_ONCE) -> Iterator[Tensor]:
    """Rows to compute together: of like length, the longest first, at most `at_once` tokens with their padding.

    Parameters
    ----------
    lengths_N : (N,) int64
    at_once : tokens in one batch, but at least one row

    Yields
    ------
    (B,) int64, indices of rows; rows of equal length stay in order
    """
    order_N = lengths_N.argsort(descending=True, stable=True)
    start = 0
    while start < len(order_N):
        count = max(1, at_once // int(lengths_N[order_N[start]]))
        yield order_N[start : start + count]
        start += count


@torch.no_grad()
def scored_nll(
    model: Model, tokens_NT: Tensor, scored_NT: Tensor, lengths_N: Tensor, *, at_once: int = TOKENS_AT_ONCE
) -> Tensor:
    """Negative log-likelihood of some tokens of rows of any lengths, each given those before it in its row.

    Parameters
    ----------
    model : a causal model
    tokens_NT : (N, T) token ids, what follows a row's own length is padding
    scored_NT : (N, T) bool, tokens asked for: never the first of a row, never padding
    lengths_N : (N,) tokens of each row
    at_once : tokens in one forward pass

    Returns
    -------
    (M,) float32 on the CPU, nats, of the tokens asked for, row after row; the logarithm is taken in float32

    Notes
    -----
    Rows are padded on the right, where a causal model cannot see, so that no mask is needed. Their last tokens predict
    nothing that is asked for and are not computed; logarithms are taken for the tokens asked for alone.
    """
    nll_NT = torch.zeros(tokens_NT.shape)
    for chosen_B in batches(lengths_N, at_once):
        longest = int(lengths_N[chosen_B[0]])
        rows_BT = tokens_NT[chosen_B, :longest].to(model.device)
        asked_BT = scored_NT[chosen_B, :longest].to(model.device)
        logits_MV = model.logits(rows_BT[:, :-1])[asked_BT[:, 1:]].float()
        found_M = functional.cross_entropy(logits_MV, rows_BT[asked_BT], reduction="none")
        part_BT = torch.zeros(rows_BT.shape)
        part_BT[asked_BT.cpu()] = found_M.cpu()
        nll_NT[chosen_B, :longest] = part_BT
    return nll_NT[scored_NT]
