"""What commands that make a plan share: its options as a table, and its choice in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mariotte.cli.console import print_table, say, warn

if TYPE_CHECKING:
    from mariotte.plan.answer import Option, Plan


def print_options(found: Plan, shown: int) -> None:
    """The best options of a plan, one row each."""
    metrics = [f.metric for f in found.options[0].quality]
    columns = ["chain", *(f"{m}" for m in metrics), f"{found.level:.0%} interval", "sure", "removed", "bytes"]
    columns += ["speed", "recovery", "budget"]
    print_table(
        f"options, best first: {found.rule}", columns, [_row(option, found) for option in found.options[:shown]]
    )


def say_choice(found: Plan) -> None:
    """What a plan chooses, or that nothing meets its budget."""
    winner = found.winner
    if winner is None:
        best = found.options[0]
        warn(
            f"nothing that is known meets the budget with probability {found.budget.sure:g}; {best.chain} does with "
            f"{best.probability:.2f}: allow more, lower --sure, or probe more"
        )
        return
    f = winner.quality[0]
    surely = "measured" if f.measured else f"{found.level:.0%} interval {f.lo:.4g} to {f.hi:.4g}"
    say(
        f"choose {winner.chain}: {f.metric} {f.mean:.4g} ({relative(f.mean, f.base)}), {surely}; {winner.saving:.1%} "
        f"of the parameters and {1 - winner.bytes_share:.1%} of the bytes saved"
        + (f"; {winner.speedup:.2f} times as fast" if winner.speedup is not None else "")
    )


def _row(option: Option, found: Plan) -> list[Any]:
    f = option.quality[0]
    return [
        option.chain,
        *(f"{q.mean:.4g} ({relative(q.mean, q.base)})" for q in option.quality),
        "measured" if f.measured else f"{f.lo:.4g} .. {f.hi:.4g}",
        f"{option.probability:.2f}",
        f"{option.saving:.1%}" + (f" ± {option.slack / found.n_params:.1%}" if option.slack else ""),
        f"{option.bytes_share:.1%}",
        "-" if option.speedup is None else f"{option.speedup:.2f}x",
        f"{option.recovery_tokens:,}" if option.recovery_tokens else "-",
        "met" if option.meets else "; ".join(option.misses) or "not sure enough",
    ]


def relative(value: float, base: float) -> str:
    """How far a value is from the dense one, as in ``+4.1 %``."""
    return f"{100 * (value / base - 1):+.1f} %"
