"""All the ways of taking parameters from one model: which sizes steps can reach, and what a chain to them is.

Sizes are what is kept: layers L, heads N, feed-forward neurons F, hidden width D.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from typing_extensions import override

from mariotte import accounting
from mariotte import chain as chains
from mariotte.architectures import Shape
from mariotte.chain import Chain
from mariotte.compress.methods.heads import Heads
from mariotte.compress.surgery import rounding
from mariotte.models.model import Model
from mariotte.models.step import Step

DIMENSIONS: Mapping[str, str] = {"shortgpt": "layers", "heads": "heads", "ffn": "ffn", "slice": "hidden"}
"""The methods that a search combines, in the order of the chain, and the size of a model that each reduces."""

COARSEST = 0.01
"""Share of the model that one step of the feed-forward width may remove without being asked to be finer."""

THINNED = 32
"""Sizes of one dimension that are combined with those of the others; the finest dimension has all its sizes."""

State = tuple[int, ...]
"""What is kept of each dimension."""


class _Sketch(Model):
    """A model that says it has another shape: enough to ask a step what it would remove."""

    def __init__(self, model: Model, shape: Shape) -> None:
        super().__init__(
            model.hf,
            model.tokenizer,
            name=model.name,
            fingerprint=model.fingerprint,
            stored_dtype=model.stored_dtype,
            done=model.done,
            derived=True,
        )
        self._shape = shape

    @property
    @override
    def shape(self) -> Shape:
        return self._shape


def cut_shape(shape: Shape, name: str, kept: int) -> Shape:
    """The shape after blocks, feed-forward or hidden width were cut to `kept`; slicing unties."""
    if name == "slice":
        return replace(shape, hidden=kept, tied=shape.tied and kept == shape.hidden)
    return replace(shape, **{DIMENSIONS[name]: kept})


def _params(shape: Shape) -> int:
    return accounting.count_shape(shape).n_params


@dataclass(frozen=True)
class Space:
    """All the ways of taking parameters from one model.

    Parameters
    ----------
    model : what is cut
    steps : one for each dimension, in the order of the chain
    """

    model: Model
    steps: tuple[Step, ...]

    @functools.cached_property
    def whole(self) -> State:
        """The state that keeps everything."""
        return tuple(self._size(step.name(), self.model.shape) for step in self.steps)

    @staticmethod
    def _size(name: str, shape: Shape) -> int:
        return cast(int, getattr(shape, DIMENSIONS[name]))

    def shapes(self, state: State) -> Iterator[Shape]:
        """The shape that enters each step, and at the end the one that leaves the last."""
        shape = self.model.shape
        yield shape
        for index, kept in enumerate(state):
            if kept < self._size(self.steps[index].name(), shape):
                shape = self._cut(index, shape, kept)
            yield shape

    def _cut(self, index: int, shape: Shape, kept: int) -> Shape:
        step = self.steps[index]
        if isinstance(step, Heads):  # how many key-value heads stay with them is its own rule
            heads, groups = step.kept(_Sketch(self.model, shape), 1 - kept / shape.heads)
            return replace(shape, heads=heads, kv_heads=groups)
        return cut_shape(shape, step.name(), kept)

    def removed(self, state: State) -> int:
        """Parameters that a state has fewer than the model."""
        *_, last = self.shapes(state)
        return _params(self.model.shape) - _params(last)

    def removed_share(self, state: State) -> float:
        """The same as a share of the model."""
        return self.removed(state) / _params(self.model.shape)

    @functools.cache  # noqa: B019  (a space lives as long as one search)
    def _sizes(self, index: int, shape: Shape) -> tuple[int, ...]:
        step, sketch = self.steps[index], _Sketch(self.model, shape)
        size, total = self._size(step.name(), shape), _params(shape)
        if isinstance(step, Heads):
            return tuple(sorted({step.kept(sketch, n / size)[0] for n in range(size)}, reverse=True))
        left = {_params(cut_shape(shape, step.name(), kept)): kept for kept in range(1, size)}
        removed = {step.removes(sketch, n / size) for n in range(1, size)}
        return (size, *sorted({left[total - r] for r in removed if total - r in left}, reverse=True))

    def sizes(self, index: int, state: State) -> tuple[int, ...]:
        """Sizes that one step can reach from the state that the steps before it lead to, the whole one first."""
        # Of the cuts before it, a step's rounding depends on widths only: a few shapes instead of thousands.
        head = tuple(
            self.whole[i] if self.steps[i].name() in ("shortgpt", "ffn") else kept for i, kept in enumerate(state)
        )
        *shapes, _ = self.shapes((*head[:index], *self.whole[index:]))
        return self._sizes(index, shapes[index])

    @functools.cached_property
    def finest(self) -> int:
        """The dimension whose smallest step removes least, and most evenly: it makes up what the others leave."""
        names = [step.name() for step in self.steps]
        if "ffn" in names:
            return names.index("ffn")
        return max(range(len(names)), key=lambda i: len(self.sizes(i, self.whole)))

    def states(self, wanted: float) -> list[State]:
        """States that remove at least `wanted` parameters, and that would not if one of their sizes were larger.

        Those that only one step leads to come first.
        """
        finest = self.finest
        others = [i for i in range(len(self.steps)) if i != finest]
        found: list[State] = []

        def grow(state: State, rest: Sequence[int]) -> None:
            if rest:
                for kept in _thinned(self.sizes(rest[0], state)):
                    grow((*state[: rest[0]], kept, *state[rest[0] + 1 :]), rest[1:])
                return
            sizes = self.sizes(finest, state)
            low, high = 0, len(sizes)
            while low < high:  # the first, that is the largest, with which enough is removed
                middle = (low + high) // 2
                enough = self.removed((*state[:finest], sizes[middle], *state[finest + 1 :])) >= wanted
                low, high = (low, middle) if enough else (middle + 1, high)
            if low < len(sizes):
                found.append((*state[:finest], sizes[low], *state[finest + 1 :]))

        grow(self.whole, others)
        alone = (self.alone(i, wanted) for i in range(len(self.steps)))
        return list(
            dict.fromkeys([*(s for s in alone if s), *(state for state in found if not self._wasteful(state, wanted))])
        )

    def alone(self, index: int, wanted: float) -> State | None:
        """The state that removes at least `wanted` parameters by one step alone, and as few as it can; None if none."""
        states = ((*self.whole[:index], k, *self.whole[index + 1 :]) for k in self.sizes(index, self.whole))
        return next((state for state in states if self.removed(state) >= wanted), None)

    def _wasteful(self, state: State, wanted: float) -> bool:
        """Whether a larger size in some dimension would still remove enough."""
        for i in range(len(state)):
            sizes = _thinned(self.sizes(i, state)) if i != self.finest else self.sizes(i, state)
            place = sizes.index(state[i]) if state[i] in sizes else 0
            if place and self.removed((*state[:i], sizes[place - 1], *state[i + 1 :])) >= wanted:
                return True
        return False

    def chain(self, state: State, steps: Sequence[Step] | None = None) -> Chain:
        """The chain that leads to a state, each amount the shortest number that gives exactly its size.

        Parameters
        ----------
        steps : to take instead of the space's own, of the same names in the same order
        """
        links: list[chains.Link] = []
        for i, (step, (before, after)) in enumerate(
            zip(steps or self.steps, itertools.pairwise(self.shapes(state)), strict=True)
        ):
            if before == after:
                continue
            sketch, removed = _Sketch(self.model, before), _params(before) - _params(after)
            share = 1 - state[i] / self._size(step.name(), before)
            amount = next((a for d in range(1, 17) if step.removes(sketch, a := round(share, d)) == removed), share)
            assert step.removes(sketch, amount) == removed, f"{step.link(amount)} does not lead to {state}"
            links.append(step.link(amount))
        return Chain(tuple(links))


def finer_rounding(model: Model) -> int | None:
    """The multiple for widths of which one step is at most `COARSEST` of the model; None if the usual one is."""
    shape = model.shape
    usual = rounding(shape.ffn, at=shape.hidden)
    neuron = (_params(shape) - _params(cut_shape(shape, "ffn", 1))) / max(shape.ffn - 1, 1) / _params(shape)
    fine = next((d for d in range(usual, 0, -1) if usual % d == 0 and d * neuron <= COARSEST), 1)
    return None if fine == usual else fine


def _thinned(sizes: Sequence[int]) -> Sequence[int]:
    """At most `THINNED` sizes, evenly spread, the whole one among them."""
    every = -(-len(sizes) // THINNED)
    return sizes[::every]
