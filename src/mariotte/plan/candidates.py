"""The chains that a plan considers: cuts at every amount, alone, with quantizers and with recoveries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mariotte.chain import Link, parse
from mariotte.plan.pool import Parted, parted
from mariotte.plan.quality import Asked, amount_of_recovery
from mariotte.shapes import Left, Sized, left_by

CUTS = ("ffn", "slice", "slicegpt", "shortgpt", "prunenet-random")
"""Methods that a plan considers unless told otherwise: those that take parameters away. Zeros alone save nothing."""

QUANTIZERS = ("rtn@4", "rtn@3")
"""Considered where bytes or memory are asked for, as far as something is known of them."""


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
        """Whether it is a cut and nothing more."""
        parts = self.asked.parts
        return bool(parts.cut) and not parts.quantizer and not parts.recovery


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
    amounts = [round(step * k, 6) for k in range(1, int(0.9 / step + 1e-9) + 1)]
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
