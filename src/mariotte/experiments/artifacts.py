"""Compressed checkpoints that a study keeps: none, the best of each amount, or all."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mariotte.experiments.identity import Part
from mariotte.models import checkpoint
from mariotte.models.model import Model

Keep = Literal["none", "best", "all"]
_LABEL = "artifact.json"


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
        return self.folder / re.sub(r"[^A-Za-z0-9._-]+", "-", self.model).strip("-.")

    def place(self, experiment: str) -> Path:
        """Where the checkpoint of an experiment stands, or would."""
        return self._models_folder / experiment[:16]

    def sweep(self) -> None:
        """Remove what a killed process left half-written; nobody else may be writing here."""
        for started in self._models_folder.glob(".*"):
            shutil.rmtree(started, ignore_errors=True)
        for place in self._models_folder.glob("*"):
            if self.keep == "best" and not (place / _LABEL).is_file():
                shutil.rmtree(place, ignore_errors=True)  # killed between the checkpoint and its label

    def lacks(self, experiment: str) -> bool:
        """Whether a checkpoint that is to be kept is not there."""
        return self.keep == "all" and not self.place(experiment).exists()

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
        amount = repr(float(parts[0].amount))
        if self.keep == "best":
            if value is None:
                return
            for label in self._models_folder.glob(f"*/{_LABEL}"):
                kept = json.loads(label.read_text(encoding="utf-8"))
                if kept["amount"] == amount:
                    if (kept["value"] >= value) if self.rising else (kept["value"] <= value):
                        return
                    beaten.append(label.parent)
        checkpoint.save(model, place, dense_params=dense.counts.n_params)
        label = {"experiment": experiment, "amount": amount, "value": value}
        (place / _LABEL).write_text(json.dumps(label) + "\n", encoding="utf-8")
        for old in beaten:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(old)
