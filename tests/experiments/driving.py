"""Studies that tests run, and what they leave in a store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mariotte.experiments import run as running
from mariotte.experiments.run import Summary
from mariotte.experiments.study import Study
from mariotte.store import open_store


def run(study: Study, store: str | Path, **settings: Any) -> Summary:
    with open_store(store, create=True) as opened:
        return running.run(study, opened, **settings)


def table(store: str | Path) -> dict[str, str]:
    with open_store(store) as opened:
        return {record.id: record.result_hash() for record in opened.records()}


ALONE = ("loading", "waiting for other processes", "measuring dense")
"""Stages before there is something for every driver to do."""


def begun_together(drivers: int) -> Callable[[], Callable[[str, float], None]]:
    """Makes a listener to progress for each driver, that lets it do its first step when all have come to theirs.

    In a study of seconds one alone would have done everything before the other, whose worker imports torch, began.
    """
    began = threading.Barrier(drivers, timeout=120)

    def listener() -> Callable[[str, float], None]:
        met = threading.Event()

        def begin(stage: str, done: float) -> None:
            if stage not in ALONE and not met.is_set():
                met.set()
                began.wait()
            time.sleep(0.02)

        return begin

    return listener
