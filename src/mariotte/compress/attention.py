"""Fewer attention heads: which numbers of them a family can hold, and what its matrices become.

Shapes: D model width, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor

from mariotte.architectures import Shape
from mariotte.models.model import Block, Model

BY = ("queries", "groups")
"""How heads go: a query head of every group at a time, or whole groups."""


def columns_of(heads: Sequence[int], width: int) -> list[int]:
    """Columns of the output projection that read some heads, in the heads' order."""
    return [column for head in heads for column in range(head * width, (head + 1) * width)]


def kept_counts(shape: Shape, by: str) -> list[tuple[int, int]]:
    """Query and key-value heads left after each removal of `removal_order` that leaves all groups equal, all first."""
    per_group = shape.heads // shape.kv_heads
    if by == "groups":
        whole = [(groups * per_group, groups) for groups in range(shape.kv_heads, 0, -1)]
        return whole + [(heads, 1) for heads in range(per_group - 1, 0, -1)]
    even = [(shape.kv_heads * heads, shape.kv_heads) for heads in range(per_group, 0, -1)]
    return even + [(heads, heads) for heads in range(shape.kv_heads - 1, 0, -1)]


def possible_counts(model: Model, by: str) -> list[tuple[int, int]]:
    """The counts of query and key-value heads that the family's config can state, all first; see `kept_counts`."""
    shape, strict = model.shape, model.entry.hidden_multiple_of_heads
    return [
        (heads, groups)
        for heads, groups in kept_counts(shape, by)
        if heads == shape.heads or not strict or shape.hidden % heads == 0
    ]


def largest_gap(choices: Sequence[tuple[int, int]]) -> int:
    """Heads between two neighbouring choices, at most; 1 when there is a single one."""
    return max((above - below for (above, _), (below, _) in itertools.pairwise(choices)), default=1)


def refuse_heads(model: Model) -> str | None:
    """Why heads cannot be taken from `model`, or None when they can; as `Step.refuse`."""
    if not model.entry.head_dim:
        return (
            f"needs a config that states head_dim, and {model.entry.model_type} ties the head size to the hidden "
            "size: take ffn or shortgpt"
        )
    if model.shape.attentions is not None:
        return "removes the same number of heads from each block, and the blocks of this model differ: take ffn"
    if model.shape.widths is not None:
        return "needs heads whose queries and values are as wide as the config says, and these are not: do it before"
    return None


def head_weights(
    block: Block, names: Mapping[Tensor, str], shape: Shape, kept: Sequence[int], output_Di: Tensor | None = None
) -> dict[str, Tensor]:
    """What the parameters of a block's attention become when some query heads stay.

    Parameters
    ----------
    block : of the uncut model
    names : of its parameters, see `surgery.parameter_names`
    shape : of the uncut model
    kept : query heads, as many of each key-value head that stays; one without query heads goes
    output_Di : the output projection's columns of these heads, ascending; None takes them as they are

    Returns
    -------
    By name: rows of query, key and value and their biases, and the output projection's columns
    """
    # In their old order: the query heads of one key-value head then stay neighbours, as attention expects.
    kept = sorted(kept)
    per_group, width = shape.heads // shape.kv_heads, shape.head_dim
    shared = sorted({head // per_group for head in kept})
    assert len(kept) % len(shared) == 0, (kept, shared)
    weights: dict[str, Tensor] = {}
    for linear, some in ((block.query, kept), (block.key, shared), (block.value, shared)):
        rows = columns_of(some, width)
        weights |= {names[parameter]: parameter[rows] for parameter in linear.parameters()}
    weights[names[block.output.weight]] = (
        block.output.weight[:, columns_of(kept, width)] if output_Di is None else output_Di
    )
    return weights


def restate_heads_(model: Model) -> None:
    """Make what attention modules say of their heads agree with the config: forward passes read it."""
    shape = model.shape
    sizes = {
        "num_key_value_groups": shape.heads // shape.kv_heads,
        "num_heads": shape.heads,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
    }
    for block in model.blocks:
        for module in block.module.modules():
            for name, value in sizes.items():
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, value)
