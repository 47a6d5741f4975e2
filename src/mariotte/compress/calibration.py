"""What a model's parts see on calibration text, gathered in one pass.

Shapes: N rows, T tokens of a row, B rows at once, M tokens at once, I inputs of a module.

Sums are kept in float64 and divided by the number of tokens at the end: the order of the rows and how they are batched
change the result only within the rounding of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mariotte.compress.walk import Walk, hooked
from mariotte.compress.walk import rows_at_once as rows_at_once
from mariotte.compress.walk import tokens_for as tokens_for
from mariotte.compress.walk import watching as watching
from mariotte.errors import ModelError
from mariotte.models.model import Model, OfExpert
from mariotte.models.paging import Spilled, pager_of
from mariotte.models.step import Context


def rms_normalised(x_MI: Tensor, eps: float) -> Tensor:
    """Each row divided by its root mean square: what an RMSNorm sees before its weights."""
    return x_MI * torch.rsqrt(x_MI.square().mean(-1, keepdim=True) + eps)


def outer(x_MI: Tensor) -> Tensor:
    """The sum of x xᵀ over tokens, (I, I)."""
    return x_MI.T @ x_MI


def squares(x_MI: Tensor) -> Tensor:
    """The sum of x² over tokens, (I,)."""
    return x_MI.square().sum(0)


class Means:
    """Means over tokens of a statistic of inputs, for any number of groups; call it with each group's inputs.

    Parameters
    ----------
    statistic : the sum over tokens of what is to be averaged, such as `outer` or `squares`, of inputs (M, I) float64
    """

    def __init__(self, statistic: Callable[[Tensor], Tensor]) -> None:
        self.statistic = statistic
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, group: str, x_MI: Tensor) -> None:
        """Add what a module of `group` saw, (M, I)."""
        found = self.statistic(x_MI.double())
        if group in self._sums:
            self._sums[group] += found
        else:
            self._sums[group] = found
        self._tokens[group] = self._tokens.get(group, 0) + len(x_MI)

    def fill(self, group: str, module: nn.Module) -> None:
        """Where a group has seen nothing, as an expert that no token took: take each unit vector once.

        Its inputs then count as equally large and independent, so that weights alone decide.
        """
        if group not in self._sums and isinstance(module, OfExpert):
            self(group, torch.eye(module.in_features, dtype=torch.float64, device=module.stacked.weight.device))

    def result(self, step: str, model: Model) -> dict[str, Tensor]:
        """The mean of every group, float64.

        Raises
        ------
        ModelError
            When activations were not finite.
        """
        return {group: self.pop(group, step, model) for group in list(self._sums)}

    def pop(self, group: str, step: str, model: Model) -> Tensor:
        """The mean of one group, float64, whose sum is no longer held.

        Raises
        ------
        ModelError
            When activations were not finite.
        """
        mean = self._sums.pop(group) / self._tokens.pop(group)
        check_finite(mean, step, group, model)
        return mean


def check_finite(found: Tensor, step: str, group: str, model: Model, *, what: str = "activations") -> None:
    """Refuse numbers that are not finite: comparing them would rank parts of the model at random.

    Raises
    ------
    ModelError
        When some are not.
    """
    if not bool(found.isfinite().all()):
        raise ModelError(
            f"{step} found {what} that are not finite in {group} of {model.name}: "
            "check the checkpoint, or compute in a wider dtype"
        )


def second_moments(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch: int | None = None,
) -> MutableMapping[str, Tensor]:
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
    (I, I) float64 on the model's device for every group; see `means`

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

    def statistic(x_MI: Tensor) -> Tensor:
        return outer(x_MI if transform is None else transform(x_MI))

    return means(model, context, step, inputs, statistic, batch=batch)


def means(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    statistic: Callable[[Tensor], Tensor],
    *,
    batch: int | None = None,
) -> MutableMapping[str, Tensor]:
    """Mean over tokens of a statistic of the inputs of modules, for every group of them from the same pass.

    Parameters
    ----------
    statistic : as for `Means`

    Returns
    -------
    float64 on the model's device. Of a streamed model each is written to scratch once the block that it belongs to has
    been passed, and read when it is asked for: pop one after another, and one is held

    Raises
    ------
    DataError
        When the run has no calibration text.
    ModelError
        When activations are not finite.
    """
    gather = Means(statistic)
    pager = pager_of(model.embeddings.weight)
    found: MutableMapping[str, Tensor] = {} if pager is None else Spilled(pager)

    def passed(group: str) -> None:
        gather.fill(group, inputs[group][0])
        found[group] = gather.pop(group, step, model)

    observe(model, context, step, inputs, gather, batch=batch, passed=passed)
    return found


def mean_squares(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    *,
    batch: int | None = None,
) -> MutableMapping[str, Tensor]:
    """Mean of x² of each input of modules: the diagonal of `second_moments`, at the cost of a forward pass alone.

    Returns
    -------
    (I,) float64 on the model's device for every group; the l2 norm over M tokens is the root of M times that
    """
    return means(model, context, step, inputs, squares, batch=batch)


def taylor(
    model: Model, context: Context, step: str, inputs: Mapping[str, nn.Module], *, batch: int | None = None
) -> dict[str, Tensor]:
    """How much the loss of a row would change to first order if an input of a module were zero.

    Parameters
    ----------
    inputs : modules by the name under which the result is wanted

    Returns
    -------
    (I,) float64 for each: the mean over rows of |sum over tokens of x dL/dx|, with L the row's mean loss

    Raises
    ------
    DataError
        When the run has no calibration text, or its rows are of one token, after which nothing is predicted.
    ModelError
        When activations or gradients are not finite.

    Notes
    -----
    Cost: a forward and a backward pass over activations; no gradient of a parameter is computed.

    References
    ----------
    [molchanov2017pruning]_ equation 8, with tokens for positions of a feature map.
    """
    tokens_NT = tokens_for(context, step, predicting=True)
    rows = rows_at_once(tokens_NT, batch)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_BTI = cast(Tensor, arguments[0])
            # The first one of a frozen model hangs on nothing that asks for gradients.
            seen[name] = x_BTI if x_BTI.requires_grad else x_BTI.requires_grad_()

        return hook

    totals: dict[str, Tensor] = {}
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in inputs.items()]
    with hooked(handles), torch.enable_grad():
        for start in range(0, len(tokens_NT), rows):
            tokens_BT = tokens_NT[start : start + rows].to(model.device)
            logits_BTV = model.logits(tokens_BT)[:, :-1].float()
            loss_BT = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none")
            gradients = torch.autograd.grad(loss_BT.mean(1).sum(), [seen[name] for name in inputs])
            for name, gradient_BTI in zip(inputs, gradients, strict=True):
                change_I = (seen[name].detach().double() * gradient_BTI.double()).sum(1).abs().sum(0)
                totals[name] = totals[name] + change_I if name in totals else change_I
            seen.clear()
            context.progress("calibration", min(1.0, (start + rows) / len(tokens_NT)))
    for name, total_I in totals.items():
        check_finite(total_I, step, name, model, what="activations or gradients")
    return {name: total_I / len(tokens_NT) for name, total_I in totals.items()}


@torch.no_grad()
def observe(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    gather: Callable[[str, Tensor], None],
    *,
    batch: int | None = None,
    passed: Callable[[str], None] = lambda group: None,
) -> None:
    """Run the calibration tokens and hand every group the inputs of its modules, (M, I).

    Parameters
    ----------
    passed : told every group whose modules are not run any more

    Raises
    ------
    DataError
        When the run has no calibration text.

    Notes
    -----
    A streamed model is run block by block, all rows through one block before the next is read; a group is then passed
    with the last block that has modules of it.
    """
    if model.streamed and model.kind == "causal":
        _observe_blocks(model, context, step, inputs, gather, batch, passed)
        return
    tokens_NT = tokens_for(context, step)
    rows = rows_at_once(tokens_NT, batch)
    if model.kind != "causal":
        observe_encoder(model, tokens_NT, rows, inputs, gather)
        context.progress("calibration", 1.0)
        for group in inputs:
            passed(group)
        return
    # The model without its head: no hook sits behind it, and logits are the largest tensor of the pass.
    body = model.hf.base_model
    with watching(inputs, gather):
        for start in range(0, len(tokens_NT), rows):
            body(input_ids=tokens_NT[start : start + rows].to(model.device), use_cache=False)
            context.progress("calibration", min(1.0, (start + rows) / len(tokens_NT)))
    for group in inputs:
        passed(group)


@torch.no_grad()
def observe_encoder(
    model: Model,
    tokens_NT: Tensor,
    rows: int,
    inputs: Mapping[str, Sequence[nn.Module]],
    gather: Callable[[str, Tensor], None],
) -> None:
    """Run rows of tokens through an encoder, and hand every group the inputs of its modules, (M, I).

    Parameters
    ----------
    tokens_NT : less than zero where a row has ended; what stands there is not attended to, and not handed on
    rows : at once
    """

    def of(present_BT: Tensor) -> Callable[[str, Tensor], None]:
        return lambda group, x_MI: gather(group, x_MI[present_BT.flatten()])

    for start in range(0, len(tokens_NT), rows):
        tokens_BT = tokens_NT[start : start + rows].to(model.device)
        present_BT = tokens_BT >= 0
        with watching(inputs, of(present_BT)):
            model.hf(input_ids=tokens_BT.clamp(min=0), attention_mask=present_BT.long())


def _runs(module: nn.Module) -> nn.Module:
    """What runs when a module's input is seen."""
    return module.held if isinstance(module, OfExpert) else module


def _observe_blocks(
    model: Model,
    context: Context,
    step: str,
    inputs: Mapping[str, Sequence[nn.Module]],
    gather: Callable[[str, Tensor], None],
    batch: int | None,
    passed: Callable[[str], None],
) -> None:
    """See `observe`."""
    walk, blocks = Walk(model, context, step, batch=batch), model.blocks
    waiting = {group: {_runs(module) for module in modules} for group, modules in inputs.items()}

    def leave(modules: set[nn.Module]) -> None:
        for group, left in list(waiting.items()):
            left -= modules
            if not left:
                del waiting[group]
                passed(group)

    with watching(inputs, gather):
        for index, block in enumerate(blocks):
            walk.advance(block.module)
            leave(set(block.module.modules()))
            context.progress("calibration", (index + 1) / len(blocks))
        # What is left stands behind the last block: its norm.
        for rows in walk.batches() if waiting else ():
            model.final_norm(walk.stream_NTD[rows].to(model.device))
        leave({model.final_norm} if waiting else set())
    assert not waiting, f"{sorted(waiting)} are neither in the blocks nor the norm behind them"
