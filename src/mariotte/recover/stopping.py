"""When a recovery that chooses its own amount stops: what was tried, and what twice as much would bring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mariotte.gains import STOPPING

MOST = 1_000_000
"""Tokens at which it ends unless told otherwise."""

HELD_ROWS = 64
"""Rows of the validation split that decide: the same ones for every amount."""

SEEN = 3
"""Amounts, none counted as one, before which nothing is decided: what recovery brings is known of one doubling then."""

_FIRST, _FIRST_BATCHES = 1_000, 15
_LEVELS = "levels.json"


def first_amount(batch: int, block: int) -> int:
    """Tokens tried first: 1k, doubled until they are 15 batches or more; 4k with the testbed's rows."""
    amount = _FIRST
    while amount < _FIRST_BATCHES * batch * block:
        amount *= 2
    return amount


@dataclass
class Levels:
    """Held-out loss by amount, the cut model's at 0, kept across interruptions.

    Parameters
    ----------
    file : where they are kept
    held : fingerprint of the split that scored them; levels of another one are forgotten
    loss : nats a token
    """

    file: Path
    held: str
    loss: dict[int, float] = field(default_factory=lambda: dict[int, float]())

    @classmethod
    def open(cls, folder: Path, held: str) -> Levels:
        """Those in the folder of a trunk."""
        levels = cls(folder / _LEVELS, held)
        if levels.file.is_file():
            told = json.loads(levels.file.read_text(encoding="utf-8"))
            if told["held"] == held:
                levels.loss = {int(amount): loss for amount, loss in told["loss"].items()}
        return levels

    @staticmethod
    def forget(folder: Path) -> None:
        """Remove those in the folder of a trunk."""
        (folder / _LEVELS).unlink(missing_ok=True)

    def add(self, amount: int, loss: float) -> None:
        """Write down one more."""
        self.loss[amount] = loss
        draft = self.file.with_name(f".{_LEVELS}")
        draft.write_text(json.dumps({"held": self.held, "loss": self.loss}), encoding="utf-8")
        draft.replace(self.file)


def expected_gain(loss: Mapping[int, float]) -> tuple[float, float] | None:
    """What doubling the last amount will take off the loss, as a share of it; None while it is early.

    Parameters
    ----------
    loss : held out, by amount, none among them

    Returns
    -------
    what is expected, and what is not exceeded with the law's probability: the latter decides
    """
    if len(loss) < SEEN:
        return None
    amounts = sorted(loss)
    loss_M = np.array([loss[amount] for amount in amounts])
    tokens_M = np.array(amounts, dtype=np.float64)
    return STOPPING.gain(tokens_M, loss_M, 2.0 * amounts[-1]), STOPPING.possible(tokens_M, loss_M, 2.0 * amounts[-1])
