"""A study: one TOML file that says which chains, on which models, measured how."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mariotte import chain as chains
from mariotte.errors import MariotteError, StudyError, unknown

FORMAT = 1

MOST_SEED = 2**31 - 1
"""Largest seed: what every store and every generator holds."""

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(_Part):
    """Text that steps may look at: the calibration split of a corpus, never its test split.

    Parameters
    ----------
    corpus : a name or ``file:PATH``; also what recoveries train on, unless they name another
    rows : blocks of calibration
    block : tokens a block; None takes the corpus' own
    """

    corpus: str
    rows: int = Field(default=128, ge=1)
    block: int | None = Field(default=None, ge=2)


class Run(_Part):
    """How to run. Of a result's identity only `dtype` is a part: what is computed in another one is another number.

    Parameters
    ----------
    device : where models compute
    dtype : in which they compute; None takes float32 on a CPU, the checkpoint's own elsewhere
    threads : of torch, in each worker; None leaves torch's own choice
    runner : inline: this process; processes: `workers` of them on this machine; ray: a Ray cluster. None takes
        processes for more than one worker
    workers : processes that share the models among them; 1 works in this process. With Ray the branches that a local
        cluster does at once, where 1 stands for as many as there are processors
    cpus, gpus : of Ray, for each branch; shares are allowed. None: no GPU for a study on the CPU, else one
    ray_address : of a cluster that runs already, such as ``10.0.0.1:6379`` or ``auto``; None takes the environment's
        ``RAY_ADDRESS``, and without it a cluster of this machine alone, which ends with the run
    keep : which compressed checkpoints stay on disk: none; best: of each model and asked amount the one that the
        study's first measure likes best; all
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    threads: int | None = Field(default=None, ge=1, le=1024)
    workers: int = Field(default=1, ge=1, le=1024)
    runner: Literal["inline", "processes", "ray"] | None = None
    cpus: float = Field(default=1, gt=0, le=1024)
    gpus: float | None = Field(default=None, ge=0, le=1024)
    ray_address: str | None = None
    keep: Literal["none", "best", "all"] = "none"

    @model_validator(mode="after")
    def _an_address_is_for_ray(self) -> Self:
        if self.ray_address is not None and self.runner != "ray":
            raise ValueError(f"the address {self.ray_address!r} of a Ray cluster needs the runner ray: name it too")
        return self


class Measured(_Part):
    """A measure, and of which chains and models.

    Parameters
    ----------
    measure : such as ``speed:testbed``
    of : all: of every chain; cuts: of those without recovery, for what recovery cannot change, such as speed
    models : those of the study's models that it is for, as an encoder is asked otherwise than a decoder; None for all
    """

    measure: str
    of: Literal["all", "cuts"] = "all"
    models: list[str] | None = Field(default=None, min_length=1)


class Chains(BaseModel):
    """Chains of one pattern: every ``{word}`` in it takes each value of the list called ``word``.

    Parameters
    ----------
    chain : the pattern, such as ``{method}@{amount}``
    models : those of the study's models that they are for; None for all
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    chain: str
    models: list[str] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _placeholders_and_lists_agree(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"chain": value}
        if not isinstance(value, dict) or not isinstance(cast("dict[str, Any]", value).get("chain"), str):
            return cast(object, value)
        given = cast("dict[str, Any]", value)
        wanted = set(_PLACEHOLDER.findall(given["chain"]))
        if strange := sorted(set(given) - wanted - {"chain", "models"}):
            raise ValueError(f"unknown key {strange[0]!r}: the pattern {given['chain']!r} has no {{{strange[0]}}}")
        if absent := sorted(wanted - set(given)):
            raise ValueError(f"the pattern {given['chain']!r} asks for a list called {absent[0]!r}, and there is none")
        for name in wanted:
            if not isinstance(given[name], list) or not given[name]:
                raise ValueError(f"{name!r} must be a list with at least one value, got {given[name]!r}")
        return given

    def expanded(self) -> list[chains.Chain]:
        """The chains, in the order of the lists, the last one varying fastest."""
        names = list(dict.fromkeys(_PLACEHOLDER.findall(self.chain)))
        lists = [cast("list[object]", (self.model_extra or {})[name]) for name in names]
        return [
            chains.parse(_filled(self.chain, dict(zip(names, values, strict=True))))
            for values in itertools.product(*lists)
        ]


def _filled(pattern: str, values: Mapping[str, object]) -> str:
    def text(value: object) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return _PLACEHOLDER.sub(lambda found: text(values[found.group(1)]), pattern)


class Study(_Part):
    """What a study file says.

    Parameters
    ----------
    format : of the file; 1
    name : short; records carry it
    title, description : for the report
    follows : the paper whose design this is and whose claims the report checks, such as ``compression-laws``
    models : hub ids, folders, ``testbed/NAME``
    chains : patterns and their lists
    measures : such as ``loss:wikitext2(block=512)``, or a table that also says of which chains or models
    seeds : of calibration order, random choices and recovery
    calibration : text that steps may look at
    run : how to run
    """

    format: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    description: str = ""
    follows: str | None = None
    models: list[str] = Field(min_length=1)
    chains: list[Chains] = Field(min_length=1)
    measures: list[str | Measured] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, le=MOST_SEED)]] = Field(default=[0], min_length=1)
    calibration: Calibration | None = None
    run: Run = Run()

    @model_validator(mode="after")
    def _chains_and_measures_are_for_models_of_the_study(self) -> Self:
        for part in (*self.chains, *self.measured()):
            if strange := [name for name in part.models or [] if name not in self.models]:
                raise ValueError(str(unknown("model of this study", strange[0], self.models)))
        if left_out := [name for name in self.models if not self.measured(name)]:
            raise ValueError(
                f"nothing is measured of {left_out[0]!r}: name a measure that is for it, or for all models"
            )
        return self

    def measured(self, model: str | None = None) -> list[Measured]:
        """The measures of one model or of any, each with the chains that it is for."""
        entries = (Measured(measure=entry) if isinstance(entry, str) else entry for entry in self.measures)
        return [entry for entry in entries if model is None or entry.models is None or model in entry.models]

    def expanded(self, model: str | None = None) -> list[chains.Chain]:
        """Every chain asked for, of one model or of any, each once, in the order of the file."""
        wanted = [part for part in self.chains if model is None or part.models is None or model in part.models]
        try:
            return list(dict.fromkeys(chain for part in wanted for chain in part.expanded()))
        except MariotteError as error:
            raise StudyError(f"study {self.name!r}: {error}") from error


def _sentence(error: ValidationError, where: str) -> StudyError:
    """The first thing wrong with a study, in one sentence."""
    # A misspelt key is both unknown and missing: what was written says more than what was not.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"]]
    place = ".".join(path) or "the file"
    if problem["type"] == "extra_forbidden":
        parents = {"calibration": Calibration, "run": Run}
        known = (parents.get(path[0], Study) if len(path) > 1 else Study).model_fields
        return StudyError(f"{where}: {unknown('key', place, ['.'.join([*path[:-1], name]) for name in known])}")
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("missing", "value_error") else f", got {problem['input']!r}"
    return StudyError(f"{where}: {place}: {message[0].lower()}{message[1:]}{got}")


def parse(text: str, where: str = "study") -> Study:
    """Read the text of a study file.

    Raises
    ------
    StudyError
        When it is no TOML, has an unknown or missing key, or a newer format.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"{where} must be TOML, and cannot be read: {error}") from error
    stated = values.get("format")
    if isinstance(stated, int) and stated > FORMAT:
        raise StudyError(f"{where} has format {stated}, and this Mariotte reads up to {FORMAT}: update mariotte")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise _sentence(error, where) from error


def read(path: str | Path) -> Study:
    """Read a study file.

    Raises
    ------
    StudyError
        When there is none, or it says something that a study cannot say.
    """
    path = Path(path)
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"the study {path} cannot be read: {reason}") from error


def with_run(study: Study, **changes: object) -> Study:
    """A study that runs otherwise than its file says.

    Raises
    ------
    StudyError
        When a setting cannot be so.
    """
    try:
        return study.model_copy(update={"run": Run.model_validate({**study.run.model_dump(), **changes})})
    except ValidationError as error:
        raise _sentence(error, "run") from error


def embedded(name: str) -> Path:
    """The path of a study that comes with the package, such as ``quickstart``."""
    package = Path(__file__).resolve().parent.parent
    # In a wheel the studies lie inside the package; in a source tree beside src.
    for folder in (package / "studies", package.parent.parent / "studies"):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise StudyError(f"no study named {name!r} comes with this installation")
