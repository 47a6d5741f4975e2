"""What a model's parts see on calibration text, gathered in one pass.

Shapes: N rows, T tokens of a row, B rows at once, M tokens at once, I inputs of a module.

Sums are kept in float64 and divided by the number of tokens at the end: the order of the rows and how they are batched
change the result only within the rounding of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mariotte.errors import ModelError
from mariotte.models.model import Model
from mariotte.models.step import Context

BATCH_TOKENS = 4096
"""Tokens run at once, unless one row holds more: enough to keep the processor busy, little enough for its memory."""


def rms_normalised(x_MI: Tensor, eps: float) -> Tensor:
    """Each row divided by its root mean square: what an RMSNorm sees before its weights."""
    return x_MI * torch.rsqrt(x_MI.square().mean(-1, keepdim=True) + eps)


def second_moments(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch: int | None = None,
) -> dict[str, Tensor]:
    """Mean of x xᵀ over the inputs of modules, for every group of them from the same pass.

    Parameters
    ----------
    model : run on the context's calibration tokens, without its head
    context : holds the tokens
    step : name of the step that asks, for errors
    inputs : modules by the name of the group in which their inputs are pooled; a group has one input width I
    transform : applied to the inputs, (M, I) float64, first
    batch : rows run at once; None takes about 4096 tokens

    Returns
    -------
    (I, I) float64 on the model's device for every group

    Raises
    ------
    DataError
        When the run has no calibration text.
    ModelError
        When activations are not finite.

    Notes
    -----
    Cost: one forward pass, plus I² multiplications a token and module; I² float64 of memory a group.
    """
    sums: dict[str, Tensor] = {}
    tokens_seen: dict[str, int] = {}

    def gather(group: str, x_MI: Tensor) -> None:
        x_MI = x_MI.double()
        x_MI = x_MI if transform is None else transform(x_MI)
        if group not in sums:
            sums[group] = x_MI.new_zeros(x_MI.shape[1], x_MI.shape[1])
        sums[group].addmm_(x_MI.T, x_MI)
        tokens_seen[group] = tokens_seen.get(group, 0) + len(x_MI)

    _observe(model, context, step, inputs, gather, batch)
    moments = {group: total_II / tokens_seen[group] for group, total_II in sums.items()}
    for group, moment_II in moments.items():
        if not bool(moment_II.isfinite().all()):
            raise ModelError(
                f"{step} found activations that are not finite in {group} of {model.name}: "
                "check the checkpoint, or compute in a wider dtype"
            )
    return moments


@torch.no_grad()
def _observe(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    gather: Callable[[str, Tensor], None],
    batch: int | None,
) -> None:
    """Run the calibration tokens and hand every group the inputs of its modules, (M, I)."""
    tokens_NT = context.calibration_for(step)
    rows = batch or max(1, BATCH_TOKENS // tokens_NT.shape[1])

    def watch(group: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, arguments: gather(group, cast(Tensor, arguments[0]).flatten(0, -2))

    handles = [module.register_forward_pre_hook(watch(group)) for group, some in inputs.items() for module in some]
    # The model without its head: no hook sits behind it, and logits are the largest tensor of the pass.
    body = model.hf.base_model
    try:
        for start in range(0, len(tokens_NT), rows):
            body(input_ids=tokens_NT[start : start + rows].to(model.device), use_cache=False)
            context.progress("calibration", min(1.0, (start + rows) / len(tokens_NT)))
    finally:
        for handle in handles:
            handle.remove()
