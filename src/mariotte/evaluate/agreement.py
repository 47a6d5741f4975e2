"""How closely one causal model follows another, token by token: divergence, and whether they would say the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mariotte.errors import DataError, ModelError
from mariotte.models.model import Model

LOGITS_AT_ONCE = 1 << 24
"""Logits of one model held at once (64 MB in float32): bounds memory; the result does not depend on it."""


@dataclass(frozen=True)
class Agreement:
    """Sums over the scored tokens of each document.

    Parameters
    ----------
    kl : (n,) nats, the base's distribution against the other's
    same : (n,) tokens at which both find the same next token likeliest
    tokens : (n,) how many there were
    """

    kl: NDArray[np.float64]
    same: NDArray[np.float64]
    tokens: NDArray[np.float64]


@torch.no_grad()
def agreement(base: Model, other: Model, tokens_NT: Tensor, separator: int | None) -> Agreement:
    """Run both models over the same windows.

    Parameters
    ----------
    base, other : causal models of one vocabulary
    tokens_NT : (N, T) token ids; all but the last of a row are asked what comes next
    separator : token that begins a document; None takes each row as one

    Raises
    ------
    DataError
        When the models do not predict the same number of tokens.
    ModelError
        When a model computes non-finite logits.
    """
    if base.shape.vocab != other.shape.vocab:
        raise DataError(
            f"{base.name} predicts {base.shape.vocab:,} tokens and {other.name} {other.shape.vocab:,}: compare models "
            "of one vocabulary"
        )
    # Of each token the number of its document: those before the first separator have number 0.
    begins_NT = torch.zeros_like(tokens_NT) if separator is None else (tokens_NT == separator).long()
    documents_NT = begins_NT.flatten().cumsum(0).view_as(tokens_NT)
    if separator is None:
        documents_NT = torch.arange(len(tokens_NT))[:, None].expand_as(tokens_NT)
    kl: list[Tensor] = []
    same: list[Tensor] = []
    at_once = max(1, LOGITS_AT_ONCE // (base.shape.vocab * tokens_NT.shape[1]))
    for start in range(0, len(tokens_NT), at_once):
        rows_BT = tokens_NT[start : start + at_once]
        p_MV, q_MV = (
            functional.log_softmax(model.logits(rows_BT)[:, :-1].float().flatten(0, 1), -1) for model in (base, other)
        )
        q_MV = q_MV.to(p_MV.device)
        kl.append((p_MV.exp() * (p_MV - q_MV)).sum(-1).cpu())
        same.append((p_MV.argmax(-1) == q_MV.argmax(-1)).cpu())
    kl_M, same_M = torch.cat(kl).double().numpy(), torch.cat(same).double().numpy()
    if not np.isfinite(kl_M).all():
        raise ModelError(
            f"{base.name} and {other.name} cannot be compared token by token: one computes non-finite logits"
        )
    _, documents_M = np.unique(documents_NT[:, 1:].flatten().numpy(), return_inverse=True)

    def sums(values_M: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(documents_M, weights=values_M).astype(np.float64)

    return Agreement(sums(kl_M), sums(same_M), sums(np.ones(len(kl_M))))
