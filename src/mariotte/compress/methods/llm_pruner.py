"""Fewer heads and neurons: the coupled groups whose loss would change the model's loss least, to first order.

Shapes: D model width, N query heads, H head width, F neurons of a block, O outputs and I inputs of a matrix, R rows of
calibration text, B rows at once, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need, Shape
from mariotte.compress.calibration import check_finite, rows_at_once, tokens_for
from mariotte.compress.groups import (
    SCOPES,
    keep_groups,
    ranked_heads,
)
from mariotte.compress.scope import oriented, turned
from mariotte.cuts.groups import equal_shape, refuse_pruner, removed_share, said_when_far, sizes_by_block, spared_blocks
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["LLMPruner"]

TAYLOR = ("param_first", "param_second", "param_mix", "vectorize")


def salience(weight: Tensor, gradient: Tensor, square: Tensor | None, taylor: str) -> Tensor:
    """How much the loss is said to change when a weight becomes zero, entry by entry.

    Parameters
    ----------
    weight, gradient : of one shape
    square : mean over rows of the squared gradient of the row's loss; only asked for by param_second and param_mix
    taylor : one of TAYLOR
    """
    if taylor == "param_second":
        assert square is not None
        return (weight.square() * square).abs()
    if taylor == "param_mix":
        assert square is not None
        return (weight * gradient - 0.5 * weight.square() * square).abs()
    return weight * gradient if taylor == "vectorize" else (weight * gradient).abs()


def row_scores(salience_OI: Tensor) -> Tensor:
    """Importance of each output, (O,); of absolute saliences their sum, of signed ones the size of theirs."""
    return salience_OI.sum(1).abs()


def column_scores(salience_OI: Tensor) -> Tensor:
    """Importance of each input, (I,), likewise."""
    return salience_OI.sum(0).abs()


@torch.enable_grad()
def weight_gradients(
    model: Model, context: Context, step: str, matrices: Mapping[str, nn.Linear], *, squared: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient of the mean calibration loss by the weights of matrices, float32.

    Parameters
    ----------
    matrices : by the name under which the result is wanted
    squared : also the mean over rows of the squared gradient of each row's mean loss, which takes a backward pass a row

    Returns
    -------
    Gradients and squares, in the shape of the weights; no squares unless asked for

    Raises
    ------
    DataError
        When there is no calibration text, or its rows are of one token.
    ModelError
        When gradients are not finite.

    Notes
    -----
    Cost: a forward and a backward pass; memory for activations of about 4096 tokens and for a number, or two, beside
    each weight.
    """
    tokens_RT = tokens_for(context, step, predicting=True)
    rows = 1 if squared else rows_at_once(tokens_RT)
    weights = [matrix.weight for matrix in matrices.values()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    first = {
        name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in zip(matrices, weights, strict=True)
    }
    second = {name: torch.zeros_like(total) for name, total in first.items()} if squared else {}
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for start in range(0, len(tokens_RT), rows):
            tokens_BT = tokens_RT[start : start + rows].to(model.device)
            logits_MV = model.logits(tokens_BT)[:, :-1].float().flatten(0, 1)
            loss = functional.cross_entropy(logits_MV, tokens_BT[:, 1:].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss / (tokens_RT.shape[1] - 1), weights)
            for name, gradient in zip(matrices, gradients, strict=True):
                first[name] += gradient.float() / len(tokens_RT)
                if squared:
                    second[name] += gradient.float().square() / len(tokens_RT)
            context.progress("gradients", min(1.0, (start + rows) / len(tokens_RT)))
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    for found in (first, second):
        for name, total in found.items():
            check_finite(total, step, name, model, what="gradients")
    return first, second


def head_importance(block: Block, shape: Shape, saliences: Sequence[Tensor]) -> Tensor:
    """Importance of every query head, (N,): its rows of the query, its columns of the output, its part of a group's.

    Parameters
    ----------
    saliences : of the matrices of the block's attention, each (O, I), the output projection's last
    """
    *read, output_DI = saliences
    if block.entry.fused:
        (score_O,) = map(row_scores, read)
        query, key, value = (score_O[list(rows)] for rows in block.entry.rows(shape))
    else:
        query, key, value = map(row_scores, read)
    of_heads_N = (query + column_scores(output_DI)).view(shape.heads, -1).sum(1)
    of_groups_K = (key + value).view(shape.kv_heads, -1).sum(1)
    per_group = shape.heads // shape.kv_heads
    return of_heads_N + of_groups_K.repeat_interleave(per_group) / per_group


def neuron_importance(block: Block, saliences: Sequence[Tensor]) -> Tensor:
    """Importance of every neuron, (F,): its rows of gate and up, and its column of down.

    Parameters
    ----------
    saliences : of the matrices of the block's MLP, each (O, I), the down projection's last
    """
    *ins, down_DF = saliences
    scores = [row_scores(salience_OI) for salience_OI in ins]
    if block.entry.fused_mlp:
        scores = list(scores[0].chunk(2))
    return sum(scores, column_scores(down_DF))


@dataclass(frozen=True, kw_only=True)
class LLMPruner(Step):
    """Remove the same share of heads and of neurons from all blocks but the first and the last ones.

    Parameters
    ----------
    taylor : how much a weight w with gradient g matters. param_first: |w g|; param_second: w² E[g²], the diagonal
        Fisher information, from a gradient for each row; param_mix: |w g - w² E[g²] / 2|; vectorize: w g with its sign,
        whose sum over each row or column of a matrix is taken as it is, and then its size
    first, last : blocks spared at the beginning and at the end. None spares an eighth and a sixteenth of them, rounded
        down: of 32 the four and two of the authors, of fewer than eight none
    round_to : multiple to which the feed-forward width is rounded; None takes 128 in models at least 1024 wide, 8 in
        smaller ones

    Raises
    ------
    ChainError
        When the criterion is none of these, a number of blocks is negative, or `round_to` is not positive.

    Notes
    -----
    An amount is a share of the parameters of attention and MLP of each block that is not spared, as far as they are in
    scope. A group is a neuron with its rows of gate and up and its column of down, or a key-value head with all query
    heads that share it; once one of these is left its query heads go one by one. As many heads go as are nearest to the
    share, and neurons make up for what these, being few, leave; a result far from what was asked says so. The
    importance of a group is the sum of that of its weights. Orders are nested: one preparation serves all amounts.

    Where blocks are spared, sizes differ by block, and the result is of a class of ours for such; ``first=0, last=0``
    gives the ordinary shape where the family's config can state it.

    When to use it: to compare with LLM-Pruner, or before a recovery: nothing compensates for what goes. With 25 % of
    all parameters gone as neurons (scope ffn) it came to 3.86 nats on stories260K (dense 1.77) and to 1.376 on testbed
    llama-1m (dense 1.345), `ffn` to 2.75 and 1.346; where heads are few, leave them out. More is in docs/methods.md.

    Cost: a forward and a backward pass over calibration text, which is a few rows in the paper (one pass for each row
    when squared gradients are asked for), and a number beside every weight of the blocks; an amount then costs a copy.

    References
    ----------
    [ma2023llmpruner]_ section 3.2, equations 3 to 6; its groups summed, as in the authors' code.
    """

    unit: ClassVar[str] = "groups"
    family: ClassVar[str] = "width"
    version: ClassVar[int] = 2  # equal cuts: the nearest amount, neurons making up for coarse heads
    reference: ClassVar[str] = "ma2023llmpruner"
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    scopes: ClassVar[tuple[str, ...]] = SCOPES

    taylor: str = "param_first"
    first: int | None = None
    last: int | None = None
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in TAYLOR:
            raise ChainError(f"llm-pruner: taylor must be one of {', '.join(TAYLOR)}, got {self.taylor!r}")
        for name, spared in (("first", self.first), ("last", self.last)):
            if spared is not None and spared < 0:
                raise ChainError(f"llm-pruner: {name} must be a number of blocks, got {spared}")
        accounting.check_round_to(self.name(), self.round_to, of="neurons")

    def _pruned(self, model: Model) -> range:
        """The blocks that are not spared."""
        return spared_blocks(model.shape.layers, self.first, self.last)

    def _spares(self, model: Model) -> bool:
        return len(self._pruned(model)) < model.shape.layers

    @override
    def whole(self) -> str | None:
        return "takes gradients of the loss through all blocks at once: take flap, which needs none"

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_pruner(model, self.scope, self._pruned(model))

    @override
    def makes_plain(self, model: Model) -> bool:
        ordinary = bool(model.entry.head_dim) or self.scope == "ffn"
        return ordinary and not model.entry.irregular and not self._spares(model)

    def _after(self, model: Model, amount: int | float) -> tuple[Shape, Shape, float]:
        """The sizes of a block that is not spared, those of the model, and how far a share may be off."""
        of_block, rounding = equal_shape(model, amount, self.scope, self.round_to, irregular=self._spares(model))
        if not self._spares(model):
            return of_block, of_block, rounding
        return of_block, sizes_by_block(model.shape, dict.fromkeys(self._pruned(model), of_block)), rounding

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        return model.counts.n_params - accounting.count_shape(self._after(model, amount)[1]).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        blocks, parts = model.blocks, {"attention": self.scope != "ffn", "ffn": self.scope != "attention"}
        asked = {
            f"block-{index} {part} {place}": matrix
            for index in self._pruned(model)
            for part, there in parts.items()
            for place, matrix in enumerate(getattr(blocks[index], part) if there else ())
        }
        squared = self.taylor in ("param_second", "param_mix")
        gradients, squares = weight_gradients(model, context, self.name(), asked, squared=squared)

        def found(key: str) -> Tensor:
            matrix = asked[key]
            square = turned(matrix, squares.pop(key)) if squared else None
            return salience(oriented(matrix).float(), turned(matrix, gradients.pop(key)), square, self.taylor)

        prepared = Prepared(context.scratch)
        for index in self._pruned(model):
            tensors: dict[str, Tensor] = {}
            for part, there in parts.items():
                matrices = cast("tuple[nn.Linear, ...]", getattr(blocks[index], part))
                if there:
                    saliences = [found(f"block-{index} {part} {place}") for place in range(len(matrices))]
                    tensors[part] = (
                        head_importance(blocks[index], model.shape, saliences)
                        if part == "attention"
                        else neuron_importance(blocks[index], saliences)
                    )
            prepared.put(f"block-{index}", tensors)
        return prepared.finish(heads=model.shape.heads, ffn=model.shape.ffn)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape, pruned = model.shape, self._pruned(model)
        of_block, after, rounding = self._after(model, amount)
        obtained = removed_share(shape, of_block, self.scope)
        done = self.done(
            amount,
            obtained,
            heads=[shape.heads, of_block.heads],
            kv_heads=[shape.kv_heads, of_block.kv_heads],
            ffn=[shape.ffn, of_block.ffn],
            blocks=[pruned.start, pruned.stop],
            rounding=rounding,
            **said_when_far(amount, obtained),
        )
        if (of_block.heads, of_block.ffn) == (shape.heads, shape.ffn):
            return model.copy().after(done)
        heads = [list(range(shape.heads)) for _ in range(shape.layers)]
        neurons = [torch.arange(shape.ffn) for _ in range(shape.layers)]
        for index in pruned:
            tensors = prepared.get(f"block-{index}")
            if "attention" in tensors:
                heads[index] = ranked_heads(tensors["attention"], shape.kv_heads)[: of_block.heads]
            if "ffn" in tensors:
                neurons[index] = tensors["ffn"].argsort(descending=True, stable=True)[: of_block.ffn]
        cut = keep_groups(
            model,
            heads if of_block.heads < shape.heads else None,
            neurons if of_block.ffn < shape.ffn else None,
            irregular=self._spares(model),
        )
        assert accounting.count_shape(after).n_params == cut.counts.n_params, (after, cut.shape)
        return cut.after(done)
