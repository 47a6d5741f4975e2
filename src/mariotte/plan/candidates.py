"""The chains that a plan considers: cuts at every amount, alone, with quantizers and with recoveries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mariotte.chain import Chain, Link, parse
from mariotte.plan.pool import TOGETHER, Parted, parted
from mariotte.plan.quality import Asked, amount_of_recovery
from mariotte.shapes import Left, Sized, left_by

CUTS = ("ffn", "slice", "slicegpt", "shortgpt", "prunenet-random")
"""Methods that take parameters away, of those of which the package brings records."""

QUANTIZERS = ("rtn@4", "rtn@3")
"""Of those of which it brings records, what is considered where bytes or memory are asked for."""

MOST = 0.9
"""No cut takes more of its own unit."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A chain and what shapes say of it."""

    asked: Asked
    left: Left
    tokens: int

    @property
    def chain(self) -> str:
        """Canonical text."""
        return self.asked.chain

    @property
    def alone(self) -> bool:
        """Whether it is one cut and nothing more."""
        parts = self.asked.parts
        return bool(parts.cut) and not (parts.combined or parts.quantizer or parts.recovery)


def candidates_of(
    model: Sized,
    methods: Sequence[str],
    *,
    step: float,
    quantizers: Sequence[str] = (),
    recoveries: Sequence[str] = (),
) -> list[Candidate]:
    """Cuts at every `step`, each width once, alone and with each quantizer and recovery; quantizers alone.

    Parameters
    ----------
    methods, quantizers, recoveries : as links of a chain, the methods without amount
    """
    found: dict[tuple[str, int, float], Candidate] = {}
    lefts: dict[str, Left | None] = {}
    tokens_of = {recovery: amount_of_recovery(recovery) for recovery in recoveries}
    amounts = amounts_at(step)
    for method in methods:
        link = parse(method).links[0]
        for amount in amounts:
            cut = str(Link(link.name, amount, link.scope, link.fields))
            for recovery in ("", *recoveries):
                for quantizer in ("", *quantizers):
                    sizes = " | ".join(part for part in (cut, quantizer) if part)  # recoveries leave sizes as they are
                    if sizes not in lefts:
                        lefts[sizes] = left_by(model, parse(sizes))
                    left = lefts[sizes]
                    if left is None or left.obtained <= 0:
                        continue
                    chain = " | ".join(part for part in (cut, recovery, quantizer) if part)
                    parts = Parted(method, quantizer, recovery)
                    key = (f"{method} | {recovery} | {quantizer}", left.n_params, round(left.obtained, 6))
                    if key not in found:
                        asked = Asked(chain=chain, parts=parts, amount=left.obtained)
                        found[key] = Candidate(asked=asked, left=left, tokens=tokens_of.get(recovery, 0))
    for quantizer in quantizers:
        left, parts = left_by(model, parse(quantizer)), parted(quantizer)
        if left is not None and parts is not None:
            found[(quantizer, left.n_params, 0.0)] = Candidate(
                asked=Asked(chain=quantizer, parts=parts, amount=0.0), left=left, tokens=0
            )
    return list(found.values())


def amounts_at(step: float) -> list[float]:
    """The amounts of a cut that are considered at a distance of `step`."""
    return [round(step * k, 6) for k in range(1, int(MOST / step + 1e-9) + 1)]


Damage = Callable[[str, float], float]
"""The damage that is expected of a cut, without its amount, when it removes so much in its own unit."""


def together(
    model: Sized,
    methods: Sequence[str],
    damage: Damage,
    *,
    step: float,
    quantizers: Sequence[str] = (),
    recoveries: Sequence[str] = (),
    measured: Sequence[str] = (),
) -> list[Candidate]:
    """Chains of several cuts, alone and with each quantizer and recovery.

    Parameters
    ----------
    methods : the cuts in their order, without amounts
    damage : of each of them alone
    step : distance of the amounts
    quantizers, recoveries : as links of a chain
    measured : chains of these cuts that were measured, which are considered, too

    Notes
    -----
    Amounts of several cuts are as many as the product of those of each. A single path leads through them: from nothing
    on, each time the cut goes one step further that is expected to do least damage for the parameters that it takes.
    """
    links = [parse(method).links[0] for method in methods]

    def chain_of(amounts: Sequence[float]) -> Chain:
        return Chain(
            tuple(replace(link, amount=amount) for link, amount in zip(links, amounts, strict=True) if amount > 0)
        )

    steps = [0.0, *amounts_at(step)]
    at = [0] * len(links)
    here, done = left_by(model, Chain(())), [0.0] * len(links)
    paths: list[Chain] = []
    while here is not None:
        best: tuple[float, int, int, Left, float] | None = None
        for cut, place in enumerate(at):
            # Small steps may round to nothing: the next that takes something.
            for further in range(place + 1, len(steps)):
                amounts = [steps[further if other == cut else at[other]] for other in range(len(at))]
                left = left_by(model, chain_of(amounts))
                if left is None:
                    break
                if left.n_params < here.n_params:
                    share = left.shares[sum(amount > 0 for amount in amounts[:cut])]
                    harm = damage(methods[cut], share)
                    rate = max(harm - done[cut], 0.0) / (here.n_params - left.n_params)
                    if best is None or rate < best[0]:
                        best = (rate, cut, further, left, harm)
                    break
        if best is None:
            break
        _, cut, further, here, harm = best
        at[cut], done[cut] = further, harm
        paths.append(chain_of([steps[place] for place in at]))
    return _treated(model, paths, quantizers, recoveries, [parse(chain) for chain in measured])


def _treated(
    model: Sized,
    chains: Sequence[Chain],
    quantizers: Sequence[str],
    recoveries: Sequence[str],
    measured: Sequence[Chain],
) -> list[Candidate]:
    """Chains of several cuts, and those that were measured, alone and with each recovery and quantizer."""
    found: dict[str, Candidate] = {}
    for cuts in (*chains, *measured):
        if len(cuts.links) < 2:
            continue
        for quantizer in ("", *quantizers):
            # Recoveries leave sizes as they are.
            left = left_by(model, Chain((*cuts.links, *(parse(quantizer).links if quantizer else ()))))
            if left is None:
                continue
            # A cut that rounds to nothing makes no combination, unless that was measured; then it alone is known.
            nothing = min(left.shares) <= 0
            if nothing and (quantizer or cuts not in measured):
                continue
            for recovery in ("",) if nothing else ("", *recoveries):
                chain = TOGETHER.join(part for part in (str(cuts), recovery, quantizer) if part)
                parts = parted(chain)
                assert parts is not None, chain
                asked = Asked(chain=chain, parts=parts, amount=sum(left.shares), amounts=left.shares)
                tokens = amount_of_recovery(recovery) if recovery else 0
                found.setdefault(chain, Candidate(asked=asked, left=left, tokens=tokens))
    return list(found.values())
