"""Calibration text on its way through a model, one block at a time: for methods whose later blocks see earlier cuts.

Shapes: N rows, T tokens of a row, D model width, B rows at once, M tokens at once, I inputs of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mariotte.compress.calibration import Means, rows_at_once, tokens_for, watching
from mariotte.models.model import Block, Model
from mariotte.models.step import Context


class _Arrived(Exception):  # noqa: N818  (not an error: it ends a pass that has nothing left to find out)
    """The first block has been reached."""


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
    stream_NTD : what enters the next block, on the model's device in its dtype

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
        blocks = [block.module for block in model.blocks]
        self._beside: dict[nn.Module, dict[str, Any]] = {}

        def remember(module: nn.Module, _arguments: tuple[Any, ...], beside: dict[str, Any]) -> None:
            self._beside[module] = beside

        body = model.hf.base_model
        handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in blocks]
        try:
            body(input_ids=tokens_NT[:1].to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

        entered: list[Tensor] = []

        def catch(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            entered.append(cast(Tensor, arguments[0]))
            raise _Arrived

        handle = blocks[0].register_forward_pre_hook(catch)
        try:
            for start in range(0, len(tokens_NT), self._rows):
                try:
                    body(input_ids=tokens_NT[start : start + self._rows].to(model.device), use_cache=False)
                except _Arrived:
                    continue
        finally:
            handle.remove()
        self.stream_NTD = torch.cat(entered)

    def batches(self) -> Iterator[slice]:
        """Rows of the stream that are run at once."""
        for start in range(0, len(self.stream_NTD), self._rows):
            yield slice(start, start + self._rows)

    def beside(self, block: nn.Module) -> dict[str, Any]:
        """What the family gives a block beside the stream."""
        return self._beside[block]

    @torch.no_grad()
    def run(self, block: nn.Module, rows: slice) -> Tensor:
        """What the block makes of some rows of the stream, (B, T, D); the stream stays."""
        found = block(self.stream_NTD[rows], **self._beside[block])
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

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


@torch.no_grad()
def rewrite_sequentially(
    model: Model,
    context: Context,
    step: str,
    readers: Callable[[Block], Mapping[str, Sequence[nn.Linear]]],
    statistic: Callable[[Tensor], Tensor],
    rewrite: Callable[[int, Block, Mapping[str, Tensor]], None],
) -> Model:
    """A copy whose blocks are rewritten one after another, each by what it reads behind those already rewritten.

    The matrices of one block are rewritten together, by what they saw before any of them was: the order of the
    published code of Wanda, SparseGPT and GPTQ.

    Parameters
    ----------
    step : name of the step that asks, for errors
    readers : a block's matrices, those that read the same input together
    statistic : as for `calibration.Means`
    rewrite : changes the copy's block of this index in place, given the mean of the statistic of each input

    Raises
    ------
    DataError
        When the run has no calibration text.
    ModelError
        When activations are not finite.
    """
    rewritten = model.copy()
    walk = Walk(rewritten, context, step)
    for index, block in enumerate(rewritten.blocks):
        means = Means(statistic)
        groups = {f"block-{index} {part}": part for part in readers(block)}
        walk.observe(block.module, {group: [readers(block)[part][0]] for group, part in groups.items()}, means)
        rewrite(index, block, {groups[group]: mean for group, mean in means.result(step, model).items()})
        if index + 1 < len(rewritten.blocks):
            walk.advance(block.module)
        context.progress(step, (index + 1) / len(rewritten.blocks))
    return rewritten
