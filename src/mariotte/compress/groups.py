"""Coupled groups, which stay or go together: query heads with the key-value head that they share, and neurons.

Shapes: N query heads, F neurons of a block, K neurons kept, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mariotte import accounting
from mariotte.architectures import Shape
from mariotte.compress.attention import (
    head_weights,
    kept_counts,
    largest_gap,
    possible_counts,
    refuse_heads,
    without_heads,
)
from mariotte.compress.neurons import keep_neurons, neuron_weights, neuron_width, refuse_unequal_widths
from mariotte.compress.surgery import derive, parameter_names
from mariotte.models.irregular import CLASSES
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


def refuse_groups(model: Model, scope: str) -> str | None:
    """Why equally many groups cannot be taken from blocks of `model`, or None when they can; as `Step.refuse`."""
    heads = None if scope == "ffn" else refuse_heads(model)
    if heads and scope == "all":
        heads = f"{heads}, or neurons alone with the scope ffn"
    return heads or (None if scope == "attention" else refuse_unequal_widths(model))


def refuse_irregular(model: Model) -> str | None:
    """Why blocks of `model` cannot get sizes of their own, in a clause without its end; None when they can."""
    if model.entry.model_type not in CLASSES:
        return f"needs a class for blocks of different sizes, and {model.entry.model_type} has none"
    return None


def equal_shape(
    model: Model, amount: float, scope: str, round_to: int | None, *, irregular: bool = False
) -> tuple[Shape, float]:
    """The sizes of a model whose blocks all lose a share of their heads and of their neurons.

    Parameters
    ----------
    amount : share of either, in [0, 1)
    scope : one of SCOPES
    round_to : multiple to which neurons are rounded, as in `neuron_width`
    irregular : take numbers of heads that the family's config may refuse, too

    Returns
    -------
    The shape, and how far a share may be from the one asked for
    """
    shape, rounding = model.shape, 0.0
    heads, groups, ffn = shape.heads, shape.kv_heads, shape.ffn
    if scope != "ffn":
        choices = kept_counts(shape, "groups") if irregular else possible_counts(model, "groups")
        asked = heads * (1 - amount)
        heads, groups = min(choices, key=lambda kept: (round(abs(kept[0] - asked), 9), -kept[0]))
        rounding = largest_gap(choices) / shape.heads
    if scope != "attention":
        ffn, multiple = neuron_width(model, amount, round_to)
        rounding = max(rounding, multiple / shape.ffn)
    return replace(shape, heads=heads, kv_heads=groups, ffn=ffn), rounding


def removed_share(before: Shape, after: Shape, scope: str) -> float:
    """Share of the parameters of attention and MLPs, as far as they are in scope, that went."""
    old, new = accounting.count_shape(before), accounting.count_shape(after)
    total = (old.attention if scope != "ffn" else 0) + (old.ffn if scope != "attention" else 0)
    return (old.attention - new.attention + old.ffn - new.ffn) / total


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
    weights: dict[str, Tensor] = {}
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
                new_D = torch.zeros(len(matrix.weight), device=model.device) if bias_D is None else bias_D
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
    weights: dict[str, Tensor] = {}
    for block, kept in zip(cut.blocks, heads, strict=True):
        weights |= head_weights(block, names, shape, kept)
    (count,) = {len(kept) for kept in heads}
    (groups,) = {len({head // (shape.heads // shape.kv_heads) for head in kept}) for kept in heads}
    return without_heads(cut, weights, count, groups)


def sizes_by_block(shape: Shape, kept: Mapping[int, Shape]) -> Shape:
    """The sizes of a model some of whose blocks have the sizes of others.

    Parameters
    ----------
    shape : of the model
    kept : by the number of a block a shape that says how many heads and neurons it has now
    """
    heads = [(kept[i].heads, kept[i].kv_heads) if i in kept else shape.heads_of(i) for i in range(shape.layers)]
    ffns = [kept[i].ffn if i in kept else shape.ffn_of(i) for i in range(shape.layers)]
    return replace(shape, attentions=tuple(heads), ffns=tuple(ffns))
