"""Losses: what training lowers, and what its result is judged by.

Shapes: B rows of a batch, T tokens of a row, N rows of the validation split.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.training.loop import causal_loss


class Loss(Protocol):
    """What training lowers."""

    def __call__(self, module: nn.Module, tokens_BT: Tensor) -> Tensor:
        """The mean over the predictions of the rows, a scalar."""
        ...


def text_loss(module: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Cross entropy of the text, nats a token.

    The mask says what holds anyway, that no token is padding: without one transformers looks for packed documents in
    every forward pass, which takes a quarter of that of the smallest testbed model. The bits are the same.
    """
    return causal_loss(module, tokens_BT, attention_mask=torch.ones_like(tokens_BT))


def judged(model: Model, recovered: Model, held_out_NT: Tensor | str) -> dict[str, Any]:
    """The loss on held-out rows before and after, with a warning in words where it rose beyond the noise of rows."""
    if isinstance(held_out_NT, str):
        return {"valid_rows": 0}
    before_N = token_nll(model, held_out_NT).mean(1).double()
    after_N = token_nll(recovered, held_out_NT).mean(1).double()
    facts: dict[str, Any] = {
        "valid_rows": len(held_out_NT),
        "valid_before": before_N.mean().item(),
        "valid_after": after_N.mean().item(),
    }
    rise_N = after_N - before_N
    noise = rise_N.std().item() / len(rise_N) ** 0.5 if len(rise_N) > 1 else 0.0
    if not rise_N.mean().item() <= 2 * noise:  # two standard errors; also where it is no number
        facts["warning"] = (
            f"recovery raised the held-out loss from {facts['valid_before']:.4f} to {facts['valid_after']:.4f} nats a "
            f"token ({len(rise_N)} rows): train on fewer tokens or with a lower lr, or keep the best state with "
            "keep_best=true"
        )
    return facts


@torch.no_grad()
def mean_loss(module: nn.Module, rows_NT: Tensor) -> float:
    """Mean causal loss of rows, without dropout."""
    was_training = module.training
    module.eval()
    batches = [rows_NT[start : start + 32] for start in range(0, len(rows_NT), 32)]
    losses = [text_loss(module, rows_BT).item() * len(rows_BT) for rows_BT in batches]
    module.train(was_training)
    return sum(losses) / len(rows_NT)
