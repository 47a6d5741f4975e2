"""A causal model run block by block: all rows through one block before the next is read.

What stands before the blocks and behind them is run by the family's own code, with blocks in between that only hand on
what they are given: positions, masks, scalings and soft caps are then right for every family, and to the bit.

Shapes: B rows at once, T tokens of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mariotte.models.model import Model
from mariotte.models.paging import pager_of
from mariotte.models.streaming import BLOCKS_HELD


class Beside(NamedTuple):
    """What a family gives a block beside the stream: masks and rotary angles, by place and by name."""

    places: tuple[Any, ...]
    names: dict[str, Any]


class _Arrived(Exception):  # noqa: N818  (not an error: it ends a pass that has nothing left to find out)
    """The first block has been reached."""


class Blockwise:
    """The blocks of a model apart from what stands before and behind them.

    Parameters
    ----------
    model : may be changed meanwhile, as long as no block is exchanged
    """

    def __init__(self, model: Model) -> None:
        self.model, self.blocks = model, [block.module for block in model.blocks]
        self._in_tuples: bool | None = None

    @torch.no_grad()
    def enter(self, tokens_BT: Tensor) -> Tensor:
        """What enters the first block, (B, T, D) on the model's device."""
        return self._arrive(tokens_BT)[0]

    @torch.no_grad()
    def beside(self, tokens_BT: Tensor) -> list[Beside]:
        """What every block is given beside the stream of rows of this shape; no block but the first is read."""
        if self._in_tuples is None:
            stream_BTD, beside = self._arrive(tokens_BT[:1, :1])
            with _without_hooks(self.blocks[0].modules()):  # nobody who watches the block is told of this token
                found = self.blocks[0](stream_BTD, *beside.places, **beside.names)
            self._in_tuples = isinstance(found, tuple)
        given: list[Beside] = []

        def hand_on(index: int, stream_BTD: Tensor, beside: Beside) -> Tensor:
            assert index == len(given), "blocks must run in order, each once"
            given.append(beside)
            return stream_BTD

        with self._replaced(hand_on):
            self._body(tokens_BT)
        return given

    @torch.no_grad()
    def run(self, index: int, stream_BTD: Tensor, beside: Beside) -> Tensor:
        """What a block makes of the stream, (B, T, D)."""
        found = self.blocks[index](stream_BTD, *beside.places, **beside.names)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

    @torch.no_grad()
    def leave(self, tokens_BT: Tensor, stream_BTD: Tensor, kept: int = 0) -> Tensor:
        """Logits of the stream behind the last block, (B, T, V), or of its `kept` last places.

        Parameters
        ----------
        tokens_BT : whose stream it is, after `beside` was asked for
        """
        with self._replaced(lambda index, given_BTD, beside: given_BTD if index else stream_BTD):
            return _logits(self.model, tokens_BT, kept)

    @torch.no_grad()
    def final(self, tokens_BT: Tensor, stream_BTD: Tensor) -> Tensor:
        """The stream behind the last block as the head gets it, behind the final norm; see `leave`."""
        with self._replaced(lambda index, given_BTD, beside: given_BTD if index else stream_BTD):
            return self._body(tokens_BT)

    def _body(self, tokens_BT: Tensor) -> Tensor:
        return cast(Tensor, self.model.hf.base_model(input_ids=tokens_BT.to(self.model.device), use_cache=False)[0])

    def _arrive(self, tokens_BT: Tensor) -> tuple[Tensor, Beside]:
        entered: list[tuple[Tensor, Beside]] = []

        def catch(_module: nn.Module, places: tuple[Any, ...], names: dict[str, Any]) -> None:
            entered.append((cast(Tensor, places[0]), Beside(places[1:], names)))
            raise _Arrived

        handle = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with contextlib.suppress(_Arrived):
                self._body(tokens_BT)
        finally:
            handle.remove()
        return entered[0]

    @contextlib.contextmanager
    def _replaced(self, does: Callable[[int, Tensor, Beside], Tensor]) -> Generator[None]:
        """While it lasts, blocks do this with their number, the stream and what stands beside it."""

        def instead(index: int) -> Callable[..., Any]:
            def forward(stream_BTD: Tensor, *places: Any, **names: Any) -> Any:
                found_BTD = does(index, stream_BTD, Beside(places, names))
                return (found_BTD,) if self._in_tuples else found_BTD

            return forward

        before = [vars(block).get("forward") for block in self.blocks]  # somebody else may have done the same
        try:
            for index, block in enumerate(self.blocks):
                vars(block)["forward"] = instead(index)
            with _without_hooks(self.blocks):
                yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del vars(block)["forward"]
                if own is not None:
                    vars(block)["forward"] = own


@contextlib.contextmanager
def _without_hooks(modules: Iterable[nn.Module]) -> Generator[None]:
    """While it lasts, these modules run without what watches or changes their inputs and outputs."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    held = [(vars(module), {name: vars(module)[name] for name in names}) for module in modules]
    try:
        for places, _ in held:
            places.update({name: OrderedDict[int, Any]() for name in names})
        yield
    finally:
        for places, hooks in held:
            places.update(hooks)


def _logits(model: Model, tokens_BT: Tensor, kept: int) -> Tensor:
    asked = {"logits_to_keep": kept} if kept else {}
    return cast(Tensor, model.hf(input_ids=tokens_BT.to(model.device), use_cache=False, **asked).logits)


@torch.no_grad()
def logits(model: Model, batches: Sequence[Tensor], kept: Sequence[int] | None = None) -> Iterator[Tensor]:
    """Logits of a causal model for one batch after another, without a cache.

    Parameters
    ----------
    batches : (B, T) token ids each, of any sizes
    kept : last places of which logits are wanted, of each batch; 0 takes every place, None every place of all batches

    Yields
    ------
    (B, T, V), or of the places that are kept, in the model's dtype on its device

    Notes
    -----
    A model in memory is called once a batch. Of a streamed one each block is read once for as many batches as have a
    stream no larger than a block, or for one batch that is larger: what is held is the blocks that the pager holds and
    that stream, on the CPU. Either way each batch goes through the same operations in the same shapes.
    """
    kept = [0] * len(batches) if kept is None else kept
    if not model.streamed:
        for tokens_BT, places in zip(batches, kept, strict=True):
            yield _logits(model, tokens_BT, places)
        return
    apart = Blockwise(model)
    numbers = iter(range(len(batches)))
    for stream_BTD in _behind(apart, batches):
        number = next(numbers)
        yield apart.leave(batches[number], stream_BTD, kept[number])


@torch.no_grad()
def finals(model: Model, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The stream of a causal model as its head gets it, (B, T, D), for one batch after another; as `logits`."""
    if not model.streamed:
        for tokens_BT in batches:
            yield cast(Tensor, model.hf.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)[0])
        return
    apart = Blockwise(model)
    numbers = iter(range(len(batches)))
    for stream_BTD in _behind(apart, batches):
        yield apart.final(batches[next(numbers)], stream_BTD)


def _behind(apart: Blockwise, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The stream of a streamed model behind its last block, (B, T, D) on its device, for one batch after another."""
    model = apart.model
    pager = pager_of(model.embeddings.weight)
    assert pager is not None
    room = pager.limit // BLOCKS_HELD // (model.shape.hidden * model.hf.dtype.itemsize)
    start = 0
    while start < len(batches):
        end, tokens = start + 1, batches[start].numel()
        while end < len(batches) and tokens + batches[end].numel() <= room:
            tokens += batches[end].numel()
            end += 1
        yield from _together(apart, batches[start:end])
        start = end


def _together(apart: Blockwise, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same for batches whose stream is held at once."""
    # What is not computed with just now has no place on the device of a model that does not fit there either.
    device = apart.model.device
    beside = {tokens_BT.shape: apart.beside(tokens_BT) for tokens_BT in batches}
    streams = [apart.enter(tokens_BT).cpu() for tokens_BT in batches]
    for index in range(len(apart.blocks)):
        for number, tokens_BT in enumerate(batches):
            given = beside[tokens_BT.shape][index]
            streams[number] = apart.run(index, streams[number].to(device), given).cpu()
    while streams:
        yield streams.pop(0).to(device)
