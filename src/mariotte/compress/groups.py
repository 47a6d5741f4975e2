"""Coupled groups, which stay or go together: query heads with the key-value head that they share, and neurons.

Shapes: N query heads, F neurons of a block, K neurons kept, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mariotte.compress.attention import head_weights, without_heads
from mariotte.compress.neurons import keep_neurons, neuron_weights
from mariotte.compress.scope import oriented
from mariotte.compress.surgery import derive, gathered, parameter_names
from mariotte.models.model import Model

SCOPES = ("all", "attention", "ffn")
"""Heads and neurons, heads alone, neurons alone."""


def ranked_heads(importance_N: Tensor, groups: int) -> list[int]:
    """Query heads, the most important first, so that whole groups go until one is left, and then that one's heads.

    Parameters
    ----------
    importance_N : of each query head; a group is as important as its heads together
    groups : key-value heads
    """
    per_group = len(importance_N) // groups
    of_group_K = importance_N.view(groups, per_group).sum(1)
    found: list[int] = []
    for group in sorted(range(groups), key=lambda group: -float(of_group_K[group])):
        heads = range(group * per_group, (group + 1) * per_group)
        found += sorted(heads, key=lambda head: -float(importance_N[head]))
    return found


@torch.no_grad()
def keep_groups(
    model: Model,
    heads: Sequence[Sequence[int]] | None,
    neurons: Sequence[Tensor] | None,
    *,
    irregular: bool = False,
    biases: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
) -> Model:
    """A model with some heads and some neurons of each block; the given one stays as it is.

    Parameters
    ----------
    model : what to start from
    heads : query heads that stay in every block, None where all do
    neurons : (K,) int64 for every block, the neurons that stay; None where all do
    irregular : let blocks have sizes of their own, in a model of the class for such
    biases : added, for every block, to what attention and what the MLP gives, (D,) each or None. In an irregular model
        they become biases where there are none; in an ordinary one they are left out there
    """
    if not irregular:
        cut = _equally_cut(model, heads, neurons)
        for block, added in zip(cut.blocks, biases or [], strict=biases is not None):
            for matrix, bias_D in zip((block.attention[-1], block.ffn[-1]), added, strict=True):
                if bias_D is not None and matrix.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    matrix.bias.add_(bias_D.to(matrix.bias.dtype))
        return cut
    names, shape = parameter_names(model), model.shape
    weights = gathered(model)
    counts: list[list[int]] = []
    widths: list[int] = []
    for index, block in enumerate(model.blocks):
        query, shared = shape.heads_of(index)
        kept = list(range(query)) if heads is None else sorted(heads[index])
        per_group = query // shared
        counts.append([len(kept), len({head // per_group for head in kept})])
        if len(kept) < query:
            weights |= head_weights(block, names, replace(shape, heads=query, kv_heads=shared), kept)
        widths.append(shape.ffn_of(index) if neurons is None else len(neurons[index]))
        if neurons is not None and widths[-1] < shape.ffn_of(index):
            weights |= neuron_weights(block, names, neurons[index].to(model.device).sort().values)
        for path, matrix, bias_D in zip(
            (block.entry.output, block.entry.down),
            (block.output, block.down),
            biases[index] if biases is not None else (None, None),
            strict=True,
        ):
            if biases is not None:
                old_D = matrix.bias
                new_D = torch.zeros(len(oriented(matrix)), device=model.device) if bias_D is None else bias_D
                weights[f"{block.path}.{path}.bias"] = new_D if old_D is None else old_D + new_D  # pyright: ignore[reportUnnecessaryComparison]
    sizes: dict[str, Any] = {}
    if heads is not None:
        sizes["head_sizes"] = counts
    if neurons is not None:
        sizes["ffn_sizes"] = widths
    if biases is not None:
        sizes["output_biases"] = True
    return derive(model, weights, sizes, irregular=True)


def _equally_cut(model: Model, heads: Sequence[Sequence[int]] | None, neurons: Sequence[Tensor] | None) -> Model:
    """The model with as many heads and neurons in every block."""
    cut = model.copy() if neurons is None else keep_neurons(model, neurons)
    if heads is None:
        return cut
    names, shape = parameter_names(cut), cut.shape
    weights = gathered(cut)
    for block, kept in zip(cut.blocks, heads, strict=True):
        weights |= head_weights(block, names, shape, kept)
    (count,) = {len(kept) for kept in heads}
    (groups,) = {len({head // (shape.heads // shape.kv_heads) for head in kept}) for kept in heads}
    return without_heads(cut, weights, count, groups)
