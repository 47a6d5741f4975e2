"""Fewer heads and neurons: those go whose activations hardly fluctuate, and a bias stands for their mean.

Shapes: D model width, N query heads, F neurons of a block, K neurons at once, O outputs and I inputs of a matrix,
M tokens at once, P parts that may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need, Shape
from mariotte.compress.calibration import Means, observe
from mariotte.compress.groups import (
    SCOPES,
    keep_groups,
    ranked_heads,
)
from mariotte.compress.scope import oriented
from mariotte.compress.surgery import rounding
from mariotte.cuts.groups import (
    bounds_of_groups,
    equal_shape,
    group_sizes,
    heads_at_once,
    refuse_flap,
    removed_of_groups,
    removed_share,
    said_when_far,
)
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["FLAP"]

METRICS = ("WIFV", "IFV", "WIFN")


def fluctuation(weight_OI: Tensor, mean_I: Tensor, square_I: Tensor, metric: str) -> Tensor:
    """How much a matrix draws from each of its inputs beside their mean, (I,) float64.

    Parameters
    ----------
    weight_OI : the matrix
    mean_I, square_I : mean of its inputs over tokens, and of their squares
    metric : WIFV: the variance of the input times the squared l2 norm of the column; IFV: the variance; WIFN: the root
        of the mean square times the mean size of the column's weights
    """
    if metric == "WIFN":
        return weight_OI.double().abs().mean(0) * square_I.sqrt()
    variance_I = (square_I - mean_I.square()).clamp(min=0.0)
    return variance_I if metric == "IFV" else variance_I * weight_OI.double().square().sum(0)


def standardised(score_I: Tensor) -> Tensor:
    """Scores with mean 0 and standard deviation 1, as scores of several matrices can be compared; equal ones are 0."""
    centred_I = score_I - score_I.mean()
    deviation = float(centred_I.square().sum() / max(len(score_I) - 1, 1)) ** 0.5
    return centred_I / deviation if deviation > 0 else torch.zeros_like(score_I)


def first_to_go(score_P: Tensor, size_P: Tensor, target: float) -> Tensor:
    """Which parts go: those with the smallest scores, as many as come nearest to a target, (P,) bool.

    Parameters
    ----------
    score_P : of each part; of equal ones the first goes first
    size_P : parameters of each
    target : parameters that should go
    """
    order_P = score_P.argsort(stable=True)
    removed = torch.cat([torch.zeros(1, dtype=torch.float64), size_P.double()[order_P].cumsum(0)])
    count = int((removed - target).abs().argmin())
    gone_P = torch.zeros(len(score_P), dtype=torch.bool)
    gone_P[order_P[:count]] = True
    return gone_P


@dataclass(frozen=True)
class Part:
    """Heads or neurons of a block that go together: a key-value head with its query heads, or some neurons.

    Parameters
    ----------
    block : its number
    members : query heads, or neurons, of the block
    heads : they are heads
    size : parameters that go with them
    """

    block: int
    members: tuple[int, ...]
    heads: bool
    size: int


@dataclass(frozen=True, kw_only=True)
class FLAP(Step):
    """Remove the heads and neurons that a matrix would miss least beside their mean, wherever in the model they are.

    Parameters
    ----------
    metric : how much an input x of a matrix W is missed. WIFV: its variance over calibration tokens times the squared
        l2 norm of its column of W; IFV: the variance alone; WIFN: the root of its mean square times the mean size of
        the weights in its column
    uniform : every block loses the same share of heads and of neurons, so that the result is an ordinary checkpoint.
        False compares all of the model, in scores standardised for each matrix
    compensate : add what was removed gives in the mean to the biases of the matrices that write to the stream. An
        ordinary checkpoint has them only in some families; elsewhere, with `uniform`, nothing is added
    round_to : multiple to which feed-forward widths are rounded; None takes 128 in models at least 1024 wide, 8 in
        smaller ones; the authors' code takes 1

    Raises
    ------
    ChainError
        When the metric is none of these, or `round_to` is not positive.

    Notes
    -----
    An amount is a share of the parameters of attention and MLPs, as far as they are in scope. Heads that share a
    key-value head go together; where all share one they go one by one. As in the authors' code the metric of attention
    is squared before it is averaged over a head. One group and one multiple of neurons stay in each block. How many
    heads go and how many neurons depends on the activations, so that of a share of the model's parameters the nearest
    is had to within one of these parts. With `uniform` the heads that go are as many as are nearest to the share, and
    neurons make up for what these, being few, leave; a result far from what was asked says so.

    Unless `uniform`, the result is of a class of ours for blocks of different sizes, which every dense decoder has.
    Where queries and keys are normalised over all heads together (olmo2), heads do not go exactly; see `heads`.

    When to use it: where blocks differ and there is no time for least squares: it takes one forward pass and solves
    nothing. With 25 % of all parameters gone it came to 3.16 nats on stories260K (dense 1.77), with `uniform` to 3.42
    and without biases to 3.24; `ffn`, which compensates with the other neurons and not with a constant, to 2.75. More
    is in docs/methods.md.

    Cost: one forward pass; an amount then costs a copy. Stored: two float64 for each input of two matrices a block.

    References
    ----------
    [an2024flap]_ equations 5 to 9; AL-AM in its table of structures, with `uniform` UL-UM.
    """

    unit: ClassVar[str] = "groups"
    family: ClassVar[str] = "width"
    version: ClassVar[int] = 2  # equal cuts: the nearest amount, neurons making up for coarse heads
    reference: ClassVar[str] = "an2024flap"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    scopes: ClassVar[tuple[str, ...]] = SCOPES
    plain: ClassVar[bool] = False

    metric: str = "WIFV"
    uniform: bool = False
    compensate: bool = True
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            raise ChainError(f"flap: metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        accounting.check_round_to(self.name(), self.round_to, of="neurons")

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_flap(model, self.scope, uniform=self.uniform)

    @override
    def makes_plain(self, model: Model) -> bool:
        ordinary = bool(model.entry.head_dim) or self.scope == "ffn"
        return self.uniform and ordinary and not model.entry.irregular

    @property
    def _there(self) -> tuple[str, ...]:
        return tuple(part for part in ("attention", "ffn") if self.scope in ("all", part))

    def _bounds(self, model: Model) -> tuple[int, int, int]:
        """Parameters of all groups in scope, of those that stay in any case, and of the largest part."""
        return bounds_of_groups(model.shape, self.scope, self.round_to)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        """As `Step.removes`; unless `uniform`, to within `slack`."""
        if self.uniform:
            after, _ = equal_shape(model, amount, self.scope, self.round_to)
            return model.counts.n_params - accounting.count_shape(after).n_params
        return removed_of_groups(model.shape, amount, self.scope, self.round_to, biases=self.compensate)[0]

    @override
    def slack(self, model: Model) -> int:
        if self.uniform:
            return 0
        return removed_of_groups(model.shape, 0.0, self.scope, self.round_to, biases=self.compensate)[1]

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        blocks = model.blocks
        matrices = {
            f"{part} of block {index}": (block.output if part == "attention" else block.down)
            for index, block in enumerate(blocks)
            for part in self._there
        }
        moments = Means(lambda x_MI: torch.stack((x_MI.sum(0), x_MI.square().sum(0))))
        observe(model, context, self.name(), {name: [matrix] for name, matrix in matrices.items()}, moments)
        prepared = Prepared(context.scratch)
        for index in range(len(blocks)):
            tensors: dict[str, Tensor] = {}
            for part in self._there:
                name = f"{part} of block {index}"
                mean_I, square_I = moments.pop(name, self.name(), model)
                found_I = fluctuation(oriented(matrices[name]), mean_I, square_I, self.metric)
                tensors[part] = found_I.square() if part == "attention" else found_I
                tensors[f"mean {part}"] = mean_I
            prepared.put(f"block-{index}", tensors)
        return prepared.finish(metric=self.metric)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        found = [prepared.get(f"block-{index}") for index in range(shape.layers)]
        total, stays, largest = self._bounds(model)
        if self.uniform:
            heads, neurons = self._uniform(model, found, amount)
            of_all, off = equal_shape(model, amount, self.scope, self.round_to)
            obtained = removed_share(shape, of_all, self.scope)
        else:
            heads, neurons = self._adaptive(model, found, amount)
            counts = tuple((len(some), _groups_of(shape, index, some)) for index, some in enumerate(heads))
            after = replace(shape, attentions=counts, ffns=tuple(map(len, neurons)))
            obtained, off = (
                (model.counts.n_params - accounting.count_shape(after).n_params) / total,
                max(stays, largest) / total,
            )
        done = self.done(
            amount,
            obtained,
            heads=[*map(len, heads)],
            ffn=[*map(len, neurons)],
            rounding=off,
            **said_when_far(amount, obtained),
        )
        if obtained == 0:
            return model.copy().after(done)
        cut = keep_groups(
            model,
            heads if "attention" in self._there else None,
            [torch.tensor(some) for some in neurons] if "ffn" in self._there else None,
            irregular=not self.uniform,
            biases=self._means(model, found, heads, neurons) if self.compensate else None,
        )
        return cut.after(done)

    def _uniform(
        self, model: Model, found: Sequence[dict[str, Tensor]], amount: int | float
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Query heads and neurons that stay in every block, as many in each."""
        shape = model.shape
        after, _ = equal_shape(model, amount, self.scope, self.round_to)
        heads = [list(range(shape.heads)) for _ in found]
        neurons = [list(range(shape.ffn)) for _ in found]
        for index, tensors in enumerate(found):
            if "attention" in tensors:
                score_N = tensors["attention"].view(shape.heads, -1).sum(1)
                heads[index] = sorted(ranked_heads(score_N, shape.kv_heads)[: after.heads])
            if "ffn" in tensors:
                ranked = cast("list[int]", tensors["ffn"].argsort(descending=True, stable=True).tolist())
                neurons[index] = sorted(ranked[: after.ffn])
        return heads, neurons

    def _adaptive(
        self, model: Model, found: Sequence[dict[str, Tensor]], amount: int | float
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The same, as many as their standardised scores say."""
        shape = model.shape
        total, stays, _ = self._bounds(model)
        parts: list[Part] = []
        scores: list[float] = []
        multiple = rounding(shape.ffn, self.round_to, at=shape.hidden)
        for index, tensors in enumerate(found):
            head, neuron = group_sizes(shape, index)
            if "attention" in tensors:
                score_N = standardised(tensors["attention"]).view(shape.heads_of(index)[0], -1).mean(1)
                of_parts = [(group, float(score_N[group].mean())) for group in _head_groups(shape, index)]
                best = max(range(len(of_parts)), key=lambda place: of_parts[place][1])
                for place, (group, score) in enumerate(of_parts):
                    if place != best:
                        parts.append(Part(index, tuple(group), True, head))
                        scores.append(score)
            if "ffn" in tensors:
                score_F = standardised(tensors["ffn"])
                ranked_F = score_F.argsort(descending=True, stable=True)
                # The best multiple stays; the others go from the worst on, as their means fall.
                worse = cast("tuple[Tensor, ...]", ranked_F.split(multiple))[:0:-1]
                for some_K in worse:
                    parts.append(Part(index, tuple(cast("list[int]", some_K.tolist())), False, neuron * len(some_K)))
                    scores.append(float(score_F[some_K].mean()))
        sizes_P = torch.tensor([part.size for part in parts], dtype=torch.float64)
        gone_P = first_to_go(torch.tensor(scores, dtype=torch.float64), sizes_P, min(total * amount, total - stays))
        heads = [set(range(shape.heads_of(index)[0])) for index in range(shape.layers)]
        neurons = [set(range(shape.ffn_of(index))) for index in range(shape.layers)]
        for part, gone in zip(parts, cast("list[bool]", gone_P.tolist()), strict=True):
            if gone:
                (heads if part.heads else neurons)[part.block] -= set(part.members)
        return [sorted(some) for some in heads], [sorted(some) for some in neurons]

    def _means(
        self,
        model: Model,
        found: Sequence[dict[str, Tensor]],
        heads: Sequence[Sequence[int]],
        neurons: Sequence[Sequence[int]],
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """What the heads and the neurons that go give in the mean, (D,) for each block."""
        width = model.shape.head_dim
        added: list[tuple[Tensor | None, Tensor | None]] = []
        for index, (block, tensors) in enumerate(zip(model.blocks, found, strict=True)):
            given: list[Tensor | None] = []
            for part, matrix in (("attention", block.output), ("ffn", block.down)):
                if part not in tensors:
                    given.append(None)
                    continue
                mean_I = tensors[f"mean {part}"].to(model.device)
                gone_I = torch.ones(len(mean_I), dtype=torch.bool, device=model.device)
                if part == "attention":
                    gone_I.view(-1, width)[list(heads[index])] = False
                else:
                    gone_I[list(neurons[index])] = False
                given.append(oriented(matrix).double() @ (mean_I * gone_I))
            added.append((given[0], given[1]))
        return added


def _head_groups(shape: Shape, layer: int) -> list[list[int]]:
    """Query heads of a block that go together: those of a key-value head, or each alone where all share one."""
    heads, at_once = shape.heads_of(layer)[0], heads_at_once(shape, layer)
    return [list(range(start, start + at_once)) for start in range(0, heads, at_once)]


def _groups_of(shape: Shape, layer: int, kept: Sequence[int]) -> int:
    """Key-value heads that some query heads of a block share."""
    heads, groups = shape.heads_of(layer)
    return len({head // (heads // groups) for head in kept})
