"""The contract of pruning, quantization and recovery: prepared once, applied at any amount."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mariotte.architectures import Need, Shape
from mariotte.chain import Link, print_number
from mariotte.cuts.common import refuse_by_family
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.model import Done, Model
from mariotte.models.paging import pieces, read_header, write_file

MANIFEST = "manifest.json"
OF_MODEL = "model"
"""The value of ``of`` that makes an amount a share of the dense model's parameters."""

_HALVINGS = 40
"""Of the interval of amounts: finer than one parameter of any model."""


@dataclass
class Counters:
    """How often each kind of work was done: what shows that shared work is done once."""

    loads: int = 0
    dense_evaluations: int = 0
    preparations: int = 0
    applications: int = 0
    evaluations: int = 0
    trunks: int = 0
    trunk_tokens: int = 0
    decay_tokens: int = 0


def silent(stage: str, done: float) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may use besides the model that enters it.

    Parameters
    ----------
    dense : the model before anything was done to it
    scratch : folder of this preparation alone, kept across runs
    seed : every random choice is derived from it
    calibration : (n, T) token ids, or None when the run has none
    corpus : name of the corpus that calibration comes from; recoveries train on its other splits unless told otherwise
    block : tokens in a training block
    counters : the run's counters
    progress : called with a stage's name and the share done, in [0, 1]
    """

    dense: Model
    scratch: Path
    seed: int = 0
    calibration: Tensor | None = None
    corpus: str | None = None
    block: int = 64
    counters: Counters = field(default_factory=Counters)
    progress: Callable[[str, float], None] = silent

    def generator(self, *labels: object) -> torch.Generator:
        """A generator on the CPU seeded by the run's seed and `labels`, independent of every other one."""
        text = json.dumps([self.seed, *map(str, labels)])
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)

    def calibration_for(self, step: str) -> Tensor:
        """The calibration tokens, (n, T).

        Raises
        ------
        DataError
            When the run has none.
        """
        if self.calibration is None or self.calibration.numel() == 0:
            raise DataError(f"{step} needs calibration text, got none: name a corpus, such as --calibration wikitext2")
        return self.calibration


class Prepared:
    """What a step learned from one model: tensors by key and a few facts, in a folder, read when asked for.

    The manifest is written last: a folder without one is unfinished work, never a result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Prepared | None:
        """The finished preparation in `folder`, or None; a manifest that cannot be read is no manifest."""
        manifest = folder / MANIFEST
        if not manifest.is_file():
            return None
        prepared = cls(folder)
        try:
            stated = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            return None
        if not all((folder / name).is_file() for name in stated["files"]):
            return None  # somebody removed a part of it
        prepared.facts = stated["facts"]
        return prepared

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of one block or part; whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{key}.safetensors"
        write_file(tensors, temporary)
        temporary.replace(self.folder / f"{key}.safetensors")

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors stored under `key`, on the CPU.

        Raises
        ------
        DataError
            When the file is damaged.
        """
        file = self.folder / f"{key}.safetensors"
        try:
            return {name: source.read() for name, source in read_header(file).items()}
        except ModelError as error:
            raise DataError(
                f"a prepared file should hold whole tensors, and {file} is damaged ({error}): "
                f"remove the folder {self.folder} and run again"
            ) from error

    def __contains__(self, key: str) -> bool:
        return (self.folder / f"{key}.safetensors").is_file()

    def finish(self, **facts: Any) -> Prepared:
        """Write the manifest: from now on the preparation is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.facts = facts
        files = sorted(path.name for path in self.folder.glob("[!.]*.safetensors"))
        temporary = self.folder / f".{MANIFEST}"
        temporary.write_text(json.dumps({"facts": facts, "files": files}), encoding="utf-8")
        temporary.replace(self.folder / MANIFEST)
        return self


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One kind of compression or recovery; its fields are its hyperparameters.

    Subclasses are frozen keyword-only dataclasses, final, one a file. They declare:

    * ``unit``: what an amount counts: neurons, hidden, blocks, heads, groups (of both), weights, bits or tokens
    * ``family``: for the laws: unstructured, width, slice, depth, low-rank, quantization or recovery
    * ``reference``: a key of ``references.bib``
    * ``scopes``: the parts of a model that it can be asked to work on; the first is the default
    * ``needs``: what a model's family must have; see `Architecture.lacking`
    * ``version``: goes up when a correction changes numbers
    * ``mixtures``: whether it knows what to do with the MLPs of a mixture of experts
    * ``streams``: whether it works on a model larger than memory, a few blocks at a time; see `whole`
    * ``plain``: whether the result is an ordinary transformers checkpoint of the same family
    * ``fixed``: the one amount of a step that is written without any, such as ``int8``

    Parameters
    ----------
    scope : one of ``scopes``; empty takes the first
    of : what an amount is a share of. None: of the step's own unit, in the model that enters it, as the papers count;
        model: of the dense model's parameters, for steps that can say what they remove

    Raises
    ------
    ChainError
        When the step has no such scope, or cannot count its amounts so.
    """

    unit: ClassVar[str]
    family: ClassVar[str]
    reference: ClassVar[str]
    scopes: ClassVar[tuple[str, ...]] = ("all",)
    needs: ClassVar[tuple[Need, ...]] = ()
    version: ClassVar[int] = 1
    mixtures: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    plain: ClassVar[bool] = True
    fixed: ClassVar[int | None] = None

    scope: str = ""
    of: str | None = None

    def __post_init__(self) -> None:
        """Check the fields and settle the scope; subclasses with choices extend it and raise `ChainError`."""
        if not self.scope:
            # Settled here, so that a step asked for without a scope equals the one asked for with its default.
            object.__setattr__(self, "scope", self.scopes[0])
        if self.scope not in self.scopes:
            raise ChainError(f"{self.name()} has no scope {self.scope!r}; it has {', '.join(self.scopes)}")
        if self.of not in (None, OF_MODEL):
            raise ChainError(f"{self.name()}: of must be {OF_MODEL}, or left out, got {self.of!r}")
        if self.of is not None and type(self).removes is Step.removes:
            raise ChainError(f"{self.name()} removes no parameters, so that it has no amount of={OF_MODEL}")

    @classmethod
    def name(cls) -> str:
        """The step's name in a chain: that of the file that defines it."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    def link(self, amount: int | float | None = None) -> Link:
        """The step at one amount as a link of a chain: scope and fields only where they are not the defaults."""
        settings = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name != "scope"}
        return Link(
            self.name(),
            None if self.fixed is not None else amount,
            None if self.scope == self.scopes[0] else self.scope,
            {key: value for key, (value, default) in settings.items() if value is not None and value != default},
        )

    def done(
        self,
        amount: int | float,
        obtained: float,
        *,
        zeros: int = 0,
        in_scope: int = 0,
        tokens: int = 0,
        **facts: Any,
    ) -> Done:
        """What the step did at one amount, for the model's history; see `Done`."""
        return Done(
            step=str(self.link(amount)),
            name=self.name(),
            unit=self.counts,
            family=self.family,
            amount=amount,
            obtained=obtained,
            scope=self.scope,
            zeros=zeros,
            in_scope=in_scope,
            tokens=tokens,
            facts=facts,
        )

    @property
    def counts(self) -> str:
        """What an amount counts: the step's unit, or parameters of the dense model."""
        return self.unit if self.of is None else "parameters"

    @classmethod
    def check_amount(cls, name: str, amount: int | float | str | None) -> int | float:
        """The amount, checked against the step's unit: a share in [0, 1), whole tokens, or bits.

        Raises
        ------
        ChainError
            When it is missing, no number, or out of range.
        """
        if cls.fixed is not None:
            if amount is not None and amount != cls.fixed:
                came = repr(amount) if isinstance(amount, str) else print_number(amount)
                raise ChainError(f"{name} takes no amount, got {came}: write {name}")
            return cls.fixed
        example = {"tokens": "1M", "bits": "4"}.get(cls.unit, "0.3")
        if amount is None or isinstance(amount, str):
            came = "none" if amount is None else repr(amount)
            raise ChainError(f"{name} needs an amount of {cls.unit}, got {came}: write {name}@{example}")
        if cls.unit == "tokens":
            if amount < 1 or isinstance(amount, float):
                raise ChainError(f"{name}: tokens must be a whole number of at least 1, got {print_number(amount)}")
            return amount
        if cls.unit == "bits":
            if not 2 <= amount <= 16:
                raise ChainError(f"{name}: bits must be in [2, 16], got {print_number(amount)}")
            return amount
        if not 0 <= amount < 1:
            raise ChainError(f"{name}: the share of {cls.unit} to remove must be in [0, 1), got {print_number(amount)}")
        return float(amount)

    def accepted(self, amount: int | float | str | None) -> int | float:
        """The amount, checked against the step's unit and against its fields, before there is a model.

        Raises
        ------
        ChainError
            When it is missing, no number, out of range, or one that the fields rule out.
        """
        return self.check_amount(self.name(), amount)

    def refuse(self, model: Model) -> str | None:
        """Why this step cannot work on `model`, in a clause after its name, or None when it can; extend it."""
        cuts_widths = self.family in ("width", "slice")
        return refuse_by_family(model, self.needs, mixtures=self.mixtures, cuts_widths=cuts_widths, scope=self.scope)

    def refuse_device(self, device: torch.device) -> str | None:
        """Why what this step makes cannot be computed with on a device, in a clause after its name; None when it can.

        Asked before any work, of a whole chain, and by whoever runs the step; `prepare` and `apply` do not ask.
        """
        return None

    def makes_plain(self, model: Model) -> bool:
        """Whether the result on this model is an ordinary checkpoint: as ``plain``, or more often than that."""
        return self.plain

    def whole(self) -> str | None:
        """Why this step needs a model in memory as a whole, in a clause after its name; None when it streams.

        Extend it where fields ask for more than one block at a time, such as gradients through all of them.
        """
        if self.family == "recovery":
            return "trains the model, and each of its many steps goes through all blocks"
        return None if self.streams else "needs the whole model in memory"

    def refuse_streamed(self) -> None:
        """Refuse models that are streamed, before any work.

        Raises
        ------
        ChainError
            When the step needs the whole model in memory.
        """
        if reason := self.whole():
            raise ChainError(f"{self.name()} cannot be streamed: it {reason}")

    def moment(self, shape: Shape) -> int:
        """Inputs I of the largest second moment, (I, I), that this step works with; 0 without any.

        What an estimate of memory and time takes; such a step holds a few of them at once, and spends some I³ on each.
        """
        return 0

    def passes(self, shape: Shape, amount: int | float) -> float:
        """Forward passes over the calibration text, about; what an estimate of time takes."""
        return 2.0

    def reads(self, model: Model, context: Context) -> Mapping[str, str]:
        """Fingerprints of text that the step reads beside the calibration blocks; its result depends on them."""
        return {}

    def removes(self, model: Model, amount: int | float) -> int:
        """Parameters that this step takes away from `model`, or sets to zero in it, at an amount in its own unit.

        Known from shapes alone, never falling as the amount grows, negative where more is added than removed.

        Raises
        ------
        ChainError
            When the step removes none.
        """
        raise ChainError(f"{self.name()} removes no parameters")

    def slack(self, model: Model) -> int:
        """Parameters by which `removes` may be off, where what goes depends on more than shapes."""
        return 0

    def training_tokens(self, amounts: Sequence[int]) -> float:
        """Tokens seen in serving these amounts, before rounding to rows; fewer than their sum where they share some."""
        return float(sum(amounts))

    @abstractmethod
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Do, once per model, everything that no single amount needs alone; write it into ``context.scratch``.

        Called through `prepare_once`, which sees to it that the weights are finite; what comes of them need not be.

        Raises
        ------
        DataError
            When it needs calibration text and there is none or too little.
        ModelError
            When activations, gradients or losses are not finite.
        """

    @abstractmethod
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        """The model after this step at one amount, with a `Done` in its history; `model` itself stays as it was.

        Parameters
        ----------
        amount : in the step's own unit; see `apply_at` for shares of the dense model's parameters
        """

    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        """Whether a finished preparation serves these amounts; true for all that prepare for any amount."""
        return True


def own_amount(step: Step, model: Model, amount: int | float, context: Context) -> int | float:
    """An amount in the step's own unit: itself, or what removes that share of the dense model's parameters.

    Of the amounts between which the share lies, and nothing at all, the one that comes nearest; of equally near ones
    the smaller. Nothing at all is one of them because some steps add parameters before they remove any: `slice` unties
    a tied head, and a model larger than the dense one is no answer to a share that is to be removed.

    Raises
    ------
    ChainError
        When the step cannot remove so much.
    """
    if step.of is None:
        return amount
    if not amount:
        return 0.0
    wanted = amount * context.dense.counts.n_params
    below, above = 0.0, 1.0 - 2.0**-_HALVINGS
    most = step.removes(model, above)
    # Half a per cent is what rounding may leave undone at the end; more is a request that cannot be met.
    if wanted > most + 0.005 * context.dense.counts.n_params:
        raise ChainError(
            f"{step.name()} can remove at most {most / context.dense.counts.n_params:.1%} of the parameters of "
            f"{model.name}, got {amount:.1%}: ask for less, or combine methods as auto does"
        )
    if wanted >= most:
        return above
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        below, above = (middle, above) if step.removes(model, middle) < wanted else (below, middle)
    return min((0.0, below, above), key=lambda x: (abs(step.removes(model, x) - wanted), x))


def not_finite(model: Model) -> str | None:
    """What of the model is no number, in a clause after a step's name; None when all is."""
    for path, p in model.hf.named_parameters():
        # The sum of numbers is a number, unless it overflows: only then is every one of them looked at.
        if p.is_floating_point() and any(
            not math.isfinite(piece.sum()) and not piece.isfinite().all() for piece in pieces(p)
        ):
            return (
                f"needs finite weights, and of {model.name} {path} holds NaN or infinity: "
                "check its files, or compute in a wider dtype"
            )
    return None


def prepare_once(step: Step, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
    """The preparation in ``context.scratch`` if it is finished and covers `amounts`; else a new one.

    Amounts of the dense model's parameters that cannot be had are left out: `apply_at` refuses them, and the others do
    not suffer.

    Raises
    ------
    ModelError
        When weights are not finite: comparing them would rank parts of the model at random.
    """
    possible: list[int | float] = []
    for amount in amounts:
        with contextlib.suppress(ChainError):
            possible.append(own_amount(step, model, amount, context))
    if amounts and not possible:
        return Prepared(context.scratch)  # of nothing: each amount is refused in words of its own
    prepared = Prepared.open(context.scratch)
    if prepared is not None and step.covers(prepared, possible):
        return prepared
    if model.streamed:
        step.refuse_streamed()
    if reason := not_finite(model):
        raise ModelError(f"{step.name()} {reason}")
    context.counters.preparations += 1
    return step.prepare(model, context, possible)


def apply_at(step: Step, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
    """The model after a step at one amount, whatever the amount is a share of.

    Raises
    ------
    ChainError
        When the step cannot remove so much.
    """
    own = own_amount(step, model, amount, context)
    found = step.apply(model, prepared, own, context)
    if step.of is None:
        return found
    done = found.done[-1]
    removed = model.counts.n_params - found.counts.n_params + done.zeros
    history = replace(
        done,
        step=str(step.link(amount)),
        amount=amount,
        obtained=removed / context.dense.counts.n_params,
        facts={**done.facts, "own_amount": own, "own_obtained": done.obtained},
    )
    return found.rewritten(history)


__all__ = [
    "Context",
    "Counters",
    "Done",
    "Prepared",
    "Step",
    "apply_at",
    "not_finite",
    "own_amount",
    "prepare_once",
]
