"""MoDeGPT: pairs of matrices that meet in one width lose some of it together; blocks that matter lose less.

Shapes: D model width, F neurons of a block, N query heads, K key-value heads, G query heads that share one of them,
H head width, P pairs of dimensions that rotary embeddings turn, W width kept of a head's values, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need, Shape
from mariotte.compress.allocate import by_influence
from mariotte.compress.calibration import Means, observe, outer
from mariotte.compress.compensation import compensated, invertible, least_squares_factors, obs_order, with_ridge
from mariotte.compress.influence import block_influence
from mariotte.compress.neurons import neuron_weights
from mariotte.compress.scope import oriented, turned
from mariotte.compress.surgery import derive, gathered, parameter_names
from mariotte.cuts.common import whole
from mariotte.cuts.ranks import (
    evenly,
    multiples_of_widths,
    refuse_narrowing,
    turned_dimensions,
    widths_left,
    with_widths,
)
from mariotte.errors import ChainError
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["MoDeGPT"]

ALLOCATIONS = ("influence", "uniform")
NEURONS = ("obs", "leverage")


def leverage_order(moment_FF: Tensor, ridge: float) -> Tensor:
    """Neurons by their ridge leverage, the most important first, (F,) int64.

    Parameters
    ----------
    moment_FF : (F, F) float64, mean of x xᵀ over the down projection's inputs
    ridge : as for `with_ridge`; the published 1 is that of unnormalised sums and nearly 0 here

    Notes
    -----
    The diagonal of G (G + ridge)⁻¹: how much of a neuron the others cannot say.

    References
    ----------
    [lin2025modegpt]_ algorithm 1.
    """
    damped_FF = with_ridge(moment_FF, ridge)
    leverage_F = cast(Tensor, torch.linalg.solve(damped_FF, moment_FF)).diagonal()
    return leverage_F.argsort(descending=True, stable=True)


def pair_order(query_NH: Tensor, key_KH: Tensor) -> Tensor:
    """Rotary pairs of every key-value head, those that add most to the scores first, (K, P) int64.

    Parameters
    ----------
    query_NH, key_KH : (N, H) and (K, H) float64, mean squares of queries and keys

    Notes
    -----
    A rotation by the difference of two places mixes the two dimensions of a pair and no others, and keeps their norm.
    So a pair is a column of the product of queries and keys, kept or lost as one, at its own frequency; its score is
    the norm of its part of the queries times that of its part of the keys. All query heads of a key-value head lose the
    same pairs, as they share its keys: theirs is the norm of all of them.

    References
    ----------
    [lin2025modegpt]_ algorithm 2.
    """
    groups, pairs = len(key_KH), key_KH.shape[1] // 2
    query_KP = query_NH.view(groups, -1, 2, pairs).sum((1, 2))
    key_KP = key_KH.view(groups, 2, pairs).sum(1)
    # The product of the squares: the same order as that of the norms.
    return (query_KP * key_KP).argsort(dim=1, descending=True, stable=True)


@invertible()
def value_basis(output_OH: Tensor, moment_HH: Tensor) -> tuple[Tensor, Tensor]:
    """A basis of a key-value head's values in which the first W say the most to the stream, whatever W.

    Parameters
    ----------
    output_OH : (G D, H) float64, the columns of the output projection of all heads that share these values, stacked
    moment_HH : (H, H) float64, positive definite: mean of v vᵀ over the values

    Returns
    -------
    to : (H, H), whose first W rows make the new values
    back : (H, H), its inverse, whose first W columns take them back

    Notes
    -----
    With moment = S Sᵀ and output S = U Σ Vᵀ, to = Vᵀ S⁻¹ and back = S V: of all pairs of matrices that meet in width W,
    theirs leave the least mean |output v - output' v'|², the squares of the singular values dropped.

    References
    ----------
    [lin2025modegpt]_ algorithm 3, with the values themselves in place of the inputs of their projection: half the size,
    and biases are seen.
    """
    root_HH = cast(Tensor, torch.linalg.cholesky(moment_HH))
    _, right_HH = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(root_HH.T @ (output_OH.T @ output_OH) @ root_HH))
    right_HH = right_HH.flip(1)
    largest = torch.gather(right_HH, 0, right_HH.abs().argmax(0, keepdim=True))
    right_HH = right_HH * (1 - 2 * (largest < 0).double())
    back_HH = root_HH @ right_HH
    to_HH = cast(Tensor, torch.linalg.solve_triangular(root_HH.T, right_HH, upper=True)).T  # pyright: ignore[reportPrivateImportUsage] public
    return to_HH, back_HH


def spread_by_influence(influence: Sequence[float], temperature: float, gone: int, free: Sequence[int]) -> list[int]:
    """How many units every block gives, of as many as it can; see `by_influence`."""
    return whole(by_influence(gone / sum(free), influence, free, temperature=temperature), free, gone)


@dataclass(frozen=True, kw_only=True)
class MoDeGPT(Step):
    """Reduce the widths in which pairs of matrices meet: neurons, a head's queries and keys, a head's values.

    Parameters
    ----------
    allocation : influence: a block loses by the entropic rule of the paper, less if it changes the stream more;
        uniform: all blocks lose the same
    temperature : of that rule, in units of the mean influence; the larger, the closer to uniform
    queries : share of what the others lose that queries and keys do; 1 as published. Ours is from the testbed: on the
        largest decoder, 40 % of all parameters gone, 0, 0.5 and 1 lost 0.024, 0.009 and 0.015 nats
    neurons : which stay. obs: the greedy order of optimal brain surgeon; leverage: by ridge leverage, as published.
        Half of all neurons of the largest testbed decoder gone, they lost 0.008 and 0.044 nats
    compensate : fit the output projection anew to the reduced values by least squares; false leaves it the factor that
        the decomposition gives, as published
    ridge : added to the diagonal of second moments of activations, as a share of its mean
    round_to : multiple of feed-forward widths; None takes 128 in models at least 1024 wide, 8 in smaller ones. Widths
        of heads are then multiples of 8, or of a smaller power of two where that would leave fewer than eight choices;
        of what divides `round_to` where it is given

    Raises
    ------
    ChainError
        When a field is none of these.

    Notes
    -----
    The amount is the share of the weights in scope that goes. Three decompositions:

    * The MLP (Nystrom): neurons are chosen, and the down projection is fitted anew by least squares.
    * Queries and keys (CR): dimensions are chosen and no number changes. Rotary embeddings turn pairs of dimensions,
      each at its own frequency, so that pairs are chosen; see `pair_order`. A key-value head's query heads lose what it
      loses.
    * Values and output (SVD): a key-value head's values turn to the directions that say most, together for all query
      heads that share them; see `value_basis`.

    How much of each goes in all blocks together is told by the shapes; how blocks share it, by their influence s on
    calibration text: the amounts are proportional to softmax(-s / eps) (section 3.3, equations 10 and 11).

    When to use it: from a quarter to 40 % of the largest testbed decoder it loses less than `ffn` at equal parameters;
    at 10 and 20 % neither loses what could be measured, and `heads` loses nats (``benchmarks/results/low_rank.md``).
    Not on models with few pairs a head: with four, on stories260K, losing one of them costs more than neurons do,
    `queries=0` is better and `ffn` better still.

    Dimensions that a family does not turn (a part of each head in phi and gpt_neox, all of them in opt and gpt2) are
    chosen by pairs as well. Where queries and keys have norms of their own (qwen3, gemma3_text, olmo2), CR cannot hold:
    such a norm divides by the mean square over all of a head, so that without some of it every score is another one,
    and no weight can make up for what depends on the token. There they stay whole, whatever `queries` says, and at most
    what MLPs and values hold can go.

    The result has widths by layer, and heads whose frequencies are not those of a head so wide, which no family's
    config can state: a model of the class for irregular sizes, which ``transformers`` reads with ``trust_remote_code``.
    In the scope ffn with allocation=uniform it is an ordinary checkpoint.

    Cost: two forward passes with D² + F² + (N H)² more multiplications a token and block; F³ + (N H)³ a block for
    orders and factorisations; an amount then costs D F² + D (N H)² a block. Stored: F² + (N H)² + D (F + N H) float64 a
    block.

    References
    ----------
    [lin2025modegpt]_; [hassibi1993optimal]_ for obs.
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "low-rank"
    reference: ClassVar[str] = "lin2025modegpt"
    streams: ClassVar[bool] = True
    scopes: ClassVar[tuple[str, ...]] = ("all", "attention", "ffn")
    plain: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    allocation: str = "influence"
    temperature: float = 1.0
    queries: float = 0.5
    neurons: str = "obs"
    compensate: bool = True
    ridge: float = 1e-2
    round_to: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, known in (
            ("allocation", self.allocation, ALLOCATIONS),
            ("neurons", self.neurons, NEURONS),
        ):
            if value not in known:
                raise ChainError(f"modegpt: {field} must be {' or '.join(known)}, got {value!r}")
        for field, value in (("temperature", self.temperature), ("ridge", self.ridge)):
            if not 0 < value < math.inf:
                raise ChainError(
                    f"modegpt: {field} must be positive, such as {getattr(type(self), field)}, got {value}"
                )
        if not 0 <= self.queries <= 1:
            raise ChainError(f"modegpt: queries must be a share in [0, 1], got {self.queries}")
        accounting.check_round_to(self.name(), self.round_to, of="neurons")

    @property
    def _plain(self) -> bool:
        return self.scope == "ffn" and self.allocation == "uniform"

    @override
    def makes_plain(self, model: Model) -> bool:
        return self._plain and not model.entry.irregular

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model):
            return reason
        return refuse_narrowing(model, self.scope, plain=self._plain)

    @override
    def moment(self, shape: Shape) -> int:
        of_heads = max(shape.hidden, shape.heads * shape.head_dim)
        return {"attention": of_heads, "ffn": shape.ffn}.get(self.scope, max(of_heads, shape.ffn))

    def _sizes(
        self, shape: Shape, amount: float, influence: Sequence[float] | None = None
    ) -> tuple[list[int], list[int], list[int]]:
        """Neurons, pairs and width of values that every block keeps.

        Parameters
        ----------
        influence : of the blocks; None lets all lose alike, which leaves as many parameters
        """
        spread = evenly if influence is None else partial(spread_by_influence, influence, self.temperature)
        return widths_left(shape, amount, self.scope, queries=self.queries, round_to=self.round_to, spread=spread)

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        after = with_widths(model.shape, *self._sizes(model.shape, amount))
        return model.counts.n_params - accounting.count_shape(after).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        shape, blocks = model.shape, model.blocks
        means = Means(outer)

        def gather(group: str, x_MI: Tensor) -> None:
            # With a one behind it: moments then tell means, and what biases add.
            means(group, nn.functional.pad(x_MI, (0, 1), value=1.0) if group.startswith("inputs") else x_MI)

        inputs: dict[str, list[nn.Module]] = {}
        for index, block in enumerate(blocks):
            if self.scope != "attention":
                inputs[f"neurons-{index}"] = [block.down]
            if self.scope != "ffn":
                inputs[f"inputs-{index}"] = [block.attention[0]]
                inputs[f"values-{index}"] = [block.output]
        influence_L = torch.zeros(shape.layers, dtype=torch.float64)
        if self.allocation == "influence":
            influence_L = block_influence(model, context, self.name())
        prepared = Prepared(context.scratch)
        prepared.put("influence", {"influence": influence_L})
        moments: dict[str, Tensor] = {}

        def passed(group: str) -> None:
            moments[group] = means.pop(group, self.name(), model)
            index = int(group.rpartition("-")[2])
            if not {name for name in inputs if name.endswith(f"-{index}")} <= set(moments):
                return
            block, tensors = blocks[index], dict[str, Tensor]()
            if self.scope != "attention":
                tensors |= self._of_neurons(block, moments.pop(f"neurons-{index}"))
            if self.scope != "ffn":
                found = moments.pop(f"inputs-{index}"), moments.pop(f"values-{index}")
                tensors |= self._of_heads(block, model, shape.widths_of(index), *found)
            prepared.put(f"block-{index}", tensors)
            context.progress("decomposition", (index + 1) / len(blocks))

        observe(model, context, self.name(), inputs, gather, passed=passed)
        return prepared.finish(influence=[round(float(value), 6) for value in influence_L])

    def _of_neurons(self, block: Block, moment_FF: Tensor) -> dict[str, Tensor]:
        """The order of a block's neurons, and what least squares need for any number of them."""
        down_DF, damped_FF = oriented(block.down).double(), with_ridge(moment_FF, self.ridge)
        if self.neurons == "obs":
            order_F = obs_order(down_DF, damped_FF).flip(0).to(down_DF.device)
        else:
            order_F = leverage_order(moment_FF, self.ridge)
        factor_FF, product_DF = least_squares_factors(down_DF, damped_FF, order_F)
        return {"neurons": order_F, "neurons-factor": factor_FF, "neurons-product": product_DF}

    def _of_heads(
        self, block: Block, model: Model, widths: tuple[int, int], moment_XX: Tensor, mixed_II: Tensor
    ) -> dict[str, Tensor]:
        """The order of pairs, the bases of values, and what least squares need for any width of them.

        Parameters
        ----------
        widths : of queries and keys, and of values
        moment_XX : of the inputs of query, key and value with a one behind them
        mixed_II : of the inputs of the output projection
        """
        heads, groups = model.shape.heads, model.shape.kv_heads
        width, value = widths
        queries, keys, values = projections(block, model, widths)
        query_NH = _moment(queries, moment_XX).diagonal().view(heads, width)
        key_KH = _moment(keys, moment_XX).diagonal().view(groups, width)
        values_VV = _moment(values, moment_XX)
        output_DNH = oriented(block.output).double().view(-1, heads, value)
        to_KHH, back_KHH = torch.zeros(2, groups, value, value, dtype=torch.float64, device=mixed_II.device)
        shared = heads // groups
        for group in range(groups):
            here = slice(group * value, (group + 1) * value)
            stacked_OH = output_DNH[:, group * shared : (group + 1) * shared].flatten(0, 1)
            moment_HH = with_ridge(values_VV[here, here], self.ridge)
            to_KHH[group], back_KHH[group] = value_basis(stacked_OH, moment_HH)
        found = {"pairs": pair_order(query_NH, key_KH), "to": to_KHH, "back": back_KHH}
        if self.compensate:
            to_II = _diagonal(to_KHH.repeat_interleave(shared, 0))
            back_II = _diagonal(back_KHH.repeat_interleave(shared, 0))
            # The first dimension of all heads, then the second: any width is then a number of first columns.
            order_I = torch.arange(heads * value, device=mixed_II.device).view(heads, value).T.flatten()
            turned_II = to_II @ with_ridge(mixed_II, self.ridge) @ to_II.T
            turned_II = (turned_II + turned_II.T) / 2
            factors = least_squares_factors(oriented(block.output).double() @ back_II, turned_II, order_I)
            found["values-factor"], found["values-product"] = factors
        return found

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape, entry = model.shape, model.entry
        influence = cast("list[float]", prepared.get("influence")["influence"].tolist())
        sizes = ffns, pairs, values = self._sizes(shape, amount, influence)
        after = with_widths(shape, *sizes)
        gone = model.counts.n_params - accounting.count_shape(after).n_params
        weights = sum(matrix.weight.numel() for matrix in model.matrices(self.scope))
        ins, dims = (3 if shape.gated else 2), shape.heads + shape.kv_heads
        of_neuron, of_pair, of_value = multiples_of_widths(shape, self.round_to)
        done = self.done(
            amount,
            gone / weights,
            ffn=ffns,
            head_widths=[[2 * pair, value] for pair, value in zip(pairs, values, strict=True)],
            # Every block keeps one multiple of each, and totals are rounded to them.
            rounding=shape.layers * shape.hidden * (ins * of_neuron + dims * (2 * of_pair + of_value)),
        )
        if not gone:
            return model.copy().after(done)
        found = gathered(model)
        narrow = [shape.widths_of(layer) != after.widths_of(layer) for layer in range(shape.layers)]
        for index, block in enumerate(model.blocks):
            tensors = {key: tensor.to(model.device) for key, tensor in prepared.get(f"block-{index}").items()}
            if ffns[index] < shape.ffn_of(index):
                found |= _fewer_neurons(model, block, tensors, ffns[index])
            if any(narrow):
                found |= self._narrower(model, block, tensors, shape.widths_of(index), pairs[index], values[index])
        if not any(narrow) and len(set(ffns)) == 1 and not entry.irregular:
            return derive(model, found, {entry.ffn: ffns[0]}).after(done)
        config: dict[str, Any] = {"ffn_sizes": ffns}
        if any(narrow):
            config["width_sizes"] = [list(after.widths_of(layer)) for layer in range(shape.layers)]
        return derive(model, found, config, irregular=True).after(done)

    def _narrower(
        self,
        model: Model,
        block: Block,
        tensors: dict[str, Tensor],
        widths: tuple[int, int],
        pairs: int,
        value: int,
    ) -> dict[str, Tensor]:
        """What the parameters of a block's attention become, and the pairs that it keeps, by name."""
        names, shape = parameter_names(model), model.shape
        heads, groups = shape.heads, shape.kv_heads
        width, before = widths
        # In their old order: of all pairs each then stays where it was.
        kept_KP = tensors["pairs"][:, :pairs].sort(dim=1).values
        dims_KH = torch.cat([kept_KP, kept_KP + width // 2], 1)
        path = f"{block.path}.{block.entry.output.rpartition('.')[0]}.pairs"
        old = dict(model.hf.named_buffers()).get(path)
        found = {path: kept_KP if old is None else old.gather(1, kept_KP)}
        queries, keys, values = projections(block, model, widths)
        new: list[_Projection] = []
        for (weight_OI, bias_O), count in ((queries, heads), (keys, groups)):
            of_head_NH = dims_KH.repeat_interleave(count // groups, 0)
            rows = (torch.arange(count, device=dims_KH.device)[:, None] * width + of_head_NH).flatten()
            new.append((weight_OI[rows], None if bias_O is None else bias_O[rows]))
        if value < before:
            to_KWH = tensors["to"][:, :value]
            weight_OI, bias_O = values
            turned_KWI = to_KWH @ weight_OI.double().view(groups, before, -1)
            turned_KW = None if bias_O is None else to_KWH @ bias_O.double().view(groups, before, 1)
            values = turned_KWI.flatten(0, 1), None if turned_KW is None else turned_KW.flatten()
        new.append(values)
        of_matrices = [new] if block.entry.fused else [[each] for each in new]
        for matrix, some in zip(block.attention, of_matrices, strict=False):  # and the output is behind them
            found[names[matrix.weight]] = turned(matrix, torch.cat([weight_OI for weight_OI, _ in some]))
            if matrix.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] some families have none
                found[names[matrix.bias]] = torch.cat([bias_O for _, bias_O in some if bias_O is not None])
        if value == before:
            return found
        if self.compensate:
            columns = compensated(tensors["values-factor"], tensors["values-product"], heads * value)
            output_DI = columns.view(-1, value, heads).transpose(1, 2).flatten(1)
        else:
            back_NHW = tensors["back"][:, :, :value].repeat_interleave(heads // groups, 0)
            output_DNH = oriented(block.output).double().view(-1, heads, before)
            output_DI = torch.einsum("dnh,nhw->dnw", output_DNH, back_NHW).flatten(1)
        found[names[block.output.weight]] = turned(block.output, output_DI)
        return found


_Projection = tuple[Tensor, "Tensor | None"]
"""The weights, (O, I), and biases, (O,), of what makes queries, keys or values."""


def projections(block: Block, model: Model, widths: tuple[int, int]) -> tuple[_Projection, _Projection, _Projection]:
    """What makes a block's queries, keys and values, whichever matrices hold them, heads in their order.

    The dimensions of each head of queries and of keys are those that a rotation turns first, pair by pair: a pair is
    one of the first half and its fellow of the second. Dimensions that nothing turns are pairs behind the others.

    Parameters
    ----------
    widths : of queries and keys, and of values
    """
    entry, shape = block.entry, model.shape
    heads, groups = shape.heads, shape.kv_heads
    matrices = block.attention[:-1]
    if not entry.fused:
        queries, keys, values = ((oriented(matrix), cast("Tensor | None", matrix.bias)) for matrix in matrices)
    else:
        (matrix,) = matrices
        weight_OI, bias_O = oriented(matrix), cast("Tensor | None", matrix.bias)
        if shape.widths is None:
            rows = entry.rows(shape)
        else:  # of our class: all queries, all keys, all values
            first, second = heads * widths[0], (heads + groups) * widths[0]
            rows = (list(range(first)), list(range(first, second)), list(range(second, len(weight_OI))))
        queries, keys, values = ((weight_OI[some], None if bias_O is None else bias_O[some]) for some in rows)
    if shape.widths is None and (turned_dims := turned_dimensions(model, model.config)) < shape.head_dim:
        half, still = turned_dims // 2, (shape.head_dim - turned_dims) // 2
        firsts = [*range(half), *range(turned_dims, turned_dims + still)]
        seconds = [*range(half, turned_dims), *range(turned_dims + still, shape.head_dim)]
        order = torch.tensor([*firsts, *seconds])
        queries, keys = (
            (weight_OI[rows], None if bias_O is None else bias_O[rows])
            for (weight_OI, bias_O), count in ((queries, heads), (keys, groups))
            for rows in [(torch.arange(count)[:, None] * shape.head_dim + order).flatten()]
        )
    return queries, keys, values


def _diagonal(blocks_NHH: Tensor) -> Tensor:
    """Square matrices along the diagonal of one, (N H, N H)."""
    return cast(Tensor, torch.block_diag(*blocks_NHH))  # pyright: ignore[reportUnknownMemberType]


def _moment(projection: _Projection, moment_XX: Tensor) -> Tensor:
    """Mean of y yᵀ over the outputs of a projection, whose inputs with a one behind them have this moment."""
    weight_OI, bias_O = projection
    column = torch.zeros_like(weight_OI[:, 0]) if bias_O is None else bias_O
    wide_OX = torch.cat([weight_OI, column[:, None]], 1).double()
    return wide_OX @ moment_XX @ wide_OX.T


def _fewer_neurons(model: Model, block: Block, tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """What the parameters of a block's MLP become when some neurons stay, by name."""
    # In their old order: a kept neuron is then found at the same place whatever ranked it.
    kept_W, position_W = tensors["neurons"][:width].sort()
    down_DW = compensated(tensors["neurons-factor"], tensors["neurons-product"], width)
    return neuron_weights(block, parameter_names(model), kept_W, down_DW[:, position_W])
