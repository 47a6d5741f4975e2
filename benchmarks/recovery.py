"""What recovery repairs: the table of studies/testbed/recovery.toml, from a store that holds its records.

    mariotte run studies/testbed/recovery.toml --store recovery.db
    python benchmarks/recovery.py recovery.db

Repaired is the share of the damage that recovery takes away: of the loss (cut - recovered) / (cut - dense), of facts
(recovered - cut) / (dense - cut) in the share of facts known; it is left out where the damage is below 0.005 nats or
half a percentage point. Facts are counted apart for the half of the people that
the corpus testbed/half tells of, and for the half that it never mentions; 1,280 facts each.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection

from mariotte.store import open_store
from mariotte.store.record import Record
from mariotte.testbed.world import World

LEAST = 0.005
"""Damage, in nats or as a share of facts, of which it makes no sense to name parts."""


def known(record: Record, dense: Collection[str]) -> set[str]:
    """The facts that a compressed model knows, from what it lost and gained against the dense one."""
    return (set(dense) - set(record.details["lost"])) | set(record.details["gained"])


def repaired(cut: float, after: float, dense: float) -> str:
    damage = dense - cut
    return f"{(after - cut) / damage:.0%}" if abs(damage) >= LEAST else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    asked = parser.parse_args()
    with open_store(asked.store) as store:
        records = store.records(study="testbed-recovery")
    world = World()
    halves = {half: {f.id for f in world.facts() if world.in_half(f.subject) == half} for half in (True, False)}
    losses = {(r.model, r.chain): r.metrics["loss"] for r in records if r.measure.startswith("loss")}
    facts = {(r.model, r.chain): r for r in records if r.measure.startswith("knowledge")}
    print("| model | cut | recovery | text | tokens | loss | repaired | facts | repaired | told half | untold half |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (model, chain), record in facts.items():
        if chain == "dense":
            continue
        cut, _, recovery = chain.partition(" | ")
        dense = facts[model, "dense"]
        dense_known = dense.details["known"]
        knows = {name: known(facts[model, name], dense_known) for name in (cut, chain)}
        shares = {
            half: tuple(len(some & of) / len(of) for some in (knows[cut], knows[chain])) for half, of in halves.items()
        }
        loss, top1 = losses[model, chain], record.metrics["top1"]
        base_loss, base_top1 = losses[model, "dense"], dense.metrics["top1"]
        name, _, rest = recovery.partition("@")
        tokens, _, corpus = rest.partition("(")
        row = [model.removeprefix("testbed/"), f"`{cut}`", name, corpus.removeprefix("corpus=").rstrip(")"), tokens]
        row += [f"{loss:.3f}", repaired(losses[model, cut], loss, base_loss) if recovery else ""]
        row += [f"{top1:.1%}"]
        row += [repaired(facts[model, cut].metrics["top1"], top1, base_top1) if recovery else ""]
        row += [f"{shares[half][1]:.1%}" for half in (True, False)]
        print(f"| {' | '.join(row)} |")
    for model in dict.fromkeys(model for model, _ in facts):
        print(f"\n{model} dense: loss {losses[model, 'dense']:.3f}, facts {facts[model, 'dense'].metrics['top1']:.1%}")


if __name__ == "__main__":
    main()
