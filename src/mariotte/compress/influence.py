"""How much each block changes the stream that passes through it.

Shapes: M tokens at once, D model width, L blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mariotte.compress.calibration import check_finite, observe
from mariotte.compress.walk import Walk
from mariotte.models.model import Model
from mariotte.models.step import Context


def cosines(before_MD: Tensor, after_MD: Tensor) -> Tensor:
    """Cosine of each token's vector before and after a block, (M,) float64.

    A token that is zero before and after was left as it is: its cosine is 1. One that is zero on one side only shares
    no direction with the other side: 0.
    """
    before_MD, after_MD = before_MD.double(), after_MD.double()
    product_M = before_MD.square().sum(1).sqrt() * after_MD.square().sum(1).sqrt()
    cosine_M = (before_MD * after_MD).sum(1) / product_M.masked_fill(product_M == 0, 1.0)
    untouched_M = ~(before_MD.any(1) | after_MD.any(1))
    return cosine_M.masked_fill(untouched_M, 1.0)


def block_influence(model: Model, context: Context, step: str, *, batch: int | None = None) -> Tensor:
    """Block Influence of every block on calibration text: one minus the mean cosine of its input and its output.

    Parameters
    ----------
    model : run on the context's calibration tokens, without its head
    context : holds the tokens
    step : name of the step that asks, for errors
    batch : rows run at once; None takes about 4096 tokens

    Returns
    -------
    (L,) float64 on the CPU, in [0, 2]; 0 for a block that turns no token's vector

    Raises
    ------
    DataError
        When the run has no calibration text.
    ModelError
        When activations are not finite.

    Notes
    -----
    A block's output is what enters the next one; that of the last is taken before the final norm. Cost: one forward
    pass; the stream before one block is held while the next runs.

    References
    ----------
    [men2024shortgpt]_ equation 1.
    """
    if model.streamed:
        return _block_by_block(model, context, step, batch)
    blocks = model.blocks
    stops: dict[str, list[nn.Module]] = {str(index): [block.module] for index, block in enumerate(blocks)}
    stops[str(len(blocks))] = [model.final_norm]
    sums_L = torch.zeros(len(blocks), dtype=torch.float64)
    entered: dict[int, Tensor] = {}
    tokens = 0

    def gather(group: str, x_MD: Tensor) -> None:
        nonlocal tokens
        here = int(group)
        if here:
            sums_L[here - 1] += cosines(entered.pop(here - 1), x_MD).sum().cpu()
        else:
            tokens += len(x_MD)
        if here < len(blocks):
            # A copy: some blocks add to the stream in place.
            entered[here] = x_MD.detach().clone()

    observe(model, context, step, stops, gather, batch=batch)
    check_finite(sums_L, step, "the stream", model)
    return 1 - sums_L / tokens


@torch.no_grad()
def _block_by_block(model: Model, context: Context, step: str, batch: int | None) -> Tensor:
    """The same, all rows through one block before the next is read."""
    walk, blocks = Walk(model, context, step, batch=batch), model.blocks
    sums_L = torch.zeros(len(blocks), dtype=torch.float64)
    for index, block in enumerate(blocks):
        for rows in walk.batches():
            after_BTD = walk.run(block.module, rows)
            before_BTD = walk.stream_NTD[rows].to(after_BTD.device)
            sums_L[index] += cosines(before_BTD.flatten(0, 1), after_BTD.flatten(0, 1)).sum().cpu()
            walk.stream_NTD[rows] = after_BTD
        context.progress("calibration", (index + 1) / len(blocks))
    check_finite(sums_L, step, "the stream", model)
    return 1 - sums_L / walk.stream_NTD.shape[:2].numel()
