"""Fewer attention heads: what a model's matrices become.

Shapes: D model width, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mariotte.architectures import Shape
from mariotte.compress.scope import oriented, turned
from mariotte.compress.surgery import derive
from mariotte.models.model import Block, Model


def columns_of(heads: Sequence[int], width: int) -> list[int]:
    """Columns of the output projection that read some heads, in the heads' order."""
    return [column for head in heads for column in range(head * width, (head + 1) * width)]


def head_weights(
    block: Block,
    names: Mapping[Tensor, str],
    shape: Shape,
    kept: Sequence[int],
    output_Di: Tensor | None = None,
    energies: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """What the parameters of a block's attention become when some query heads stay.

    Parameters
    ----------
    block : of the uncut model
    names : of its parameters, see `surgery.parameter_names`
    shape : of the uncut model
    kept : query heads, as many of each key-value head that stays; one without query heads goes
    output_Di : the output projection's columns of these heads, ascending; None takes them as they are
    energies : (N·H,) and (K·H,), mean squares of queries and keys in front of norms over all heads together; without
        them all heads count as equally large

    Returns
    -------
    By name: rows of query, key and value and their biases, the output projection's columns, and what else there is of
    each head

    Notes
    -----
    A norm over all heads divides by the root of their mean square, which is another one without those that go. Its
    weights take over the factor between the two, by the share that the kept heads have of the energy.
    """
    # In their old order: the query heads of one key-value head then stay neighbours, as attention expects.
    kept = sorted(kept)
    per_group, width = shape.heads // shape.kv_heads, shape.head_dim
    shared = sorted({head // per_group for head in kept})
    assert len(kept) % len(shared) == 0, (kept, shared)
    weights: dict[str, Tensor] = {}
    entry = block.entry
    for linear, rows in _rows_of(block, shape, kept, shared):
        weights[names[linear.weight]] = turned(linear, oriented(linear)[rows])
        if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] some families have none
            weights[names[linear.bias]] = linear.bias[rows]
    output_DI = oriented(block.output)
    weights[names[block.output.weight]] = turned(
        block.output, output_DI[:, columns_of(kept, width)] if output_Di is None else output_Di
    )
    if entry.sinks:
        sinks_N = block.module.get_parameter(entry.sinks)
        weights[names[sinks_N]] = sinks_N[kept]
    if entry.whole_norms:
        for place, (path, some) in enumerate(zip(entry.head_norms, (kept, shared), strict=True)):
            scale_I = cast(nn.Parameter, block.module.get_submodule(path).weight)
            rows = columns_of(some, width)
            energy_I = energies[place].to(scale_I.device) if energies else torch.ones_like(scale_I)
            share = float(energy_I[rows].sum() / energy_I.sum()) if bool(energy_I.any()) else len(rows) / len(scale_I)
            weights[names[scale_I]] = scale_I[rows] * (share * len(scale_I) / len(rows)) ** 0.5
    return weights


def _rows_of(
    block: Block, shape: Shape, kept: Sequence[int], shared: Sequence[int]
) -> list[tuple[nn.Linear, list[int]]]:
    """The matrices that make queries, keys and values, each with the rows that stay, in the order of the family."""
    width, per_group = shape.head_dim, shape.heads // shape.kv_heads
    if not block.entry.fused:
        of_queries, of_groups = columns_of(kept, width), columns_of(shared, width)
        return [(block.query, of_queries), (block.key, of_groups), (block.value, of_groups)]
    queries, keys, values = block.entry.rows(shape)
    if block.entry.grouped:
        # Of each group that stays its queries, its key and its value.
        parts = [
            [heads_of(queries, [head for head in kept if head // per_group == group], width) for group in shared],
            [heads_of(keys, [group], width) for group in shared],
            [heads_of(values, [group], width) for group in shared],
        ]
        return [(block.attention[0], [row for group in zip(*parts, strict=True) for part in group for row in part])]
    rows = [*heads_of(queries, kept, width), *heads_of(keys, shared, width), *heads_of(values, shared, width)]
    return [(block.attention[0], rows)]


def heads_of(rows: Sequence[int], heads: Sequence[int], width: int) -> list[int]:
    """Of rows that belong to heads in turn, those of some heads."""
    return [rows[place] for place in columns_of(heads, width)]


def without_heads(model: Model, weights: Mapping[str, Tensor], heads: int, groups: int) -> Model:
    """A model of as many query and key-value heads in every block, given what `head_weights` says of each.

    The head width stays. A family that ties it to the hidden size becomes one of ours that states it.
    """
    entry = model.entry
    sizes = {entry.heads: heads, entry.head_dim or "head_dim": model.shape.head_dim}
    if isinstance(entry.kv_heads, str) and entry.kv_heads:
        sizes[entry.kv_heads] = groups
    irregular = not entry.head_dim or entry.irregular
    cut = derive(model, weights, sizes, irregular=irregular)
    restate_heads_(cut)
    return cut


def restate_heads_(model: Model) -> None:
    """Make what attention modules say of their heads agree with the config: forward passes read it."""
    shape = model.shape
    sizes = {
        "num_key_value_groups": shape.heads // shape.kv_heads,
        "num_heads": shape.heads,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_kv_heads": shape.kv_heads,
    }
    for block in model.blocks:
        for module in block.module.modules():
            for name, value in sizes.items():
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, value)
