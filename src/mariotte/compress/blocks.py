"""Fewer blocks, the others as they were.

Shapes: L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from mariotte import accounting
from mariotte.models.dynamic import restate_
from mariotte.models.model import Model

BY_BLOCK = ("ffn_sizes", "head_sizes", "width_sizes", "ranks")
"""Lists of irregular models' configs that say something of each block; those of families have "layer" in their name."""


def keep_blocks(model: Model, kept: Sequence[int], *, share: bool = False) -> Model:
    """A model with some of the blocks, in their old order; the given one stays as it is.

    Parameters
    ----------
    model : what to start from
    kept : indices of the blocks that stay, at least one
    share : let both models hold the same parameters instead of a copy of those that stay: for a look at what would be
        left, which must not be changed then

    Notes
    -----
    Attention modules carry the number of their block, under which they find their keys and values in the cache: it is
    counted anew. Lists in which a config says something of each block, such as ``layer_types``, lose what they say of
    those that go.
    """
    kept = sorted(kept)
    assert kept, "a model needs a block"
    blocks = cast(nn.ModuleList, model.hf.get_submodule(model.entry.blocks))
    # deepcopy takes what its memo holds for already copied: the blocks that go are never copied.
    known: dict[int, Any] = {id(block): nn.Identity() for index, block in enumerate(blocks) if index not in kept}
    if share:
        known |= {id(tensor): tensor for tensor in (*model.hf.parameters(), *model.hf.buffers())}
    hf = copy.deepcopy(model.hf, known)
    path, _, leaf = model.entry.blocks.rpartition(".")
    copied = cast(nn.ModuleList, hf.get_submodule(model.entry.blocks))
    left = nn.ModuleList([copied[index] for index in kept])
    setattr(hf.get_submodule(path), leaf, left.train(model.hf.training))
    for index, block in enumerate(left):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # pyright: ignore[reportArgumentType]
    for key, value in model.config.items():
        by_block = "layer" in key or key in BY_BLOCK
        if by_block and isinstance(value, list) and len(cast("list[Any]", value)) == len(blocks):
            setattr(hf.config, key, [value[index] for index in kept])
    setattr(hf.config, model.entry.layers, len(kept))
    restate_(hf)
    return Model(
        hf,
        model.tokenizer,
        name=model.name,
        fingerprint=model.fingerprint,
        stored_dtype=model.stored_dtype,
        done=model.done,
        derived=model.derived,
    )


def removed_with_blocks(model: Model, left: int) -> int:
    """Parameters that go when `left` blocks stay, from shapes alone."""
    return model.counts.n_params - accounting.count_shape(replace(model.shape, layers=left)).n_params
