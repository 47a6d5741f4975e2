"""Token losses: what every loss, knowledge probe and training record is made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mariotte.models.model import Model


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
