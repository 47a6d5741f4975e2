"""Two models on the same items: differences with intervals, answers that flipped, and whether that is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mariotte.errors import DataError

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 9999
DRAWS_AT_ONCE = 1 << 22
"""Items drawn at once: bounds memory at some tens of megabytes; the result does not depend on it."""

LEAST_FREEDOM = 1e-6
"""Items, beyond the first, that an interval needs in effect; below, its tail is no number."""


@dataclass(frozen=True)
class Difference:
    """The other model's number less the base's, from the same items.

    Parameters
    ----------
    base, other : sum of an item's values over sum of its weights, averaged over strata
    difference : other - base
    lo, hi : interval of the difference; None where there are fewer than two items in a stratum
    items : how many there were
    """

    base: float
    other: float
    difference: float
    lo: float | None
    hi: float | None
    items: int


def bootstrap(
    base: ArrayLike,
    other: ArrayLike,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    shares: Sequence[float] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Paired bootstrap: whole items are drawn with replacement, each with what both models made of it.

    Parameters
    ----------
    base, other : (n,) of each item the sum of its values, such as the nats of a document's tokens, or 0 and 1
    weights : (n,) what the sums are divided by, such as the number of those tokens; None for ones
    strata : (n,) integers: items are drawn within each, and the numbers of the strata are averaged, as the accuracy
        over several tasks is; None for a single one
    shares : what each stratum, in the order of their integers, counts in that average; None for all the same
    level : of the interval
    resamples, seed : of the drawing

    Returns
    -------
    Difference

    Raises
    ------
    DataError
        When there are no items, the arrays are not of one length, or values are not finite or weights not positive.

    Notes
    -----
    The interval is the expanded percentile interval [hesterberg2015bootstrap]_: quantiles of the resampled
    differences, at a level widened by what the percentile interval of a mean of so many normal values lacks. Items of
    unequal weight are drawn as they are, so that a document of many tokens counts with all of them or with none; they
    count as fewer in that widening. With few flipped answers the interval of a share is coarse; the exact p of
    `mcnemar` is right there too.

    References
    ----------
    [hesterberg2015bootstrap]_
    """
    a_N, b_N = np.asarray(base, np.float64), np.asarray(other, np.float64)
    w_N = np.ones_like(a_N) if weights is None else np.asarray(weights, np.float64)
    s_N = np.zeros(a_N.shape, np.int64) if strata is None else np.asarray(strata, np.int64)
    if not a_N.ndim == 1 or not a_N.shape == b_N.shape == w_N.shape == s_N.shape:
        raise DataError(
            f"paired values must be as many for both models, got {a_N.shape}, {b_N.shape}, {w_N.shape}, {s_N.shape}: "
            "measure both on the same items"
        )
    if not len(a_N):
        raise DataError("a paired comparison needs items, got none: measure both models on at least one")
    if not (np.isfinite(a_N).all() and np.isfinite(b_N).all() and np.isfinite(w_N).all() and (w_N > 0).all()):
        raise DataError(
            "paired values must be finite and their weights positive, got others: leave out items that have no value"
        )
    members = [np.flatnonzero(s_N == stratum) for stratum in np.unique(s_N)]

    share_S = np.full(len(members), 1 / len(members)) if shares is None else np.asarray(shares, np.float64)

    def mean(values_N: Array) -> float:
        return float(share_S @ np.array([values_N[i].sum() / w_N[i].sum() for i in members]))

    found = mean(b_N - a_N)
    lo = hi = None
    # Of items where one weighs as much as all, nothing can be told of what another draw would give.
    freedom = sum(_as_many_equal(w_N[i]) - 1 for i in members)
    if all(len(i) > 1 for i in members) and freedom > LEAST_FREEDOM:
        generator = np.random.default_rng(seed)
        drawn_R = np.zeros(resamples)
        for i, share in zip(members, share_S, strict=True):
            drawn_R += _resampled((b_N - a_N)[i], w_N[i], resamples, generator) * share
        tail = _expanded((1 - level) / 2, freedom)
        lo, hi = (float(q) for q in np.quantile(drawn_R, (tail, 1 - tail)))
    return Difference(mean(a_N), mean(b_N), found, lo, hi, len(a_N))


def _as_many_equal(weights_N: Array) -> float:
    """How many items of equal weight say as much, after Kish: a few long documents are few, whatever stands beside."""
    return float(weights_N.sum() ** 2 / (weights_N**2).sum())


def _expanded(tail: float, freedom: float) -> float:
    """The tail whose normal quantile, with the biased standard error of a resample, is Student's."""
    return float(stats.norm.cdf(math.sqrt((freedom + 1) / freedom) * stats.t.ppf(tail, freedom)))


def _resampled(values_N: Array, weights_N: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Sum of values over sum of weights of (resamples,) drawings of as many items as there are."""
    n = len(values_N)
    # Equal items are drawn by their count: answers right and wrong are three kinds of item, however many there are.
    kinds_K2, counts_K = np.unique(np.stack((values_N, weights_N), 1), axis=0, return_counts=True)
    if 4 * len(kinds_K2) <= n:
        drawn_RK = generator.multinomial(n, counts_K / n, size=resamples)
        sums_R2 = drawn_RK @ kinds_K2
        return sums_R2[:, 0] / sums_R2[:, 1]
    found: list[Array] = []
    at_once = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        drawn_RN = generator.integers(n, size=(min(at_once, resamples - start), n))
        found.append(values_N[drawn_RN].sum(1) / weights_N[drawn_RN].sum(1))
    return np.concatenate(found)


@dataclass(frozen=True)
class Flips:
    """Items by what became of them: places in the order given.

    Parameters
    ----------
    kept : right with both models
    lost : right with the base alone
    gained : right with the other alone
    p : of McNemar's exact test
    """

    kept: tuple[int, ...]
    lost: tuple[int, ...]
    gained: tuple[int, ...]
    p: float


def flips(base: Sequence[bool] | NDArray[np.bool_], other: Sequence[bool] | NDArray[np.bool_]) -> Flips:
    """Which answers flipped, both ways, and whether that is chance.

    Parameters
    ----------
    base, other : of each item whether a model is right

    Raises
    ------
    DataError
        When they are not of one length.
    """
    a_N, b_N = np.asarray(base, np.bool_), np.asarray(other, np.bool_)
    if a_N.shape != b_N.shape:
        raise DataError(
            f"answers must be as many for both models, got {a_N.size} and {b_N.size}: ask both the same items"
        )

    def places(chosen_N: NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(int(i) for i in np.flatnonzero(chosen_N))

    lost, gained = places(a_N & ~b_N), places(~a_N & b_N)
    return Flips(places(a_N & b_N), lost, gained, mcnemar(len(lost), len(gained)))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's exact test: that an answer that flips is as likely to be gained as lost.

    Parameters
    ----------
    lost, gained : flips one way and the other; answers that did not flip say nothing about the direction

    Returns
    -------
    p in (0, 1]; 1 when nothing flipped

    References
    ----------
    [mcnemar1947note]_
    """
    if lost < 0 or gained < 0:
        raise DataError(f"numbers of flips must not be negative, got {lost} and {gained}: count them")
    return 1.0 if lost + gained == 0 else float(stats.binomtest(lost, lost + gained).pvalue)
