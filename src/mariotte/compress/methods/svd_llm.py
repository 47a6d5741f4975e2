"""SVD-LLM: each matrix becomes the product of two, which keep the most of what it does to the inputs that it sees.

Shapes: O outputs and I inputs of a matrix, R rank, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from mariotte import accounting
from mariotte.architectures import Need, Shape
from mariotte.compress.calibration import Means, outer, second_moments, tokens_for
from mariotte.compress.scope import oriented
from mariotte.compress.sequential import Walk
from mariotte.compress.surgery import derive, gathered
from mariotte.cuts.common import PARTS
from mariotte.cuts.ranks import rank_left, ranks_left, refuse_low_rank
from mariotte.models.dynamic import modules
from mariotte.models.model import Block, Model
from mariotte.models.step import Context, Prepared, Step

__all__ = ["SVDLLM"]


def output_directions(weight_OI: Tensor, moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of a matrix' outputs, those that hold most of them on the inputs seen first.

    Parameters
    ----------
    weight_OI : (O, I) float64
    moment_II : (I, I) float64, mean of x xᵀ over its inputs

    Returns
    -------
    U : (O, min(O, I)) orthonormal columns, the left singular vectors of W S with moment = S Sᵀ
    sigma : (min(O, I),) its singular values

    Notes
    -----
    Every root S of the moment gives the same two. Ours comes of its eigenvectors: it is there, too, where the moment is
    singular and has no Cholesky factor. A direction has no sign of its own; its largest entry is made positive.
    """
    energy_I, directions_II = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(moment_II))
    whitened_OI = (weight_OI @ directions_II) * energy_I.clamp(min=0).sqrt()
    left, sigma, _ = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(whitened_OI, full_matrices=False))
    largest = torch.gather(left, 0, left.abs().argmax(0, keepdim=True))
    return left * (1 - 2 * (largest < 0).double()), sigma


def _groups(block: Block, parts: set[str]) -> dict[str, tuple[str, ...]]:
    """Paths of the matrices in scope, by what they read: those of one group read the same input."""
    attention, ffn = block.entry.attention_paths, block.entry.ffn_paths
    return {
        **({"attention": attention[:-1], "output": attention[-1:]} if "attention" in parts else {}),
        **({"mlp": ffn[:-1], "down": ffn[-1:]} if "ffn" in parts else {}),
    }


def _product(block: Block, path: str) -> Tensor:
    """A matrix of a block, (O, I) float64, whole or not."""
    factors = [oriented(matrix).double() for _, matrix in block.factors(path)]
    return factors[0] if len(factors) == 1 else factors[1] @ factors[0]


@dataclass(frozen=True, kw_only=True)
class SVDLLM(Step):
    """Replace each matrix in scope by two, whose product keeps its outputs on calibration text best.

    Parameters
    ----------
    sequential : the inputs of a block are those that the blocks factored before it give; each amount then takes two
        passes over the text. False measures the model that enters once, for all amounts, as published

    Notes
    -----
    The amount is the share of the weights in scope that goes. A matrix of O x I weights keeps the rank
    R = floor((1 - amount) O I / (O + I)), at least 1, as published; its bias stays. So the two factors are never
    larger than the matrix was; one that no two factors can be smaller than (a single row) stays whole. Where a family
    holds query, key and value in one matrix, or gate and up, that one is a matrix: its parts share a rank.

    When to use it: to compare with it, or where matrices must keep their outer sizes. A square matrix loses half of its
    rank before it loses any weight, so that small amounts are not mild ones: with 10, 25 and 40 % of all parameters
    gone, the largest testbed decoder (dense 1.345) came to 1.349, 1.394 and 1.755, with `ffn` to 1.345, 1.345 and
    1.395; stories260K (1.765) to 3.175, 4.146 and 5.239, with `ffn` to 2.036, 2.749 and 3.639. Sequentially these are
    1.349, 1.407 and 1.820; 3.213, 4.080 and 4.717: better at deep cuts of the smaller model alone.

    With G = S Sᵀ the mean of x xᵀ over the inputs, W S = U Σ Vᵀ: of all matrices of rank R,
    W' = U_R Σ_R V_Rᵀ S⁻¹ has the least mean |W x - W' x|², the sum of the squares of the singular values dropped. It
    equals U_R U_Rᵀ W, so that nothing is inverted: the factors are U_R, with orthonormal columns, and U_Rᵀ W. All in
    float64.

    Departures from the published code: it takes S by Cholesky, in float32, adding to the diagonal what it takes; it
    shares sqrt(Σ) among the factors, whose product is the same (see ``benchmarks/results/svd_llm_parity.md``). Its
    second stage updates the factor U by least squares behind the blocks compressed so far; ``sequential=true`` finds
    both factors anew on that text, which is the optimum of the same objective.

    The result is a model of the class for irregular sizes, which ``transformers`` reads with ``trust_remote_code``.
    Methods that work on matrices one by one, and recoveries, work on the factors; those that cut widths must come
    before.

    Cost: one forward pass with I² more multiplications a token and input; I³ + O I min(O, I) a matrix. Stored: the
    directions of the outputs, O R float32 a matrix for the largest R. Sequential: all of it for each amount, and a
    stream of the calibration tokens.

    References
    ----------
    [wang2025svdllm]_ section 3.1, theorem 3.2; the published code is AIoT-MLSys-Lab/SVD-LLM.
    """

    unit: ClassVar[str] = "weights"
    family: ClassVar[str] = "low-rank"
    reference: ClassVar[str] = "wang2025svdllm"
    streams: ClassVar[bool] = True
    scopes: ClassVar[tuple[str, ...]] = ("all", "attention", "ffn")
    plain: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("causal",)

    sequential: bool = False

    @override
    def refuse(self, model: Model) -> str | None:
        if reason := super().refuse(model) or refuse_low_rank(model):
            return reason
        stated = modules(model.hf.config)
        paths = (path for some in _groups(model.blocks[0], PARTS[self.scope]).values() for path in some)
        here = [f"{block.path}.{path}" for path in paths for block in model.blocks]
        if rounding := [path for path in here if path in stated]:
            return (
                f"makes two matrices of one, and {rounding[0]} rounds what it reads, which neither of them would: "
                "do it before int8-dynamic"
            )
        return None

    @override
    def moment(self, shape: Shape) -> int:
        of_heads = shape.heads * shape.head_dim
        return max(
            {"attention": (shape.hidden, of_heads), "ffn": (shape.hidden, shape.ffn)}.get(
                self.scope, (shape.hidden, of_heads, shape.ffn)
            )
        )

    def _after(self, shape: Shape, amount: int | float) -> Shape:
        return replace(shape, ranks=ranks_left(shape, amount, self.scope))

    @override
    def removes(self, model: Model, amount: int | float) -> int:
        return model.counts.n_params - accounting.count_shape(self._after(model.shape, amount)).n_params

    @override
    @torch.no_grad()
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        tokens_for(context, self.name())  # sequentially only `apply` reads them, and that is late to say so
        prepared = Prepared(context.scratch)
        if self.sequential:
            return prepared.finish()
        inputs = {
            f"block-{index} {part}": [block.factors(paths[0])[0][1]]
            for index, block in enumerate(model.blocks)
            for part, paths in _groups(block, PARTS[self.scope]).items()
        }
        moments = second_moments(model, context, self.name(), inputs)
        for index, block in enumerate(model.blocks):
            directions: dict[str, Tensor] = {}
            for part, paths in _groups(block, PARTS[self.scope]).items():
                moment_II = moments.pop(f"block-{index} {part}")
                for path in paths:
                    weight_OI = _product(block, path)
                    outputs, inputs_here = weight_OI.shape
                    most = rank_left(outputs, inputs_here, 0, 1e-9)
                    directions[path] = output_directions(weight_OI, moment_II)[0][:, :most].float()
            prepared.put(f"block-{index}", directions)
            context.progress("factors", (index + 1) / len(model.blocks))
        return prepared.finish()

    @override
    @torch.no_grad()
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        shape, paths = model.shape, (*model.entry.attention_paths, *model.entry.ffn_paths)
        ranks = [dict(zip(paths, some, strict=True)) for some in ranks_left(shape, amount, self.scope)]
        sizes = [size for layer in range(shape.layers) for some in accounting.matrices(shape, layer) for size in some]
        weights = sum(matrix.weight.numel() for matrix in model.matrices(self.scope))
        gone = self.removes(model, amount)
        done = self.done(
            amount,
            gone / weights,
            ranks=[[least, most] for least, most in _extremes(ranks)],
            # A matrix keeps a whole rank, and one at least.
            rounding=sum(outputs + inputs for outputs, inputs in sizes),
        )
        if not gone:
            return model.copy().after(done)
        found = self._factors(model, prepared, ranks, context)
        sizes_of_class = {"ranks": [{path: rank for path, rank in some.items() if rank} for some in ranks]}
        return derive(model, found, sizes_of_class, irregular=True).after(done)

    def _factors(
        self, model: Model, prepared: Prepared, ranks: Sequence[Mapping[str, int]], context: Context
    ) -> MutableMapping[str, Tensor]:
        """The factors of every matrix in scope, by the name of their parameters, and the biases that move with them."""
        found = gathered(model)
        cut, walk = model, None
        if self.sequential:
            cut = model.copy()
            walk = Walk(cut, context, self.name())
        for index, (block, before) in enumerate(zip(cut.blocks, model.blocks, strict=True)):
            directions = self._directions(model, walk, block, index) if walk else prepared.get(f"block-{index}")
            for path, rank in ranks[index].items():
                if path not in directions or not rank:
                    continue
                weight_OI = _product(before, path)
                outer_OR = directions[path][:, :rank].to(weight_OI)
                inner_RI = outer_OR.T @ weight_OI
                found[f"{block.path}.{path}.inner.weight"] = inner_RI
                found[f"{block.path}.{path}.outer.weight"] = outer_OR
                (_, *_, (_, last)) = ("", *before.factors(path))
                if last.bias is not None:  # pyright: ignore[reportUnnecessaryComparison] most families have none
                    found[f"{block.path}.{path}.outer.bias"] = last.bias
                if walk:
                    _put_(block, path, outer_OR, inner_RI)
            if walk:
                walk.advance(block.module)
                context.progress("factors", (index + 1) / len(cut.blocks))
        return found

    def _directions(self, model: Model, walk: Walk, block: Block, index: int) -> dict[str, Tensor]:
        """The directions of a block's outputs on the stream that the blocks before it, as they are now, give."""
        gather, groups = Means(outer), _groups(block, PARTS[self.scope])
        inputs = {f"block-{index} {part}": [block.factors(paths[0])[0][1]] for part, paths in groups.items()}
        walk.observe(block.module, inputs, gather)
        moments = gather.result(self.name(), model)
        return {
            path: output_directions(_product(block, path), moments[f"block-{index} {part}"])[0]
            for part, paths in groups.items()
            for path in paths
        }


def _put_(block: Block, path: str, outer_OR: Tensor, inner_RI: Tensor) -> None:
    """Give a matrix of a block in place the value of a product; its shape, or the rank of its factors, stays."""
    first, *second = [oriented(matrix) for _, matrix in block.factors(path)]
    if not second:
        first.copy_(outer_OR @ inner_RI)
        return
    rank = len(inner_RI)
    for weight in (first, *second):
        weight.zero_()
    first[:rank] = inner_RI.to(first.dtype)
    second[0][:, :rank] = outer_OR.to(first.dtype)


def _extremes(ranks: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The least and the largest rank of the factored matrices of each layer; nothing where all are whole."""
    return [(min(found), max(found)) for some in ranks if (found := [rank for rank in some.values() if rank])]
