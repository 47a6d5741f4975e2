"""Fewer blocks: those that change the stream least go.

Shapes: L blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import nn
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need
from mariotte.compress.influence import block_influence
from mariotte.compress.surgery import cut_width
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["ShortGPT"]


def keep_blocks(model: Model, kept: Sequence[int]) -> Model:
    """A model with some of the blocks, in their old order; the given one stays as it is.

    Parameters
    ----------
    model : what to start from
    kept : indices of the blocks that stay, at least one

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
    gone: dict[int, Any] = {id(block): nn.Identity() for index, block in enumerate(blocks) if index not in kept}
    hf = copy.deepcopy(model.hf, gone)
    path, _, leaf = model.entry.blocks.rpartition(".")
    copied = cast(nn.ModuleList, hf.get_submodule(model.entry.blocks))
    left = nn.ModuleList([copied[index] for index in kept])
    setattr(hf.get_submodule(path), leaf, left.train(model.hf.training))
    for index, block in enumerate(left):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # pyright: ignore[reportArgumentType]
    for key, value in model.config.items():
        by_block = "layer" in key or key == "ffn_sizes"
        if by_block and isinstance(value, list) and len(cast("list[Any]", value)) == len(blocks):
            setattr(hf.config, key, [value[index] for index in kept])
    setattr(hf.config, model.entry.layers, len(kept))
    return Model(
        hf,
        model.tokenizer,
        name=model.name,
        fingerprint=model.fingerprint,
        stored_dtype=model.stored_dtype,
        done=model.done,
        derived=model.derived,
    )


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Step):
    """Remove the blocks whose output points where their input does.

    Notes
    -----
    Block Influence is one minus the mean cosine of a block's input and output over calibration tokens. The blocks with
    the least go, all by their influence in the uncut model; of equal ones the first goes first. At least one stays.

    When to use it: each block removed makes prefill and decode faster by its share, on any hardware, and no width
    becomes odd. In models of few blocks none is redundant: one of five removed cost 0.06 to 0.18 nats on two testbed
    models, two cost 0.56 to 0.78.

    Cost: one forward pass over the calibration tokens; an amount costs a copy of what stays.

    References
    ----------
    [men2024shortgpt]_ section 3.
    """

    unit: ClassVar[str] = "blocks"
    family: ClassVar[str] = "depth"
    reference: ClassVar[str] = "men2024shortgpt"
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        shape = model.shape
        if shape.shortcuts:
            return (
                "needs one stream through all blocks, and this one goes through shortcut matrices: remove blocks first"
            )
        if shape.ffns is not None and len(set(shape.ffns)) > 1:
            return "counts blocks of one size, and these have feed-forward widths of their own: remove blocks first"
        return None

    def _kept(self, model: Model, amount: int | float) -> int:
        return cut_width(model.shape.layers, amount, 1)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        shape = replace(model.shape, layers=self._kept(model, amount))
        return model.counts.n_params - accounting.count_shape(shape).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        influence_L = block_influence(model, context, self.name())
        prepared = Prepared(context.scratch)
        prepared.put("influence", {"influence": influence_L, "order": influence_L.argsort(stable=True)})
        return prepared.finish(influence=[round(float(value), 6) for value in influence_L])

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        layers, left = model.shape.layers, self._kept(model, amount)
        order = cast("list[int]", prepared.get("influence")["order"].tolist())
        gone = sorted(order[: layers - left])
        done = self.done(amount, 1 - left / layers, layers=[layers, left], removed_blocks=gone)
        return keep_blocks(model, order[layers - left :]).after(done)
