"""Compressed checkpoints that a study keeps: none, the best of each amount, or all."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mariotte.experiments.identity import Part
from mariotte.models import checkpoint
from mariotte.models.model import Model
from mariotte.store.record import digest

Keep = Literal["none", "best", "all"]
_LABEL = "artifact.json"

_PLACE = 16
"""Hexadecimal digits of an experiment's id that are the name of its folder."""

_LONGEST_NAME = 80
"""Characters of a model's name in that of its folder; file systems allow 255 bytes."""


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The folder of one model's checkpoints in a study.

    Parameters
    ----------
    folder : of the study; every model has a folder in it, and every checkpoint one in that
    model : name of the dense model
    keep : the policy
    rising : whether more of the study's first metric is better
    """

    folder: Path
    model: str
    keep: Keep
    rising: bool

    @property
    def _models_folder(self) -> Path:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.model).strip("-.")
        if name != self.model.replace("/", "-") or len(name) > _LONGEST_NAME:
            # A path such as `.` leaves no name, and the study's folder is not a model's.
            name = f"{name[-_LONGEST_NAME:]}-{digest(self.model)[:8]}".strip("-.")
        return self.folder / name

    def place(self, experiment: str) -> Path:
        """Where the checkpoint of an experiment stands, or would."""
        return self._models_folder / experiment[:_PLACE]

    def sweep(self) -> None:
        """Remove what a killed process left half-written; nobody else may be writing here."""
        for started in self._models_folder.glob(".*"):
            shutil.rmtree(started, ignore_errors=True)
        for place in self._models_folder.glob("[0-9a-f]" * _PLACE):
            if self.keep == "best" and _label(place) is None:
                shutil.rmtree(place, ignore_errors=True)  # killed between the checkpoint and its label

    def lacks(self, experiment: str) -> bool:
        """Whether a checkpoint that is to be kept is not there."""
        return self.keep == "all" and not self.place(experiment).exists()

    def lacks_best(self, amount: float, value: float) -> bool:
        """Whether the policy wants the best of each amount, and nothing as good as `value` stands here for this one."""
        labels = [label for _, label in self._labels(amount)]
        return self.keep == "best" and not any(self._as_good(label["value"], value) for label in labels)

    def _as_good(self, kept: float, value: float) -> bool:
        return kept >= value if self.rising else kept <= value

    def _labels(self, amount: float) -> list[tuple[Path, dict[str, Any]]]:
        """The checkpoints of an amount, each with what its label says."""
        # Without a value: kept by `all`, beside a measure that recovery is left out of.
        return [
            (place, label)
            for place in self._models_folder.glob("[0-9a-f]" * _PLACE)
            if (label := _label(place)) and label["amount"] == repr(amount) and label["value"] is not None
        ]

    def offer(self, model: Model, experiment: str, parts: Sequence[Part], value: float | None, dense: Model) -> None:
        """Keep a checkpoint, if the policy wants it, before its records are stored: records mean that it was offered.

        Parameters
        ----------
        value : the study's first metric of this model; None when it is not known, and then only ``all`` keeps it

        Raises
        ------
        ModelError
            When it cannot be written.
        """
        place = self.place(experiment)
        if self.keep == "none" or place.exists():
            return
        beaten: list[Path] = []
        amount = float(parts[0].amount)
        if self.keep == "best":
            if value is None:
                return
            if not self.lacks_best(amount, value):
                return
            beaten = [old for old, _ in self._labels(amount)]
        checkpoint.save(model, place, dense_params=dense.counts.n_params)
        label = {"experiment": experiment, "amount": repr(amount), "value": value}
        half = place / f".{_LABEL}"
        half.write_text(json.dumps(label) + "\n", encoding="utf-8")
        half.replace(place / _LABEL)
        for old in beaten:
            with contextlib.suppress(FileNotFoundError):
                (old / _LABEL).unlink()  # first, so that a kill half-way leaves nothing that looks whole
                shutil.rmtree(old)


def _label(place: Path) -> dict[str, Any] | None:
    """What a checkpoint's label says, None where there is none that can be read."""
    try:
        return cast("dict[str, Any]", json.loads((place / _LABEL).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
