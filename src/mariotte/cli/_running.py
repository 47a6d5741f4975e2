"""What commands that run a study share: the progress bar over all its experiments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mariotte.cli.console import duration, progress, say

if TYPE_CHECKING:
    from mariotte.experiments.run import Summary
    from mariotte.experiments.study import Study
    from mariotte.store.base import Store


def run_shown(
    study: Study,
    store: Store,
    toml: str,
    work: Path | None = None,
    artifacts: Path | None = None,
    retry_failed: bool = False,
) -> Summary:
    """Run a study and show how far it is; one line at the end says what was done."""
    from mariotte.experiments.pipeline import Outcome
    from mariotte.experiments.run import check, run

    plan = check(study)
    with progress(study.name, plan.experiments) as update:

        def finished(outcome: Outcome) -> None:
            update(1, text=f"{outcome.model} {outcome.chain}")

        def stage(text: str, done: float) -> None:
            update(0, text=text if not done else f"{text} {done:.0%}")

        summary = run(
            study,
            store,
            toml=toml,
            work=work,
            artifacts=artifacts,
            retry_failed=retry_failed,
            progress=stage,
            finished=finished,
        )
    c = summary.counters
    say(
        f"{study.name}: {summary.records} records added, {summary.skipped} experiments were there already, "
        f"{len(summary.failures)} failed; models loaded: {c.loads}, dense evaluations: {c.dense_evaluations}, "
        f"preparations: {c.preparations} for {c.applications} applications, recovery trunks: {c.trunks}; "
        f"{duration(summary.seconds)}"
    )
    if summary.failed_before:
        say(f"  {summary.failed_before} failed in an earlier run and were left alone: --retry-failed tries them again")
    for failure in summary.failures:
        say(f"  failed: {failure.model} {failure.chain} ({failure.stage}): {failure.error}")
    return summary
