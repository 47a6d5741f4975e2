"""The contract of a measure: numbers, and the protocol that is part of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from mariotte.architectures import Kind
from mariotte.errors import ChainError, ModelError
from mariotte.models.model import Model

MetricKind: TypeAlias = Literal["loss", "score", "speed", "size"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one measure found.

    Parameters
    ----------
    metrics : name to value, finite
    protocol : everything that two numbers must share to be compared
    details : plain JSON: parts, lists, standard errors
    base : the same metrics of the dense model, where they were found anew beside these; None for those found once
    """

    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    base: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ModelError(f"{name} must be a finite number, got {value}: the model computes non-finite logits")


def batch_by_batch(kind: Kind) -> str | None:
    """Why models of some kinds are not streamed through forward passes alone, as `Measure.whole`; None for causal."""
    if kind == "causal":
        return None
    return (
        f"runs {'an encoder' if kind == 'masked' else 'an encoder-decoder'} a few rows at a time through all blocks, "
        "each time reading the whole model anew: measure it where it fits into memory"
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a measurement asks of a model, counted from files without one.

    Parameters
    ----------
    items : questions or facts
    passes : rows of forward passes, each a whole prompt or a token after one, words taken for tokens
    tokens : about how many they run through the model together
    """

    items: int
    passes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Measure(ABC):
    """One way of measuring a model; its fields are its protocol.

    Parameters
    ----------
    on : what it is measured on: a corpus, a set of facts

    Notes
    -----
    Subclasses are frozen keyword-only dataclasses, final, one a file. ``metrics`` names what every
    instance finds, with its kind: a loss in nats falls as a model improves, a score is a fraction in [0, 1] that rises,
    a speed is positive and rises as more is removed, a size in bytes falls. An instance may find more, such as a score
    for each of its tasks: the desk tells the kind of a metric by its name, and ``NAME_se`` is the standard error of
    ``NAME``.
    ``version`` goes up when a correction changes numbers.
    """

    on: str

    metrics: ClassVar[Mapping[str, MetricKind]]
    version: ClassVar[int] = 1

    @property
    def tokens(self) -> int:
        """About how many tokens a measurement runs through a model, for estimates; 0 where it is not known before."""
        return 0

    @property
    def finds(self) -> Mapping[str, MetricKind] | None:
        """Every metric that this instance may find, ``metrics`` among them, without standard errors.

        None where that is not known before a model is measured; then nobody is told early of a metric that is not
        there.
        """
        return None

    def work(self, kind: Kind) -> Work | None:
        """What is asked of a model of this kind; None where that is not known before, or nothing is asked item by item.

        Files that are missing or broken are no matter of this: `check` tells of them.
        """
        del kind
        return None

    def check(self) -> None:
        """Raise what can be told to be wrong before any model is loaded, such as a corpus that is missing."""
        return

    def whole(self, kind: Kind) -> str | None:
        """Why a model of this kind must be in memory as a whole, in a clause after the measure's name.

        None where it may be streamed: all that is asked of it goes through one block before the next is read. The
        reason ends with what to do.
        """
        del kind
        return "needs the whole model in memory: measure it where it fits"

    def refuse_streamed(self, kind: Kind) -> None:
        """Refuse models of a kind that are streamed, before any work.

        Raises
        ------
        ChainError
            When the measure needs the whole model in memory.
        """
        if reason := self.whole(kind):
            raise ChainError(f"{type(self).__module__.rpartition('.')[2]} cannot be streamed: it {reason}")

    @abstractmethod
    def protocol(self, model: Model) -> dict[str, Any]:
        """What the numbers depend on besides the weights: known before anything is measured.

        Raises
        ------
        DataError
            When what it is measured on is missing, empty or too short.
        """

    @abstractmethod
    def measure(self, model: Model, dense: Measurement | None = None) -> Measurement:
        """Measure a model.

        Parameters
        ----------
        model : what to measure
        dense : the same measure of the dense model, for details such as what was lost; None for the dense model itself
        """

    def compare(self, model: Model, reference: Model, dense: Measurement) -> Measurement:
        """Measure a compressed model with the dense one at hand.

        Parameters
        ----------
        model : what to measure
        reference : the dense model; a measure whose numbers mean something only side by side, such as a time, runs it
            anew, and any other has no use for it
        dense : the same measure of the dense model
        """
        del reference
        return self.measure(model, dense)
