"""Fewer attention heads, whose work the kept ones take over by least squares.

Shapes: D model width, N query heads, K key-value heads, H head width, I = N H inputs of the output projection,
R rows of calibration text, B rows at once, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need, Shape
from mariotte.compress.attention import columns_of, head_weights, without_heads
from mariotte.compress.calibration import check_finite, mean_squares, rows_at_once, second_moments, tokens_for
from mariotte.compress.compensation import check_ridge, compensated, invertible, least_squares_factors, with_ridge
from mariotte.compress.scope import oriented
from mariotte.compress.surgery import gathered, parameter_names
from mariotte.compress.walk import hooked
from mariotte.cuts.heads import BY, choices_of_heads, largest_gap, nearest_heads, refuse_heads
from mariotte.errors import ChainError
from mariotte.models.model import Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["Heads"]

CRITERIA = ("obs", "norm", "taylor")
_ENERGIES = ("queries", "keys")
"""Keys of the mean squares in front of norms over all heads."""


class Judge(Protocol):
    """Says what the loss of some heads would cost, given those that went before."""

    def cost(self, heads: Sequence[int]) -> float:
        """Of losing these heads together; comparable between choices of as many heads."""
        ...

    def remove(self, heads: Sequence[int]) -> None:
        """These have gone."""
        ...


class Norm:
    """The mean squared norm of what heads add to the stream.

    Parameters
    ----------
    output_DI : float64, the output projection
    moment_II : float64, mean of x xᵀ over its inputs
    width : H
    """

    def __init__(self, output_DI: Tensor, moment_II: Tensor, width: int) -> None:
        self.output_DI, self.moment_II, self.width = output_DI, moment_II, width

    def cost(self, heads: Sequence[int]) -> float:
        """tr(W_S G_SS W_Sᵀ), S the columns of the heads."""
        columns = columns_of(heads, self.width)
        part_DS = self.output_DI[:, columns]
        return float(((part_DS @ self.moment_II[columns][:, columns]) * part_DS).sum())

    def remove(self, heads: Sequence[int]) -> None:
        """Nothing: what each head adds does not depend on the others."""


class Surgeon:
    """The squared output error that is left when the other heads make up for the lost ones by least squares.

    Parameters
    ----------
    output_DI : float64, the output projection
    moment_II : float64, positive definite: mean of x xᵀ over its inputs, with a ridge
    width : H

    Notes
    -----
    Optimal brain surgeon for blocks of columns: losing the columns S raises the error by
    tr(W_S ((G⁻¹)_SS)⁻¹ W_Sᵀ); W and G⁻¹ are then updated as if they had never been.

    References
    ----------
    [hassibi1993optimal]_ equation 5, for blocks of columns instead of single weights.
    """

    @invertible()
    def __init__(self, output_DI: Tensor, moment_II: Tensor, width: int) -> None:
        self.weight_DI, self.width = output_DI.clone(), width
        self.inverse_II = torch.cholesky_inverse(cast(Tensor, torch.linalg.cholesky(moment_II)))

    @invertible()
    def _solved(self, columns: list[int], right: Tensor) -> Tensor:
        """((G⁻¹)_SS)⁻¹ times something."""
        factor_SS = cast(Tensor, torch.linalg.cholesky(self.inverse_II[columns][:, columns]))
        return torch.cholesky_solve(right, factor_SS)

    def cost(self, heads: Sequence[int]) -> float:
        """The rise of the error."""
        columns = columns_of(heads, self.width)
        part_DS = self.weight_DI[:, columns]
        return float((part_DS.T * self._solved(columns, part_DS.T)).sum())

    def remove(self, heads: Sequence[int]) -> None:
        """The others take over."""
        columns = columns_of(heads, self.width)
        update_SI = self._solved(columns, self.inverse_II[columns])
        self.weight_DI -= self.weight_DI[:, columns] @ update_SI
        self.inverse_II -= self.inverse_II[:, columns] @ update_SI


class Taylor:
    """The first-order change of the loss when heads are masked.

    Parameters
    ----------
    gradients_RN : derivative of each row's loss with respect to a factor on each head's output

    References
    ----------
    [michel2019sixteen]_ equation 2; of heads that go together, the sum of their derivatives, row by row.
    """

    def __init__(self, gradients_RN: Tensor) -> None:
        self.gradients_RN = gradients_RN

    def cost(self, heads: Sequence[int]) -> float:
        """Mean over rows of the absolute change."""
        return float(self.gradients_RN[:, list(heads)].sum(1).abs().mean())

    def remove(self, heads: Sequence[int]) -> None:
        """Nothing: the gradients are those of the uncut model."""


def removal_order(groups: int, per_group: int, by: str, judge: Judge) -> list[int]:
    """All heads, the first to be removed first.

    Parameters
    ----------
    groups : key-value heads
    per_group : query heads that share one
    by : groups: whole groups go until one is left, then that one's heads; queries: a head of every group goes, and
        again, until each has one left, then those
    judge : greedy: of the choices allowed next, the one that costs least goes; of equal ones the first

    Returns
    -------
    All N heads
    """
    left = [list(range(group * per_group, (group + 1) * per_group)) for group in range(groups)]
    order: list[int] = []

    def take(choices: list[list[int]]) -> list[int]:
        chosen = min(choices, key=judge.cost) if len(choices) > 1 else choices[0]
        judge.remove(chosen)
        order.extend(chosen)
        return chosen

    if by == "groups":
        while len(left) > 1:
            left.remove(take(left))
    else:
        for size in range(per_group, 1, -1):
            for _ in range(groups):
                (head,) = take([[head] for group in left if len(group) == size for head in group])
                next(group for group in left if head in group).remove(head)
    singles = [[head] for group in left for head in group]
    while singles:
        singles.remove(take(singles))
    return order


@torch.enable_grad()
def mask_gradients(model: Model, context: Context, step: str) -> list[Tensor]:
    """Derivative of each calibration row's mean loss with respect to a factor on each head, (R, N) float64 a block.

    Raises
    ------
    DataError
        When rows are too short to hold a prediction.
    ModelError
        When a gradient is not finite.

    Notes
    -----
    Cost: a forward and a backward pass; the graph of about 4096 tokens is held.
    """
    tokens_RT = tokens_for(context, step, predicting=True)
    heads, blocks = model.shape.heads, model.blocks
    found: list[list[Tensor]] = [[] for _ in blocks]
    rows = rows_at_once(tokens_RT)
    masks: list[Tensor] = []

    def masked(mask_BN: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        def scale(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            x_BTI = cast(Tensor, arguments[0])
            factors = mask_BN[:, None, :, None].to(x_BTI.dtype)
            return ((x_BTI.view(*x_BTI.shape[:-1], heads, -1) * factors).flatten(-2),)

        return scale

    for start in range(0, len(tokens_RT), rows):
        rows_BT = tokens_RT[start : start + rows].to(model.device)
        masks = [torch.ones(len(rows_BT), heads, device=model.device, requires_grad=True) for _ in blocks]
        handles = [
            block.output.register_forward_pre_hook(masked(mask_BN))
            for block, mask_BN in zip(blocks, masks, strict=True)
        ]
        with hooked(handles):
            logits_MV = model.logits(rows_BT)[:, :-1].float().flatten(0, 1)
        loss = functional.cross_entropy(logits_MV, rows_BT[:, 1:].flatten(), reduction="sum") / (rows_BT.shape[1] - 1)
        for some, gradient_BN in zip(found, torch.autograd.grad(loss, masks), strict=True):
            some.append(gradient_BN.double())
        context.progress("gradients", min(1.0, (start + rows) / len(tokens_RT)))
    gradients = [torch.cat(some) for some in found]
    for index, gradients_RN in enumerate(gradients):
        check_finite(gradients_RN, step, f"block-{index}", model, what="gradients")
    return gradients


@dataclass(frozen=True, kw_only=True)
class Heads(Step):
    """Remove the same number of attention heads from each block.

    Parameters
    ----------
    criterion : which heads matter. obs: greedy, the least squared error of the output projection after the others have
        made up for it; norm: the mean squared norm of what the head adds to the stream; taylor: the first-order change
        of the calibration loss when the head is masked
    compensate : fold what the removed heads did into the kept ones' columns of the output projection, by least squares
        on calibration activations
    by : queries: as many query heads of every group, key-value heads only once each serves a single query head; groups:
        key-value heads go with all query heads that share them. None takes what leaves the finer choice of head counts,
        and queries where both are as fine: at equal parameters it lost less (stories260K without 15.8 % of its
        parameters 2.64, against 2.38 and 3.30 by groups without 11.8 and 17.7 %)
    ridge : added to the diagonal of the activations' second moment, as a share of its mean, for obs and compensation

    Raises
    ------
    ChainError
        When the criterion or `by` is none of these, or the ridge is not positive.

    Notes
    -----
    An amount is a share of the query heads. The head width stays, so that the config has to state it beside a product
    of heads and head width that is no longer the hidden size. Head counts that a family's config refuses are left out:
    Llama's must divide the hidden size. Of what is left the count nearest to the amount is taken, of equally near ones
    the larger, at least one; the facts of a result name it and the largest gap between counts as its rounding.

    Removal orders are nested, so that one preparation serves all amounts.

    Families whose config ties the head width to the hidden size (opt, gpt2, gpt_neox, falcon) become models of a class
    of ours, which transformers reads with ``trust_remote_code=True``. Where queries and keys are normalised over all
    heads together (olmo2) the norm's weights take over what the missing heads change of it, in the mean over
    calibration text: there alone removing a head is not quite the same as its giving nothing. It cannot be: the energy
    of the queries that are missing depends on the token, and to know it takes the rows that went.

    When to use it: for small shares, in combination with other cuts, and with compensation, which took away a fifth to
    three fifths of what losing about half the heads cost on seven small models. Heads are few and each does much: on
    the five where it was tried, as many parameters of feed-forward neurons cost less. Of the criteria with
    compensation, obs and norm are nearly equal (norm by up to 0.07 nats ahead on three models, obs by up to 0.11, above
    all at deep cuts and on the larger models); taylor lost up to 0.08 nats less at some mild cuts, and more than a nat
    more at some deep ones.

    Cost: a forward pass with I² more multiplications a token and block (taylor: a backward pass too); I³ a block for
    the order and one factorisation; an amount then costs D I² a block. Stored: I² + D I float64 a block.

    References
    ----------
    [michel2019sixteen]_ for taylor; [hassibi1993optimal]_ for obs; compensation as in [he2017channel]_.
    """

    unit: ClassVar[str] = "heads"
    family: ClassVar[str] = "width"
    reference: ClassVar[str] = "michel2019sixteen"
    streams: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("causal",)
    mixtures: ClassVar[bool] = True

    criterion: str = "obs"
    compensate: bool = True
    by: str | None = None
    ridge: float = 1e-2

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ChainError(f"heads: criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        if self.by is not None and self.by not in BY:
            raise ChainError(f"heads: by must be one of {', '.join(BY)}, or left out, got {self.by!r}")
        check_ridge(self.name(), self.ridge)

    @override
    def refuse(self, model: Model) -> str | None:
        return super().refuse(model) or refuse_heads(model)

    @override
    def makes_plain(self, model: Model) -> bool:
        return bool(model.entry.head_dim) and not model.entry.irregular

    def kept(self, model: Model, amount: int | float) -> tuple[int, int]:
        """Query and key-value heads that are kept of a model at an amount, from its shape alone."""
        return nearest_heads(choices_of_heads(model, self.by)[1], model.shape.heads * (1 - amount))

    @override
    def whole(self) -> str | None:
        if self.criterion == "taylor":
            return "takes gradients through all blocks at once for criterion=taylor: leave criterion out"
        return super().whole()

    @override
    def moment(self, shape: Shape) -> int:
        return shape.heads * shape.head_dim

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        heads, groups = self.kept(model, amount)
        after = replace(model.shape, heads=heads, kv_heads=groups)
        return model.counts.n_params - accounting.count_shape(after).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        blocks, shape = model.blocks, model.shape
        by, _ = choices_of_heads(model, self.by)
        gradients = mask_gradients(model, context, self.name()) if self.criterion == "taylor" else None
        moments: MutableMapping[str, Tensor] = {}
        if self.compensate or gradients is None:
            inputs = {f"block-{index}": [block.output] for index, block in enumerate(blocks)}
            moments = second_moments(model, context, self.name(), inputs)
        normed = {
            f"block-{index} {path}": [block.module.get_submodule(path)]
            for index, block in enumerate(blocks)
            for path in (block.entry.head_norms if block.entry.whole_norms else ())
        }
        energies: MutableMapping[str, Tensor] = mean_squares(model, context, self.name(), normed) if normed else {}
        prepared = Prepared(context.scratch)
        for index, block in enumerate(blocks):
            key = f"block-{index}"
            output_DI = oriented(block.output).double()
            moment_II = moments.pop(key, None)
            damped_II = None if moment_II is None else with_ridge(moment_II, self.ridge)
            judge: Judge
            if gradients is not None:
                judge = Taylor(gradients[index])
            elif self.criterion == "norm":
                assert moment_II is not None
                judge = Norm(output_DI, moment_II, shape.head_dim)
            else:
                assert damped_II is not None
                judge = Surgeon(output_DI, damped_II, shape.head_dim)
            order = removal_order(shape.kv_heads, shape.heads // shape.kv_heads, by, judge)[::-1]
            tensors = {"order": torch.tensor(order)}
            if self.compensate:
                assert damped_II is not None
                columns_I = torch.tensor(columns_of(order, shape.head_dim), device=output_DI.device)
                tensors["factor"], tensors["product"] = least_squares_factors(output_DI, damped_II, columns_I)
            if energies:
                for name, path in zip(_ENERGIES, block.entry.head_norms, strict=True):
                    tensors[name] = energies[f"{key} {path}"]
            prepared.put(key, tensors)
            context.progress("order", (index + 1) / len(blocks))
        return prepared.finish(heads=shape.heads, by=by)

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape = model.shape
        by, choices = choices_of_heads(model, self.by)
        heads, groups = self.kept(model, amount)
        done = self.done(
            amount,
            1 - heads / shape.heads,
            heads=[shape.heads, heads],
            kv_heads=[shape.kv_heads, groups],
            by=by,
            rounding=largest_gap(choices),
        )
        if heads == shape.heads:
            return model.copy().after(done)
        names = parameter_names(model)
        width = shape.head_dim
        weights = gathered(model)
        for index, block in enumerate(model.blocks):
            tensors = {key: tensor.to(model.device) for key, tensor in prepared.get(f"block-{index}").items()}
            ranked = cast("list[int]", tensors["order"][:heads].tolist())
            kept = sorted(ranked)
            output_Di = None
            if self.compensate:
                output_Di = compensated(tensors["factor"], tensors["product"], heads * width)
                output_Di = output_Di[:, columns_of([ranked.index(head) for head in kept], width)]
            energies = [tensors[name] for name in _ENERGIES if name in tensors]
            weights.update(head_weights(block, names, shape, kept, output_Di, energies))
        return without_heads(model, weights, heads, groups).after(done)
