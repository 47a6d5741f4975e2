"""Matrices as what rounds them sees them: their sizes, and the groups that divide what they read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mariotte import accounting
from mariotte.architectures import Architecture, Shape
from mariotte.cuts.common import PARTS, Sizes


def untied(model: Sizes) -> Shape:
    """The sizes of a model whose head has a matrix of its own, and with it what is shared only while it is tied."""
    shape, stacks = model.shape, model.entry.stacks
    if not shape.tied:
        return shape

    def alone(stack: Shape, entry: Architecture) -> Shape:
        return replace(stack, tied=False, copies=len(entry.copies), head_biases=len(entry.head_biases))

    if shape.encoder is not None:
        shape = replace(shape, encoder=alone(shape.encoder, stacks[0]))
    return alone(shape, stacks[-1])


def matrices_of(model: Sizes, scope: str) -> Iterator[tuple[int, int]]:
    """Outputs and inputs of every matrix of a scope, as the family holds them; of a product of two, of these.

    The matrices of a mixture's experts stand one below the other.
    """
    entry, shape = model.entry, model.shape
    stacks = (shape,) if shape.encoder is None else (shape.encoder, shape)
    for of_stack, stack in zip(entry.stacks, stacks, strict=True):
        for layer in range(stack.blocks):
            attention, mlp = accounting.matrices(stack, layer)
            ranks = iter(() if stack.ranks is None else stack.ranks[layer])
            if of_stack.experts:
                mlp = ((sum(outputs for outputs, _ in mlp[:-1]), stack.hidden), mlp[-1])
            if of_stack.cross:
                attention = (*attention, *accounting.matrices(stack, layer)[0])
            times = stack.experts or 1
            # Ranks are counted in the order of all the block's matrices, whatever the scope.
            for part, some, count in (("attention", attention, 1), ("ffn", mlp, times)):
                for outputs, inputs in some:
                    rank = next(ranks, 0)
                    if part not in PARTS[scope]:
                        continue
                    if rank:
                        yield rank, inputs
                        yield outputs, rank
                    else:
                        yield count * outputs, inputs
    if "head" in PARTS[scope]:
        yield shape.vocab, _read_by_head(shape)


def _read_by_head(shape: Shape) -> int:
    return shape.embedding_size if shape.transform or shape.map_out else shape.final_size


def input_widths(shape: Shape, scope: str) -> dict[str, int]:
    """What the matrices of a scope read, in numbers a row, by what it is called; from sizes alone."""
    stacks = (shape,) if shape.encoder is None else (shape.encoder, shape)
    widths: dict[str, int] = {}

    def several(name: str, each: str, found: set[int]) -> None:
        widths[name] = min(found)
        for width in sorted(found - {min(found)}):
            widths[f"{each} of {width}"] = width

    for stack in stacks:
        layers = range(stack.layers)
        factored = [stack.ranks[layer] if stack.ranks else () for layer in layers]
        if "attention" in PARTS[scope]:
            widths["the hidden size"] = stack.hidden
            outputs = {stack.heads_of(layer)[0] * stack.widths_of(layer)[1] for layer in layers}
            several("the attention output", "an attention output", outputs)
        if "ffn" in PARTS[scope]:
            widths["the hidden size"] = stack.hidden
            several("the MLP", "an MLP", {stack.ffn_of(layer) for layer in layers})
        mlp = len(accounting.matrices(stack, 0)[0])
        within = slice(0 if "attention" in PARTS[scope] else mlp, None if "ffn" in PARTS[scope] else mlp)
        if "head" not in PARTS[scope] and (ranks := {rank for some in factored for rank in some[within] if rank}):
            several("a factor", "a factor", ranks)
    if "head" in PARTS[scope]:
        widths["the head"] = _read_by_head(shape)
    return widths


def misfit(
    group: int | None,
    widths: Mapping[str, int],
    *,
    sizes: Sequence[int] | None = None,
    otherwise: str = "leave group out",
) -> str | None:
    """Why groups of this size do not divide all widths, and which would, in a clause; None where they do.

    Parameters
    ----------
    group : None for whole rows, which always fit
    widths : inputs of matrices, by what a reader knows them as
    sizes : those that groups may have; None for any
    otherwise : what to do where no group fits
    """
    wrong = next((name for name, width in widths.items() if group is not None and width % group), None)
    if wrong is None:
        return None
    common = math.gcd(*widths.values())
    possible = range(2, common + 1) if sizes is None else sizes
    fitting = sorted((size for size in possible if common % size == 0), reverse=True)
    groups = f" ({', '.join(map(str, fitting[:_NAMED]))})" if fitting else ""
    return f"needs input widths that group={group} divides, and {wrong} has {widths[wrong]}: " + (
        f"take a group that divides them all{groups}, or {otherwise}" if fitting else otherwise
    )


_NAMED = 6
"""Group sizes that an error names at most, the largest ones."""
