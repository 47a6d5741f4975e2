"""Calibration text on its way through a model: which rows, how many at once, and block by block.

Shapes: N rows, T tokens of a row, D model width, B rows at once, M tokens at once, I inputs of a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mariotte.errors import DataError
from mariotte.models.blockwise import Blockwise
from mariotte.models.model import Model
from mariotte.models.step import Context

BATCH_TOKENS = 4096
"""Tokens run at once, unless one row holds more: enough to keep the processor busy, little enough for its memory."""


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Generator[None]:
    """Hooks that were just put on modules, for as long as it lasts."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watching(
    inputs: Mapping[str, Sequence[nn.Module]], gather: Callable[[str, Tensor], None]
) -> Generator[None, None, None]:
    """While it lasts, hand every group the inputs of its modules, (M, I), whenever they run."""

    def watch(group: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, arguments: gather(group, cast(Tensor, arguments[0]).flatten(0, -2))

    handles = [module.register_forward_pre_hook(watch(group)) for group, some in inputs.items() for module in some]
    with hooked(handles):
        yield


def tokens_for(context: Context, step: str, *, predicting: bool = False) -> Tensor:
    """The calibration tokens, (N, T).

    Parameters
    ----------
    predicting : whether a loss is measured on them, which takes a token and its next

    Raises
    ------
    DataError
        When there are fewer than two: of one nothing can be told from chance; or, for a loss, rows of one.
    """
    tokens_NT = context.calibration_for(step)
    if tokens_NT.numel() < 2:
        raise DataError(f"{step} needs at least 2 calibration tokens, got {tokens_NT.numel()}: take more text")
    if predicting and tokens_NT.shape[1] < 2:
        raise DataError(f"{step} needs calibration rows of at least 2 tokens, got 1: take longer blocks")
    return tokens_NT


def rows_at_once(tokens_NT: Tensor, batch: int | None = None) -> int:
    """Rows that make a batch: `batch`, or as many as hold about 4096 tokens."""
    return batch or max(1, BATCH_TOKENS // tokens_NT.shape[1])


class Walk:
    """The residual stream of all calibration rows, held in front of one block.

    ::

        walk = Walk(model, context, step)
        for block in model.blocks:
            walk.observe(block.module, {"down": [block.down]}, gather)
            ...  # change the block in place
            walk.advance(block.module)

    Parameters
    ----------
    model : its blocks may be changed, but not exchanged, while the walk lasts
    context : holds the calibration tokens
    step : name of the step that asks, for errors
    batch : rows run at once; None takes about 4096 tokens

    Attributes
    ----------
    stream_NTD : what enters the next block, in the model's dtype on its device, or on the CPU when it is streamed

    Raises
    ------
    DataError
        When the run has no calibration text.

    Notes
    -----
    Cost: every `observe` and `advance` is a forward pass through one block, so that a method which does both takes two
    passes through the model, whatever its depth. Memory: N T D numbers for the stream.

    What a family gives its blocks beside the stream (mask, rotary angles) is caught once, from one row: it depends on
    positions alone, and is broadcast over the rows.
    """

    @torch.no_grad()
    def __init__(self, model: Model, context: Context, step: str, *, batch: int | None = None) -> None:
        tokens_NT = tokens_for(context, step)
        self._rows = rows_at_once(tokens_NT, batch)
        self._apart = Blockwise(model)
        self._beside = self._apart.beside(tokens_NT[:1])
        self._place = {block: index for index, block in enumerate(self._apart.blocks)}
        # What is not computed with just now has no place on the device of a model that does not fit there either.
        where = torch.device("cpu") if model.streamed else model.device
        self._device = model.device
        first_BTD = self._apart.enter(tokens_NT[: self._rows])
        self.stream_NTD = first_BTD.new_empty((*tokens_NT.shape, first_BTD.shape[2]), device=where)
        for rows in self.batches():
            self.stream_NTD[rows] = first_BTD if rows.start == 0 else self._apart.enter(tokens_NT[rows])

    def batches(self) -> Iterator[slice]:
        """Rows of the stream that are run at once."""
        for start in range(0, len(self.stream_NTD), self._rows):
            yield slice(start, start + self._rows)

    def beside(self, block: nn.Module) -> dict[str, Any]:
        """What the family gives a block beside the stream, by name."""
        return self._beside[self._place[block]].names

    def run(self, block: nn.Module, rows: slice) -> Tensor:
        """What the block makes of some rows of the stream, (B, T, D); the stream stays."""
        place = self._place[block]
        return self._apart.run(place, self.stream_NTD[rows].to(self._device), self._beside[place])

    def observe(
        self, block: nn.Module, inputs: Mapping[str, Sequence[nn.Module]], gather: Callable[[str, Tensor], None]
    ) -> None:
        """Run the stream through the block, and hand every group the inputs of its modules, (M, I); the stream stays.

        Parameters
        ----------
        block : the next one
        inputs : modules of the block by the name of the group in which their inputs are pooled
        gather : such as `calibration.Means`
        """
        with watching(inputs, gather):
            for rows in self.batches():
                self.run(block, rows)

    def advance(self, block: nn.Module) -> None:
        """Run the stream through the block as it is now: what comes out enters the next one."""
        for rows in self.batches():
            # In place: nothing but the walk holds the stream, and a second one would double its memory.
            self.stream_NTD[rows] = self.run(block, rows)
