"""A mean amount, spread over blocks: the same for each, less for those that matter, or by what the loss says.

For methods that can take another amount from every block. They gather what an allocation needs when they prepare, with
`gather`, keep it, and ask `spread` for the amounts of the blocks whenever they are applied::

    tensors = gather(self.allocation, model, context, self.name(), sizes, amounts, loss)
    ...
    shares = spread(self.allocation, tensors, amount, sizes)

The mean of the amounts, weighted by the sizes of the blocks, is the amount asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from mariotte.compress.influence import block_influence
from mariotte.errors import ChainError, ModelError
from mariotte.models.model import Model
from mariotte.models.step import Context

ALLOCATIONS = ("uniform", "influence", "greedy")

MOST = 0.95
"""No block loses more, unless more is asked of all: an empty block saves nothing that a removed one would not."""
TEMPERATURE = 4.0
"""In units of the mean influence; see `by_influence`. Of 0.5, 1, 2 and 4 it lost least, or within 0.004 nats of least,
for magnitude at 40 and 60 % on three small models, where 0.5 was worse than uniform."""
SHARE = 0.1
"""Of a block of mean size, given away at once by the greedy allocation."""
_NOTHING = 1e-9
"""Amounts below are float error."""


def check_allocation(step: str, allocation: str) -> None:
    """Refuse a name that is no allocation.

    Raises
    ------
    ChainError
        With those that there are.
    """
    if allocation not in ALLOCATIONS:
        raise ChainError(f"{step}: allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")


def gather(
    allocation: str,
    model: Model,
    context: Context,
    step: str,
    sizes: Sequence[int],
    amounts: Sequence[float],
    loss: Callable[[Sequence[float]], float],
) -> dict[str, Tensor]:
    """What an allocation needs to know of a model, for every amount up to the largest of some.

    Parameters
    ----------
    allocation : one of ALLOCATIONS
    model, context : what influence is measured on
    step : name of the step that asks, for errors
    sizes : parameters in scope of each block
    amounts : the largest says how far the greedy path goes
    loss : calibration loss with each block at an amount of its own, for greedy; tried about
        blocks + 2 · blocks · amount / SHARE times

    Returns
    -------
    To be kept with the preparation; nothing for uniform. It serves amounts up to the largest of those given
    """
    if allocation == "uniform":
        return {}
    if allocation == "influence":
        return {"influence": block_influence(model, context, step)}
    path = greedy_path(sizes, loss, max(amounts, default=0.0), who=f"{step} on {model.name}")
    return {"path": torch.tensor(path, dtype=torch.int64)}


def spread(allocation: str, tensors: Mapping[str, Tensor], amount: float, sizes: Sequence[int]) -> list[float]:
    """The amount of each block, in [0, 1), of the given mean weighted by size.

    Parameters
    ----------
    allocation : one of ALLOCATIONS
    tensors : what `gather` found
    amount : the mean, in [0, 1)
    sizes : parameters in scope of each block
    """
    if allocation == "uniform":
        return [amount] * len(sizes)
    if allocation == "influence":
        return by_influence(amount, cast("list[float]", tensors["influence"].tolist()), sizes)
    return along(cast("list[int]", tensors["path"].tolist()), amount, sizes)


def by_influence(
    amount: float,
    influence: Sequence[float],
    sizes: Sequence[int],
    *,
    temperature: float = TEMPERATURE,
    most: float = MOST,
) -> list[float]:
    """Blocks of little influence lose more.

    Parameters
    ----------
    amount : the mean, in [0, 1)
    influence : of each block, such as Block Influence
    sizes : weights of the mean
    temperature : in units of the mean influence; the larger, the closer to uniform
    most : no block loses more, unless `amount` does

    Returns
    -------
    An amount for each block

    Notes
    -----
    The amounts phi maximise sum(s (1 - phi)) + eps H(phi) at their mean: phi is proportional to softmax(-s / eps). The
    paper takes eps as it is; influence differs tenfold between models of different depth, hence our unit. Blocks that
    would lose more than `most` lose that, and the others share what is left over in the same proportions.

    References
    ----------
    [lin2025modegpt]_ section 3.3, equations 10 and 11.
    """
    scores = torch.tensor(influence, dtype=torch.float64)
    scale = temperature * float(scores.abs().mean())
    weights = torch.softmax(-scores / scale, 0) if scale > 0 else torch.ones(len(sizes), dtype=torch.float64)
    return _filled(amount, cast("list[float]", weights.tolist()), sizes, max(most, amount))


def _filled(amount: float, weights: Sequence[float], sizes: Sequence[int], cap: float) -> list[float]:
    """Amounts proportional to `weights`, none above `cap`, of a given mean."""
    found = [0.0] * len(sizes)
    open_blocks: list[int] = list(range(len(sizes)))
    left = amount * sum(sizes)
    while open_blocks:
        total = sum(weights[i] * sizes[i] for i in open_blocks)
        # Weights that underflow say nothing any more of those that are left.
        share = [
            left * weights[i] / total if total > 0 else left / sum(sizes[j] for j in open_blocks) for i in open_blocks
        ]
        over: list[int] = [i for i, wanted in zip(open_blocks, share, strict=True) if wanted > cap]
        if not over:
            for i, wanted in zip(open_blocks, share, strict=True):
                found[i] = wanted
            break
        for i in over:
            found[i] = cap
            left -= cap * sizes[i]
        open_blocks = [i for i in open_blocks if i not in over]
    return found


def greedy_path(
    sizes: Sequence[int],
    loss: Callable[[Sequence[float]], float],
    until: float,
    *,
    share: float = SHARE,
    most: float = MOST,
    who: str = "greedy",
) -> list[int]:
    """Blocks in the order in which they give away a share, each time the one whose loss hurts least.

    Parameters
    ----------
    sizes : parameters in scope of each block
    loss : calibration loss with each block at an amount of its own
    until : mean amount at which the path may end
    share : of a block of mean size, given away at once
    most : at which a block has given all it can
    who : asks, for errors

    Returns
    -------
    A block occurs as often as it gave; a path for less begins a path for more

    Raises
    ------
    ModelError
        When a loss is not finite.

    Notes
    -----
    Lazy: the block whose rise was smallest when it was last tried is tried again, and gives if it is still the
    smallest. A rise grows, as a rule, while the model is cut, so that the order is nearly that of trying all blocks
    each time, at about two trials a step. The rise is counted per parameter, as a block near `most` gives less than a
    share.
    """
    amounts = [0.0] * len(sizes)

    def tried(block: int | None) -> float:
        candidate = list(amounts)
        if block is not None:
            candidate[block] += _given(amounts[block], sizes, block, share, most)
        found = float(loss(candidate))
        if not found < float("inf"):
            raise ModelError(
                f"{who}: the calibration loss of a trial allocation must be finite, got {found}: "
                "check the checkpoint, or compute in a wider dtype"
            )
        return found

    here, path, goal = tried(None), list[int](), min(until, most) * sum(sizes)
    # Minus infinity: never tried, so that all are before the first gives.
    waiting = [(-float("inf"), block, 0.0, -1) for block in range(len(sizes))]
    heapq.heapify(waiting)
    removed = 0.0
    while waiting and removed < goal - _NOTHING * sum(sizes):
        _, block, found, tried_at = heapq.heappop(waiting)
        if tried_at < len(path):
            found = tried(block)
            moved = _given(amounts[block], sizes, block, share, most) * sizes[block]
            heapq.heappush(waiting, ((found - here) / moved, block, found, len(path)))
            continue
        given = _given(amounts[block], sizes, block, share, most)
        amounts[block] += given
        removed += given * sizes[block]
        here = found
        path.append(block)
        if _given(amounts[block], sizes, block, share, most) > 0:
            # Its own rise is unknown now, and is found before it can give again.
            heapq.heappush(waiting, (-float("inf"), block, 0.0, -1))
    return path


def _given(amount: float, sizes: Sequence[int], block: int, share: float, cap: float) -> float:
    """What a block at some amount gives in one step, as a share of itself; 0 when it is at the cap."""
    given = min(share * sum(sizes) / len(sizes) / sizes[block], cap - amount)
    return given if given > _NOTHING else 0.0


def along(
    path: Sequence[int],
    amount: float,
    sizes: Sequence[int],
    *,
    share: float = SHARE,
    most: float = MOST,
) -> list[float]:
    """The amounts reached on a greedy path when their mean is `amount`; the last step is taken in part.

    Where the path has ended, or `amount` is more than `most`, what is missing is taken from all alike.
    """
    amounts, left = _walked(path, amount, sizes, share, max(most, amount))
    if left > _NOTHING * sum(sizes):
        missing = left / sum(size * (max(most, amount) - a) for size, a in zip(sizes, amounts, strict=True))
        amounts = [a + missing * (max(most, amount) - a) for a in amounts]
    return amounts


def _walked(
    path: Sequence[int], amount: float, sizes: Sequence[int], share: float, cap: float
) -> tuple[list[float], float]:
    """The amounts after walking a path as far as `amount`, and the parameters still missing."""
    amounts, left = [0.0] * len(sizes), amount * sum(sizes)
    for block in path:
        given = min(_given(amounts[block], sizes, block, share, cap), left / sizes[block])
        amounts[block] += given
        left -= given * sizes[block]
    return amounts, max(left, 0.0)
