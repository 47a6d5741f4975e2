"""A record: one measure of one experiment, the only thing that passes from the bench to the desk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from mariotte.errors import StoreError

FORMAT = 1
"""Number of the record layout; a store with a larger one was written by a newer Mariotte."""

TIMING_FIELDS = ("cost", "environment", "created")
"""Fields that differ between two runs of the same experiment though every result is equal."""


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN; what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of a value, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measure of one experiment.

    Parameters
    ----------
    id : fingerprint of experiment and measure together; the key in a store
    experiment : fingerprint of model, chain after defaults, and seed: what was built, whatever is measured of it
    study : name of the study that first asked for it
    model : as the user named it, such as ``testbed/qwen2-1m``
    model_type : the family, as its config calls it
    model_hash : SHA-256 over the dense model's config and weights
    chain : canonical text, ``dense`` for the model as it came; opaque to the desk
    seed : of calibration order, random choices and recovery
    method : name of the first compressing step, None for the dense model
    family : its pruning family: unstructured, width, slice, depth, low-rank, quantization
    unit : what its amount counts
    amount : as asked, in that unit
    obtained : as obtained after rounding, in that unit
    ratio : parameters removed ÷ dense parameters, tied embeddings counted once; may be negative
    sparsity : zeros ÷ weights in the scope of the step that made them, 0 when nothing was zeroed
    zeroed : zeros ÷ dense parameters
    n_params : parameters left, tied embeddings counted once
    n_params_non_embedding : the same without input embeddings and output head
    base_params : parameters of the dense model
    n_bytes : bytes of the checkpoint's tensors
    flops_per_token : forward FLOPs a token, multiply and add counted as two
    recovery : name of the recovery step, None without one
    recovery_tokens : tokens asked for
    tokens_seen : tokens seen in recovery, decay included
    measure : canonical text of the measure, such as ``loss:testbed/all(block=64)``
    protocol : everything that is part of the number: corpus hash, split, tokenizer hash, window, dtype ...
    metrics : name to value, finite; losses in nats per token, accuracies as fractions
    base : the same metrics of the dense model under the same protocol
    details : per relation, per fact ...: JSON, as the measure documents it
    steps : what each step of the chain did, in order
    cost : seconds and peak bytes by stage
    environment : versions, hardware, threads
    created : UTC, ISO 8601
    """

    id: str
    experiment: str
    study: str
    model: str
    model_type: str
    model_hash: str
    chain: str
    seed: int
    measure: str
    metrics: Mapping[str, float]
    base: Mapping[str, float]
    protocol: Mapping[str, Any]
    n_params: int
    n_params_non_embedding: int
    base_params: int
    n_bytes: int
    flops_per_token: float
    method: str | None = None
    family: str | None = None
    unit: str | None = None
    amount: float | None = None
    obtained: float | None = None
    ratio: float = 0.0
    sparsity: float = 0.0
    zeroed: float = 0.0
    recovery: str | None = None
    recovery_tokens: int = 0
    tokens_seen: int = 0
    details: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    steps: tuple[Mapping[str, Any], ...] = ()
    cost: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    environment: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    created: str = ""

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            assert math.isfinite(value), f"metric {name!r} of {self.chain!r} must be finite, got {value}"

    @property
    def removed(self) -> float:
        """Share of the dense parameters that were removed or zeroed: the horizontal axis of every report."""
        return self.ratio + self.zeroed

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values; `from_dict` reads it back equal."""
        # Not `dataclasses.asdict`, which copies every leaf of the details: ten times slower for thousands of facts.
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return cast("dict[str, Any]", json.loads(canonical_json(fields)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_dict` described.

        Raises
        ------
        StoreError
            When a field is missing, unknown, or holds what it cannot.
        """
        types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        if strange := set(values) - set(types):
            raise StoreError(
                f"a record has no field {sorted(strange)[0]!r}: it was written by another version of Mariotte"
            )
        for name, value in values.items():
            if not _fits(value, types[name]):
                raise StoreError(
                    f"a record's {name} should be {types[name]}, it is {value!r:.60}: the store is damaged"
                )
        try:
            arguments: dict[str, Any] = {**values, "steps": tuple(values.get("steps", ()))}
            return cls(**arguments)
        except TypeError as error:
            raise StoreError(f"a record lacks a field that every record has: {error}") from error

    def hash(self) -> str:
        """SHA-256 of everything in the record; stored beside it and verified when it is read."""
        return digest(self.to_dict())

    def result_hash(self) -> str:
        """SHA-256 of what the experiment found: equal for two runs with equal results.

        Left out are timings, environment, the study that happened to ask first and the name it had for the model, whose
        content `model_hash` identifies. A measure whose numbers are
        timings themselves says so with ``repeatable = False`` in its protocol; then its metrics, base and details are
        left out too.
        """
        left_out = {*TIMING_FIELDS, "study", "model"}
        if self.protocol.get("repeatable", True) is False:
            left_out |= {"metrics", "base", "details"}
        return digest({k: v for k, v in self.to_dict().items() if k not in left_out})


def _fits(value: object, type_: str) -> bool:
    """Whether a JSON value is what a field of `Record` with this annotation may hold."""
    match type_.removesuffix(" | None"):
        case _ if value is None:
            return type_.endswith(" | None")
        case "str":
            return isinstance(value, str)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        case "Mapping[str, Any]":
            return isinstance(value, dict)
        case "Mapping[str, float]":
            return isinstance(value, dict) and all(_fits(v, "float") for v in cast("dict[str, Any]", value).values())
        case "tuple[Mapping[str, Any], ...]":
            return isinstance(value, list | tuple) and all(isinstance(v, dict) for v in cast("list[Any]", value))
        case other:
            raise AssertionError(f"no check for fields of type {other}")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An experiment that did not end in a record: stored beside the records, so that a study goes on without it.

    Parameters
    ----------
    experiment, study, model, chain, seed : as in `Record`
    stage : setup (of the model and everything it is measured on), prepare or apply with their link, or measure
    error : one sentence
    traceback : the whole traceback
    created : UTC, ISO 8601
    """

    experiment: str
    study: str
    model: str
    chain: str
    seed: int
    stage: str
    error: str
    traceback: str
    created: str
