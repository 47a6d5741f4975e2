"""From what was written to what is meant: classes found, values coerced, defaults filled in, fingerprints taken."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from mariotte.chain import Chain, Link, Value, parse_link
from mariotte.compress import METHODS
from mariotte.errors import ChainError, unknown
from mariotte.evaluate import MEASURES
from mariotte.evaluate.base import Measure
from mariotte.experiments.auto import Auto
from mariotte.models.model import Model
from mariotte.models.step import Step
from mariotte.recover import RECOVERIES
from mariotte.store.record import digest

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One link with its class found and its fields settled.

    Parameters
    ----------
    step : the step
    amount : checked against the step's unit
    """

    step: Step
    amount: int | float

    @property
    def link(self) -> Link:
        """The canonical link: what equals a default is left out."""
        return self.step.link(self.amount)

    @property
    def recovers(self) -> bool:
        """Whether this is a recovery rather than a compression."""
        return self.step.family == "recovery"


def _coerced(owner: str, name: str, value: Value, hint: Any) -> Value:
    """`value` in the type of its field, so that 0 and 0.0 give one fingerprint."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in options:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind is str and not isinstance(value, bool):
            return str(value)
    expected = " or ".join(kind.__name__ for kind in options if kind is not types.NoneType)
    raise ChainError(f"{owner}: field {name!r} must be {expected}, got {value!r}")


def settle(kind: type[T], owner: str, given: Mapping[str, Value], **fixed: object) -> T:
    """Build a step or a measure from fields as written.

    Raises
    ------
    ChainError
        For a field that does not exist, or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(cast(Any, kind)) if f.name not in ("scope", "on")]
    values: dict[str, object] = {}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ChainError(f"{owner} has no field {name!r}{hint} (it has: {', '.join(known) or 'none'})")
        values[name] = _coerced(owner, name, value, hints[name])
    return kind(**values, **fixed)


def step_names() -> list[str]:
    """Every name that a link may have: compression methods, the search over them, recoveries."""
    return [*METHODS.names(), Auto.name(), *RECOVERIES.names()]


def find_step(name: str) -> type[Step]:
    """The class of the method or recovery called `name`.

    Raises
    ------
    UnknownNameError
        When there is none.
    """
    if name == Auto.name():
        return Auto
    catalogue = next((c for c in (METHODS, RECOVERIES) if name in c), None)
    if catalogue is None:
        raise unknown("method", name, step_names())
    return cast("type[Step]", catalogue.find(name))


def resolve_link(link: Link) -> Part:
    """The step that a link of a chain means.

    Raises
    ------
    UnknownNameError
        When no method or recovery has this name.
    ChainError
        When its amount, scope or fields are not the step's.
    """
    kind = find_step(link.name)
    step = settle(kind, link.name, link.fields, scope=link.scope or "")
    return Part(step, step.accepted(link.amount))


def resolve(chain: Chain) -> tuple[Part, ...]:
    """The steps that a chain means."""
    return tuple(resolve_link(link) for link in chain.links)


def resolve_measure(text: str) -> Measure:
    """The measure that a text such as ``loss:wikitext2(block=512)`` means.

    Raises
    ------
    UnknownNameError, ChainError
        When there is no such measure, or its fields are not these.
    """
    try:
        link = parse_link(text)
    except ChainError as error:
        raise ChainError(f"a measure is written NAME:WHAT(field=value), such as loss:wikitext2: {error}") from error
    kind = cast("type[Measure]", MEASURES.find(link.name))
    if link.amount is not None:
        raise ChainError(
            f"the measure {link.name} takes no amount, got @{link.amount}: write {link.name}:WHAT(field=value)"
        )
    if not link.scope and not hasattr(kind, "on"):  # the class has a default that its instances start with
        raise ChainError(f"the measure {link.name} must say what it is measured on: write {link.name}:WHAT")
    return settle(kind, link.name, link.fields, **({"on": link.scope} if link.scope else {}))


def measure_name(measure: Measure) -> str:
    """The name of a measure's kind, such as ``loss``."""
    return type(measure).__module__.rpartition(".")[2].replace("_", "-")


def measure_text(measure: Measure) -> str:
    """The canonical text of a measure."""
    given = {
        f.name: getattr(measure, f.name)
        for f in dataclasses.fields(measure)
        if f.name != "on" and getattr(measure, f.name) is not None and getattr(measure, f.name) != f.default
    }
    return str(Link(measure_name(measure), None, measure.on, given))


def step_identity(step: Step, reads: Mapping[str, str]) -> dict[str, Any]:
    """Everything about a step but its amount that its result depends on; fields that are None are left out.

    Parameters
    ----------
    reads : what ``step.reads`` says of text that it reads
    """
    values = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    fields = {name: value for name, value in values.items() if value is not None}
    return {"name": step.name(), "version": step.version, "fields": fields, "reads": dict(reads)}


def experiment_id(
    model: Model, parts: Sequence[Part], seed: int, calibration: str | None, reads: Sequence[Mapping[str, str]]
) -> str:
    """Fingerprint of what is built: model, steps with amounts and versions, seed, text, computing dtype.

    Parameters
    ----------
    reads : of each part, what ``step.reads`` says of text that it reads
    calibration : SHA-256 of the calibration tokens, None without
    """
    if not parts:  # the dense model is one thing, whatever seed or calibration a study has
        return digest({"model": model.fingerprint, "dtype": str(model.hf.dtype)})
    return digest(
        {
            "model": model.fingerprint,
            "dtype": str(model.hf.dtype),
            "steps": [
                {**step_identity(part.step, text), "amount": part.amount}
                for part, text in zip(parts, reads, strict=True)
            ],
            "seed": seed,
            "calibration": calibration,
        }
    )


def record_id(experiment: str, measure: Measure, protocol: Mapping[str, Any]) -> str:
    """Fingerprint of one measure of one experiment: the key of its record."""
    return digest([experiment, measure_text(measure), measure.version, dict(protocol)])
