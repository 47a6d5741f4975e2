"""What other models say about a curve before it is measured: priors of the family law, learned from published series.

A prior is the curve of a pruning family on the axes of `mariotte.laws.axes`, a Gaussian. The scheme was tried
beforehand on the series that ship with the package; the numbers in `axes.DEFAULTS` are choices of that trial and of
ours, and every prior is learned by `mariotte.laws.learning.learn`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from mariotte.errors import FitError
from mariotte.laws.axes import N_LINE, N_WEIGHTS, UNKNOWN, Scale, Settings, known_name
from mariotte.laws.base import Array
from mariotte.laws.posterior import Quantiles, Standardised
from mariotte.store.record import digest

FORMAT = 1
"""Number of the layout of a file of priors."""

RECOVERED = " recovered"
"""Ends the name of the prior of series that were trained after the cut."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The prior of a family's curve.

    Parameters
    ----------
    mean : level, slope, bend
    covariance : of these three, of the family's curve and not of series about it
    clusters, series : how many it was learned from (for the unknown family, of all families)
    """

    mean: tuple[float, float, float]
    covariance: tuple[tuple[float, float, float], ...]
    clusters: int
    series: int


@dataclass(frozen=True, kw_only=True)
class Priors:
    """All that the family law knows before a point is measured.

    Parameters
    ----------
    settings : one each for perplexity, answer, score and recovered
    curves : scale to family (with `RECOVERED` where trained after the cut) to its prior
    data_hash : SHA-256 over the points that they were learned from
    calibration : scale to the errors of the law with such priors, each cluster predicted by priors without it
    """

    settings: Mapping[str, Settings]
    curves: Mapping[str, Mapping[str, Curve]]
    data_hash: str
    calibration: Mapping[str, Standardised] = field(default_factory=dict[str, Standardised])

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything here."""
        return digest(self.to_dict())

    def to_json(self) -> str:
        """The text of a file of priors; `read` reads it."""
        return json.dumps({"format": FORMAT, "priors": self.to_dict()}, indent=1, ensure_ascii=False) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them."""
        return {
            "settings": {name: asdict(s) for name, s in self.settings.items()},
            "curves": self._plain_curves(),
            "data_hash": self.data_hash,
            "calibration": {scale: asdict(found) for scale, found in self.calibration.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Priors:
        """What `to_dict` wrote.

        Raises
        ------
        FitError
            When something is missing.
        """

        def triple(x: Sequence[float]) -> tuple[float, float, float]:
            a, b, c = map(float, x)
            return a, b, c

        def curve(c: Mapping[str, Any]) -> Curve:
            return Curve(
                mean=triple(c["mean"]),
                covariance=tuple(triple(row) for row in c["covariance"]),
                clusters=int(c["clusters"]),
                series=int(c["series"]),
            )

        def settings(s: Mapping[str, Any]) -> Settings:
            fields: dict[str, Any] = {k: triple(v) if isinstance(v, list | tuple) else v for k, v in s.items()}  # pyright: ignore[reportUnknownArgumentType]
            return Settings(**fields)

        def calibration(c: Mapping[str, Any]) -> Standardised:
            bins = {
                name: Quantiles(
                    values=tuple(map(float, q["values"])),
                    points=int(q["points"]),
                    clusters=int(q["clusters"]),
                    reach=float(q["reach"]),
                )
                for name, q in c["bins"].items()
            }
            return Standardised(method=c["method"], bins=bins)

        try:
            return cls(
                settings={name: settings(s) for name, s in stored["settings"].items()},
                curves={
                    scale: {family: curve(c) for family, c in found.items()}
                    for scale, found in stored["curves"].items()
                },
                data_hash=str(stored["data_hash"]),
                calibration={scale: calibration(c) for scale, c in stored["calibration"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FitError(
                f"priors are a JSON file written by 'mariotte laws --learn', this is none: {error}"
            ) from error

    def _plain_curves(self) -> dict[str, Any]:
        return {scale: {f: asdict(c) for f, c in found.items()} for scale, found in self.curves.items()}

    def setting(self, scale: Scale, *, recovered: bool) -> Settings:
        """The hyper-parameters of a scale, of its recovered series where these are drawn otherwise."""
        return self.settings["recovered" if recovered and scale != "score" else scale]

    def curve(self, scale: Scale, family: str | None, *, recovered: bool) -> tuple[Curve, bool]:
        """The prior of a family's curve, and whether the family is known."""
        if recovered and scale != "score":
            return self.curves["recovered"][UNKNOWN], True
        found = self.curves[scale]
        name = known_name(family) + (RECOVERED if recovered else "")
        return (found[name], name != UNKNOWN) if name in found else (found[UNKNOWN], False)

    def series_prior(self, scale: Scale, family: str | None, *, recovered: bool) -> tuple[Array, Array]:
        """(W,) and (W, W): mean and covariance of a family's curve, without the spread of series about it."""
        curve, _ = self.curve(scale, family, recovered=recovered)
        mean_W, covariance_WW = np.zeros(N_WEIGHTS), np.zeros((N_WEIGHTS, N_WEIGHTS))
        mean_W[:N_LINE] = curve.mean
        covariance_WW[:N_LINE, :N_LINE] = curve.covariance
        return mean_W, covariance_WW


# Learning


FROZEN = Path(__file__).parent / "published" / "family.json"
"""The priors that ship: learned by `learn` from `published.points`."""


@functools.cache
def frozen() -> Priors:
    """The priors that ship with the package."""
    return read(FROZEN)


def read(path: Path) -> Priors:
    """The priors in a file that ``mariotte laws --learn`` wrote.

    Raises
    ------
    FitError
        When there is no file, or it holds something else.
    """
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FitError(f"priors are a JSON file written by 'mariotte laws --learn', {path} is none: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or "priors" not in stored:  # pyright: ignore[reportUnknownMemberType]
        raise FitError(
            f"priors of layout {FORMAT} are written by 'mariotte laws --learn', {path} has none: learn again"
        )
    return Priors.from_dict(cast("dict[str, Any]", stored)["priors"])
