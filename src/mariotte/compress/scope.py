"""What a scope covers, and a model whose weights there are others.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mariotte import accounting
from mariotte.compress.surgery import derive, parameter_names
from mariotte.cuts.common import PARTS as PARTS
from mariotte.models.model import Model, OfExpert, Stacked

SCOPES = ("all", "attention", "ffn", "head")
"""Of the methods that work on matrices one by one, wherever they stand."""


def in_scope(model: Model, scope: str) -> dict[str, nn.Linear]:
    """The matrices of a scope by the name of their weight, each once however many layers share it."""
    names = parameter_names(model)
    return {names[matrix.weight]: matrix for matrix in model.matrices(scope)}


def oriented(matrix: nn.Module) -> Tensor:
    """A matrix's weight as (O, I): a view, also where it is held the other way round (Conv1D).

    Of the matrices of a mixture's experts: one below the other, a copy where they are held the other way round.
    """
    return turned(matrix, cast(Tensor, matrix.weight))


def turned(matrix: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (O, I) of one as a matrix holds it, and the other way round; a view where it can be."""
    if isinstance(matrix, OfExpert):
        return weight.T if matrix.transposed else weight
    if isinstance(matrix, Stacked):
        if weight.ndim == 3:
            return (weight.transpose(1, 2) if matrix.transposed else weight).flatten(0, 1)
        each_EOI = weight.view(matrix.experts, -1, weight.shape[-1])
        return each_EOI.transpose(1, 2).contiguous() if matrix.transposed else each_EOI
    return weight.T if isinstance(matrix, Conv1D) else weight


def sides(matrix: nn.Module) -> tuple[int, int]:
    """(O, I) of a matrix, however it is held; of the matrices of a mixture's experts, those of one of them."""
    if isinstance(matrix, Conv1D):
        inputs, outputs = matrix.weight.shape
        return outputs, inputs
    return cast(nn.Linear, matrix).out_features, cast(nn.Linear, matrix).in_features


@torch.no_grad()
def rewrite_(matrix: nn.Module, to: Callable[[Tensor], Tensor]) -> None:
    """Put other numbers into a matrix.

    Parameters
    ----------
    to : the new weights, (O, I), given the old ones, (O, I) float64, of which it may make what it wants
    """
    weight_OI = oriented(matrix).to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    cast(Tensor, matrix.weight).copy_(turned(matrix, to(weight_OI)))


def untied_weights(model: Model, scope: str) -> int:
    """Parameters that a model has more once this scope alone is changed.

    A tied head gets a matrix of its own, and with it what the family shares only while the head is tied: a second bias
    of BERT's kind, the tables of BART's two stacks.
    """
    if scope != "head" or model.head.weight is not model.embeddings.weight:
        return 0
    return accounting.count({**model.config, model.entry.tied: False}).n_params - model.counts.n_params


def change(model: Model, scope: str, weights: Mapping[str, Tensor]) -> Model:
    """A model with other weights in a scope, by the names of `in_scope`; the given one stays as it is.

    A head that is tied to the embeddings gets a matrix of its own, so that the embeddings keep theirs.
    """
    if untied_weights(model, scope):
        (value,) = weights.values()
        return derive(model, {f"{model.entry.head}.weight": value}, untie=True)
    return derive(model, weights)
