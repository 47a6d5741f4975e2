"""Distillation: the compressed model learns the dense model's predictions on text.

Shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte.errors import ChainError, ModelError
from mariotte.models.model import Model
from mariotte.models.step import Context
from mariotte.recover.learner import Adapters, Learner, Weights, cannot_adapt, cannot_train, check_adapters
from mariotte.recover.losses import Loss
from mariotte.recover.trunk import Recovery

__all__ = ["Distill"]


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of τ² KL(p || q), p of the teacher and q of the student, both softened by τ, float32, nats.

    The factor keeps the size of the gradient whatever the temperature ([hinton2015distilling]_ section 2).
    """
    log_q = (student_BTV.float() / temperature).flatten(0, -2).log_softmax(-1)
    log_p = (teacher_BTV.float() / temperature).flatten(0, -2).log_softmax(-1)
    return temperature**2 * nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@dataclass(frozen=True, kw_only=True)
class Distill(Recovery):
    """Recover by learning the dense model's predictions.

    Parameters
    ----------
    temperature : τ, by which the logits of both models are divided
    mix : weight of the text's cross entropy, in [0, 1); the divergence from the dense model weighs 1 - mix
    adapters : true trains low-rank adapters as lora does, false all weights as full does
    rank, alpha : of the adapters
    lr : learning rate of the trunk; None takes that of lora or of full
    batch, block, warmup, corpus, trunk, keep_best, repeats, gain, most : see `Recovery`

    Notes
    -----
    The loss is (1 - mix) · τ² KL(dense || compressed) + mix · cross entropy, over the predictions of each token of a
    row given those before it. The dense model is the one before anything was done to it. ``loss_begin`` and
    ``loss_end`` are of this loss, ``valid_before`` and ``valid_after`` cross entropies.

    Adapters are the default: on a testbed model of width 128 (dense test loss 1.3371) cut by ``ffn@0.3`` (1.3377) and
    ``slice@0.3`` (1.4137), 16k tokens gave 1.3378 and 1.3755 with adapters, 1.3520 and 1.3832 with all weights at a
    rate of 1e-3; lora gave 1.3376 and 1.3751, so that distillation is no gain where text costs nothing.

    Costs: those of lora or full, and one forward pass of the dense model a step.

    References
    ----------
    [hinton2015distilling]_. The constant rate with a branch that decays: [hagele2024scaling]_.
    """

    reference: ClassVar[str] = "hinton2015distilling"

    temperature: float = 1.0
    mix: float = 0.0
    adapters: bool = True
    rank: int = 16
    alpha: float = 32.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapters(self.name(), self.rank, self.alpha)
        if not 0 < self.temperature < math.inf:
            raise ChainError(f"distill: temperature must be positive, got {self.temperature}")
        if not 0 <= self.mix < 1:
            raise ChainError(f"distill: mix must be in [0, 1), got {self.mix}: mix=1 is lora or full")

    @override
    def refuse(self, model: Model) -> str | None:
        return (cannot_adapt if self.adapters else cannot_train)(self.name(), model)

    @override
    def rate(self, model: Model) -> float:
        return (2e-3 if self.adapters else 2e-4) * min(1.0, (128 / model.shape.hidden) ** (2 / 3))

    @override
    def learner(self, model: Model, context: Context) -> Learner:
        if self.adapters:
            return Adapters.beside(model, context, self.name(), rank=self.rank, alpha=self.alpha)
        return Weights.of(model)

    @override
    def loss(self, model: Model, context: Context) -> Loss:
        dense = context.dense
        if dense.shape.vocab != model.shape.vocab:
            raise ModelError(
                f"distill compares predictions of the same tokens, and {model.name} has {model.shape.vocab} of them "
                f"where the dense model has {dense.shape.vocab}: recover it with lora or full"
            )

        def mixed(module: nn.Module, tokens_BT: Tensor) -> Tensor:
            mask_BT = torch.ones_like(tokens_BT)
            with torch.no_grad():
                taught_BTV = dense.hf(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
            said_BTV = module(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
            loss = divergence(said_BTV, taught_BTV.to(said_BTV.device), self.temperature)
            if not self.mix:
                return loss
            text = nn.functional.cross_entropy(said_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
            return (1 - self.mix) * loss + self.mix * text

        return mixed

    @override
    def settings(self) -> Mapping[str, Any]:
        used = {"rank": self.rank, "alpha": self.alpha} if self.adapters else {}
        return {"temperature": self.temperature, "mix": self.mix, "adapters": self.adapters, **used}
