"""What the records say in a sentence: how much can be removed before the loss rises too far."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mariotte.chain import Chain, parse
from mariotte.errors import ChainError
from mariotte.report.series import (
    Cut,
    Series,
    Setting,
    corpus_of,
    cuts,
    quantity,
    series,
    share,
    signed_share,
    span,
)
from mariotte.store.record import Record

ALLOWANCES = (0.01, 0.05, 0.10)
"""Relative rises of the loss that the report answers for; chosen by us."""

NOTHING_ZEROED = 0.01
"""A cut counts as removing when zeros are less than this part of what it took away: rounding; chosen by us."""


@dataclass(frozen=True, kw_only=True)
class Affordable:
    """The largest share that one series takes away within an allowance of loss.

    Parameters
    ----------
    setting, series, recovery : as in `Cut`
    chain : the series with the amount found, to two digits
    allowance : relative rise of the loss that was allowed
    amount : nominal, of the first link
    removed : share of the dense parameters removed or zeroed
    zeroes : whether parameters are zeroed and still stored, rather than removed
    loss, base_loss : at that amount and of the dense model, nats a token
    facts, base_facts : top-1 share of facts known, None where it was not measured
    open : every measured cut stays within the allowance: the answer is the strongest one measured
    measured : the answer is a cut that was measured, not a point between two
    seeds : of the cuts used
    """

    setting: Setting
    series: str
    recovery: str | None
    chain: str
    allowance: float
    amount: float
    removed: float
    zeroes: bool
    loss: float
    base_loss: float
    facts: float | None
    base_facts: float | None
    open: bool
    measured: bool
    seeds: tuple[int, ...]
    base_params: int

    @property
    def facts_kept(self) -> float | None:
        """Facts known ÷ facts known by the dense model; None where they were not measured or it knows none."""
        return self.facts / self.base_facts if self.facts is not None and self.base_facts else None


def affordable(curve: Series, allowance: float, facts: Sequence[Cut] = ()) -> Affordable | None:
    """The largest share that `curve` takes away while the loss rises by no more than `allowance`.

    Parameters
    ----------
    curve : cuts measured by loss
    allowance : relative rise of the loss, such as .05
    facts : cuts measured by facts known, of any chains; those of the same model and chain are used

    Returns
    -------
    None when not even the mildest cut stays within the allowance

    Notes
    -----
    Between the last cut within the allowance and the first beyond, loss and amount are taken as straight lines of the
    share removed. Loss curves bend upwards, so the chord lies above the curve and the answer is on the careful side.
    Below the mildest cut nothing is claimed: some methods damage a model by being applied at all.
    """
    taken = [cut for cut in curve.cuts if cut.removed > 0 and cut.amount is not None]
    within = list(itertools.takewhile(lambda cut: cut.change <= allowance, taken))
    if not within:
        return None
    last = within[-1]
    beyond = taken[len(within)] if len(within) < len(taken) else None
    assert last.amount is not None
    counted = all(cut.amount is not None and float(cut.amount).is_integer() for cut in taken)
    # Amounts that count whole things (blocks) have nothing between them.
    if beyond is None or beyond.amount is None or counted or beyond.removed <= last.removed:
        part, following = 0.0, last
    else:
        part, following = (allowance - last.change) / (beyond.change - last.change), beyond
    assert following.amount is not None
    amount = last.amount + part * (following.amount - last.amount)
    if part:
        # Two digits, rounded down: the chain that is printed must itself stay within the allowance.
        rounded = max(math.floor(amount * 100) / 100, last.amount)
        part *= (rounded - last.amount) / (amount - last.amount) if amount != last.amount else 0.0
        amount = rounded
    known = {cut.chain: cut for cut in facts if cut.setting.model_hash == curve.setting.model_hash}
    here, there = known.get(last.chain), known.get(following.chain)
    return Affordable(
        setting=curve.setting,
        series=curve.name,
        recovery=last.recovery,
        chain=_with_amount(last.chain, amount),
        allowance=allowance,
        amount=amount,
        removed=_between(last.removed, following.removed, part),
        zeroes=last.zeroed > NOTHING_ZEROED * last.removed,
        loss=_between(last.value, following.value, part),
        base_loss=last.base,
        facts=_between(here.value, there.value, part) if here and there else None,
        base_facts=here.base if here else None,
        open=beyond is None,
        measured=part == 0,
        seeds=tuple(sorted({*last.seeds, *following.seeds})),
        base_params=last.base_params,
    )


def _between(start: float, end: float, part: float) -> float:
    return start + part * (end - start)


def _with_amount(chain: str, amount: float) -> str:
    try:
        first, *others = parse(chain).links
    except (ChainError, ValueError):
        return chain
    return str(Chain((replace(first, amount=amount), *others)))


def main_setting(found: Iterable[Cut]) -> Setting | None:
    """The model and measure that most cuts speak of; of several, the largest model; None without cuts."""
    compressed = [cut for cut in found if cut.method is not None]
    counts = Counter(cut.setting for cut in compressed)
    sizes = {cut.setting: cut.base_params for cut in compressed}
    order = sorted(counts, key=lambda s: (-counts[s], -sizes[s], s.model, s.measure, s.protocol))
    return order[0] if order else None


def all_affordable(records: Iterable[Record], allowance: float) -> list[Affordable]:
    """For every series of every model, what it can take away within `allowance`; those that cannot are left out."""
    records = list(records)
    facts = cuts(records, "knowledge", "top1")
    answers = (affordable(curve, allowance, facts) for curve in series(cuts(records, "loss", "loss")))
    return [answer for answer in answers if answer is not None]


def usable_sentences(records: Iterable[Record], *, allowance: float = 0.05) -> list[str]:
    """One to three sentences for an engineer about the main model: the best cut that removes, recovers or zeroes.

    Parameters
    ----------
    records : of any models and measures
    allowance : relative rise of the loss that is acceptable

    Returns
    -------
    The first is the most useful one. When nothing qualifies, a single sentence says so.
    """
    records = list(records)
    losses = cuts(records, "loss", "loss")
    main = main_setting(losses)
    if main is None:
        return ["No compressed model was measured by its loss, so nothing can be said about what may be removed."]
    answers = [a for a in all_affordable(records, allowance) if a.setting == main]
    if not answers:
        mildest = min((c for c in losses if c.setting == main and c.method is not None), key=lambda c: c.value)
        return [
            f"Nothing measured on {main.model} stays within {signed_share(allowance, 0)} loss on "
            f"{corpus_of(main.measure) or main.measure}: the mildest cut, {mildest.chain}, takes away "
            f"{share(mildest.removed)} of the parameters at {signed_share(mildest.change)} loss "
            f"({mildest.value:.3f} against {mildest.base:.3f} nats dense, {_seeds(mildest.seeds)})."
        ]
    kinds = (
        [a for a in answers if not a.zeroes and a.recovery is None],
        [a for a in answers if not a.zeroes and a.recovery is not None],
        [a for a in answers if a.zeroes],
    )
    return [_sentence(max(kind, key=lambda a: a.removed)) for kind in kinds if kind]


def usable_sentence(records: Iterable[Record], *, allowance: float = 0.05) -> str:
    """The sentence that an engineer can act on; see `usable_sentences`."""
    return usable_sentences(records, allowance=allowance)[0]


def _sentence(answer: Affordable) -> str:
    corpus = corpus_of(answer.setting.measure) or answer.setting.measure
    verb = "zeroes" if answer.zeroes else "removes"
    text = (
        f"To stay within {signed_share(answer.allowance, 0)} loss on {corpus}, {answer.chain} {verb} "
        f"{'at least ' if answer.open else ''}{share(answer.removed)} of the {quantity(answer.base_params)} parameters "
        f"of {answer.setting.model} (loss {answer.loss:.3f} against {answer.base_loss:.3f} nats dense)"
    )
    kept = answer.facts_kept
    if kept is not None:
        assert answer.facts is not None
        assert answer.base_facts is not None
        text += (
            f" and keeps {share(kept)} of the facts that the dense model knows "
            f"({share(answer.facts)} against {share(answer.base_facts)})"
        )
    how = (
        "the strongest cut measured"
        if answer.open
        else "measured"
        if answer.measured
        else "interpolated between measured cuts"
    )
    memory = "; zeros are still stored" if answer.zeroes else ""
    return f"{text}; {how}, {_seeds(answer.seeds)}{memory}."


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(set(seeds)) > 1 else ''} {span(seeds)}"
