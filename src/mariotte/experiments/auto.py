"""A share of a model's parameters, spread over depth, heads, feed-forward and hidden width by a small search.

Sizes are what is kept: layers L, heads N, feed-forward neurons F, hidden width D.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor
from typing_extensions import override

from mariotte import chain as chains
from mariotte.architectures import Shape
from mariotte.chain import Chain
from mariotte.compress import METHODS
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.experiments.space import DIMENSIONS, Space, State, finer_rounding
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import OF_MODEL, Context, Counters, Prepared, Step, apply_at, prepare_once
from mariotte.store.record import digest

__all__ = ["Auto"]

PROFILE = (0.125, 0.25, 0.5, 0.75)
"""Shares of one size removed alone, all others whole: what the first guess is made from."""

ROUNDED = 5e-4
"""Share of the dense model that may be missing from what was asked for: nothing, to a tenth of a per cent."""

NEAR = 0.1
"""Distance, in shares removed, over which what a trial found corrects the estimate of its neighbours."""

HOPELESS = 1.05
"""A search ends when the best state left is thought to cost this factor more than the best that was tried."""

FAR = 2.0
"""A method alone is tried unless it is thought to cost this factor more than the best state of all."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {"ffn": {"sequential": True}}
"""What may make a method lose less at more cost: tried once sizes are known, and kept for the rest if it does."""

SEARCH_ROWS, SEARCH_TOKENS = 32, 1 << 14
"""Calibration text that a search takes unless told otherwise: so many rows, or what holds so many tokens if that is
more. On stories260K twice as much changed no choice by more than a trial's noise."""

KEPT_BYTES = 4 << 30
"""Preparations of trials that are kept for later ones, beside those of the last."""

_BATCH_TOKENS = 4096


def _with(kind: type[Step], **settings: Any) -> Step:
    """A step with those of some settings that it has a field for."""
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known})


@dataclass
class Trials:
    """Chains tried on one model: each run as it would be in earnest, on fewer rows, and scored on rows apart from them.

    Parameters
    ----------
    model : that the chains start from
    context : of the steps, with the rows that they may look at
    held_NT : rows that score
    folder : of what the steps prepare, and of the losses
    losses : mean loss of each row that scores, by chain
    """

    model: Model
    context: Context
    held_NT: Tensor
    folder: Path
    losses: dict[str, list[float]] = field(default_factory=lambda: dict[str, list[float]]())

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._store.is_file():
            self.losses = json.loads(self._store.read_text(encoding="utf-8"))

    @property
    def _store(self) -> Path:
        return self.folder / "losses.json"

    def loss(self, chain: Chain) -> float:
        """Mean loss in nats a token on the rows kept apart; infinite where the model computes nothing finite."""
        text = str(chain)
        if text not in self.losses:
            cut = execute(chain, self.model, self.context, self.folder)
            batch = max(1, _BATCH_TOKENS // self.held_NT.shape[1])
            found_N = token_nll(cut, self.held_NT, batch=batch).double().mean(1)
            self.losses[text] = found_N.nan_to_num(nan=math.inf).tolist()
            temporary = self._store.with_suffix(".part")
            temporary.write_text(json.dumps(self.losses), encoding="utf-8")
            temporary.replace(self._store)
            self.forget(chain)
        return float(np.mean(self.losses[text]))

    def worse(self, chain: Chain, than: Chain) -> tuple[float, float]:
        """How much more a chain loses than another one, nats a token, and the standard error over rows of that."""
        difference_N = np.subtract(self.losses[str(chain)], self.losses[str(than)])
        if not np.isfinite(difference_N).all() or len(difference_N) < 2:
            return self.loss(chain) - self.loss(than), 0.0
        return float(difference_N.mean()), float(difference_N.std(ddof=1) / math.sqrt(len(difference_N)))

    def forget(self, chain: Chain) -> None:
        """Remove the oldest preparations over `KEPT_BYTES`, but none of this chain's."""
        last = {_folder(self.folder, chain.links[:depth]) for depth in range(len(chain.links))}
        folders = sorted((f for f in self.folder.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)
        sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*")) for folder in folders}
        total = sum(sizes.values())
        for folder in folders:
            if total > KEPT_BYTES and not any(folder.name.startswith(kept.name) for kept in last):
                shutil.rmtree(folder)
                total -= sizes[folder]


def _folder(root: Path, before: Sequence[chains.Link], step: Step | None = None) -> Path:
    """Where a step's preparation after some links lies."""
    name = digest([str(link) for link in before])[:16]
    return root / (name if step is None else f"{name}-{digest(str(step.link()))[:16]}")


def execute(chain: Chain, model: Model, context: Context, folder: Path) -> Model:
    """The model after an ordinary chain, each step prepared on what the steps before it left.

    Parameters
    ----------
    context : its counters count none of this: to the one who asks it is one step
    folder : where preparations are kept, by what came before them
    """
    # Imported now: what a chain means is settled there, and this step is among what it may mean.
    from mariotte.experiments import identity

    for part, before in zip(
        identity.resolve(chain), itertools.accumulate(((link,) for link in chain.links), initial=()), strict=False
    ):
        own = replace(context, scratch=_folder(folder, before, part.step), counters=Counters())
        model = apply_at(part.step, model, prepare_once(part.step, model, own, [part.amount]), part.amount, own)
    return model


@dataclass(frozen=True)
class Estimate:
    """What a state probably costs, from what each dimension costs alone, corrected by what was tried.

    Parameters
    ----------
    whole : the state that keeps everything
    curves : for each dimension, sizes kept in falling order and the loss that each adds alone

    Notes
    -----
    Added losses of the dimensions are summed: what independent small errors would do. A state that was tried tells the
    logarithm of the factor by which that is wrong; others take the mean of these, weighted by exp(-(d / `NEAR`)^2 / 2)
    in their distance d, and by a little for all, so that the first trials correct everything.
    """

    whole: State
    curves: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    tried: dict[State, float] = field(default_factory=lambda: dict[State, float]())

    def alone(self, states: Sequence[State]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Sum of what each dimension costs alone, nats, (n,)."""
        kept = np.asarray(states, np.float64)
        total = np.zeros(len(states))
        for i, (sizes, costs) in enumerate(self.curves):
            # Never falling: a curve that dips from noise would draw the search into it.
            rising = np.maximum.accumulate(np.maximum(costs, 0.0))
            found = np.interp(-kept[:, i], [-size for size in sizes], rising)
            if len(sizes) > 1:  # beyond the last size that was measured as steep as before it
                slope = (rising[-1] - rising[-2]) / (sizes[-2] - sizes[-1])
                found += np.maximum(0.0, sizes[-1] - kept[:, i]) * slope
            total += found
        return total + 1e-4

    def added(self, states: Sequence[State]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The loss that states add, nats, (n,)."""
        guess = self.alone(states)
        known = [state for state, found in self.tried.items() if math.isfinite(found)]
        if not known:
            return guess
        wrong = np.log(np.maximum([self.tried[s] for s in known], 1e-4) / self.alone(known))
        whole = np.asarray(self.whole, np.float64)
        away = (np.asarray(states)[:, None] - np.asarray(known)[None]) / whole
        weight = np.exp(-np.square(away).sum(-1) / (2 * NEAR**2)) + 1e-3
        return guess * np.exp((weight * wrong).sum(1) / weight.sum(1))


@dataclass
class _Search:
    """One amount's trials.

    Parameters
    ----------
    base : loss of the model that enters, on the rows that score
    most : trials
    """

    space: Space
    trials: Trials
    base: float
    estimate: Estimate
    most: int
    steps: tuple[Step, ...] = ()
    found: list[tuple[Chain, State, float]] = field(default_factory=lambda: list[tuple[Chain, State, float]]())

    def __post_init__(self) -> None:
        self.steps = self.space.steps

    def attempt(self, state: State) -> float:
        """What a state adds to the loss, nats, by the steps in use."""
        chain = self.space.chain(state, self.steps)
        self.trials.context.progress(f"trial {len(self.found) + 1}: {chain}", len(self.found) / self.most)
        added = self.trials.loss(chain) - self.base
        self.found.append((chain, state, added))
        self.estimate.tried[state] = added
        return added

    def explore(self, states: Sequence[State], most: int) -> None:
        """Try what promises most until `most` trials were made or nothing promises more."""
        known = {state for chain, state, _ in self.found if chain == self.space.chain(state, self.steps)}
        while len(self.found) < most and (left := [state for state in states if state not in known]):
            added = self.estimate.added(left)
            best = min((added for _, _, added in self.found), default=math.inf)
            if added.min() > HOPELESS * best + 1e-3:
                break
            state = left[int(added.argmin())]
            self.attempt(state)
            known.add(state)

    def chosen(self) -> tuple[Chain, State, float]:
        """The trial that lost least, or one of fewer steps that the scoring rows cannot tell from it.

        Every step fits itself to calibration text, and fits of a thousandth of a nat do not carry over to other text:
        the one-standard-error rule of model selection, on differences paired by row.
        """
        best = min(self.found, key=lambda found: found[2])

        def as_good(found: tuple[Chain, State, float]) -> bool:
            worse, error = self.trials.worse(found[0], best[0])
            return worse <= error

        return min(filter(as_good, self.found), key=lambda found: (len(found[0].links), found[2]))

    def settle(self) -> None:
        """Try `SETTINGS` where sizes are best, and use those that lose less from now on."""
        for i, step in enumerate(self.space.steps):
            cut = [found for found in self.found if found[1][i] < self.space.whole[i] and math.isfinite(found[2])]
            if step.name() not in SETTINGS or not cut or len(self.found) >= self.most:
                continue
            _, state, before = min(cut, key=lambda found: found[2])
            usual, tried = self.steps, dict(self.estimate.tried)
            self.steps = (*usual[:i], replace(step, **SETTINGS[step.name()]), *usual[i + 1 :])
            after = self.attempt(state)
            if after >= before:
                self.steps = usual
                self.estimate.tried[state] = before
                continue
            # Where the step is used, it is likely to lose less by the same factor.
            factor = max(after, 1e-4) / max(before, 1e-4)
            for other, added in tried.items():
                self.estimate.tried[other] = added * (factor if other[i] < self.space.whole[i] else 1.0)


@dataclass(frozen=True, kw_only=True)
class Auto(Step):
    """Remove a share of the dense model's parameters, spread over depth, heads, feed-forward and hidden width.

    Parameters
    ----------
    over : names of the methods that may be combined, joined by +; those that refuse the model are left out
    search : chains tried for one amount, at most
    held : share of the rows of a search that score its trials, and that the trials' steps do not see
    rows : calibration rows used in the search; None takes 32, or what holds 16k tokens if that is more. The chain
        found is carried out with all rows
    round_to : multiple to which the methods round widths; None takes theirs, or as much less as it takes for one step
        of the feed-forward width to be at most a hundredth of the model, which matters in very small ones

    Raises
    ------
    ChainError
        When `over` names none of these methods, `search` is below 1, or `held` is not between 0 and 1.

    Notes
    -----
    The result is what an ordinary chain makes of the model, depth first, then heads, feed-forward and hidden width. The
    facts of the step hold it as ``chain``; that chain given instead gives the same weights to the bit. At least the
    share asked for is removed, and no more than the coarseness of the widths asks for.

    The search measures what each dimension costs alone at a few sizes (`PROFILE`), adds these costs up for every state
    with enough parameters removed, and tries the most promising one: the chain's steps, prepared one after the other on
    a part of the calibration rows, and the loss on the others. What a trial finds corrects the estimate in its
    neighbourhood, which makes the search an exchange between dimensions at constant parameters. Each method alone is
    among the trials where it can remove enough and what it costs alone is no more than twice the best guess (`FAR`), so
    that no single one is better on the rows that score. Half-way, or when nothing else promises more, the best state is
    tried with settings that cost more (`SETTINGS`: feed-forward neurons chosen block by block), and the rest of the
    search uses them if they lose less. In the end a chain of fewer steps is taken if it loses no more than the best one
    and a standard error of their difference.

    Cost: a trial prepares its steps on the model cut so far, and scores the rows held; preparations are kept for chains
    that begin alike. What each dimension costs alone is measured once for all amounts.

    References
    ----------
    [muralidharan2024compact]_ for combining depth, heads and widths at a given number of parameters.
    """

    unit: ClassVar[str] = "parameters"
    family: ClassVar[str] = "mixed"
    reference: ClassVar[str] = "muralidharan2024compact"
    streams: ClassVar[bool] = True
    version: ClassVar[int] = 2  # of chains that score alike, the one of fewer steps

    over: str = "+".join(DIMENSIONS)
    search: int = 32
    held: float = 0.25
    rows: int | None = None
    round_to: int | None = None

    @override
    def moment(self, shape: Shape) -> int:
        return max(shape.ffn, shape.hidden, shape.heads * shape.head_dim)

    @override
    def passes(self, shape: Shape, amount: int | float) -> float:
        # Every trial prepares about three steps on most rows, and scores the others; profiles are trials of one step.
        return 6.0 * self.search + 3.0 * len(PROFILE) * len(self.over.split("+"))

    @override
    def __post_init__(self) -> None:
        if self.of == OF_MODEL:
            object.__setattr__(self, "of", None)  # what its amounts are anyway
        super().__post_init__()
        names = self.over.split("+")
        if not set(names) <= set(DIMENSIONS):
            raise ChainError(f"auto: over must be some of {'+'.join(DIMENSIONS)}, got {self.over!r}")
        # One spelling: the order of the chain.
        object.__setattr__(self, "over", "+".join(name for name in DIMENSIONS if name in names))
        if self.search < 1:
            raise ChainError(f"auto: search must be at least 1 trial, got {self.search}")
        if not 0 < self.held < 1:
            raise ChainError(f"auto: held must be a share of the calibration rows in (0, 1), got {self.held}")
        if self.rows is not None and self.rows < 2:
            raise ChainError(f"auto: rows must be at least 2, some to look at and some to score, got {self.rows}")
        if self.round_to is not None and self.round_to < 1:
            raise ChainError(f"auto: round_to must be a positive number, got {self.round_to}")

    def _steps(self, model: Model) -> list[Step]:
        round_to = self.round_to or finer_rounding(model)
        return [_with(cast("type[Step]", METHODS.find(name)), round_to=round_to) for name in self.over.split("+")]

    @override
    def refuse(self, model: Model) -> str | None:
        reasons = {step.name(): step.refuse(model) for step in self._steps(model)}
        if None in reasons.values():
            return None
        return "; ".join(f"{name} {reason}" for name, reason in reasons.items())

    @override
    def reads(self, model: Model, context: Context) -> Mapping[str, str]:
        """The versions of the methods: a correction of one is another result here, as another text would be."""
        kinds = {name: cast("type[Step]", METHODS.find(name)) for name in self.over.split("+")}
        return {f"version of {name}": str(kind.version) for name, kind in kinds.items()}

    def _space(self, model: Model) -> Space:
        return Space(model, tuple(step for step in self._steps(model) if step.refuse(model) is None))

    def _trials(self, model: Model, context: Context) -> Trials:
        tokens_NT = context.calibration_for(self.name())
        tokens_NT = tokens_NT[: self.rows or max(SEARCH_ROWS, SEARCH_TOKENS // tokens_NT.shape[1])]
        if len(tokens_NT) < 2:
            raise DataError(
                f"auto needs at least 2 rows of calibration text, some to look at and some to score, got "
                f"{len(tokens_NT)}: give it more rows, or shorter ones"
            )
        if tokens_NT.shape[1] < 2:
            raise DataError(
                f"auto needs rows of at least 2 tokens of calibration text, got {tokens_NT.shape[1]}: the first is "
                "predicted from nothing, so give it longer rows"
            )
        count = min(max(1, round(self.held * len(tokens_NT))), len(tokens_NT) - 1)
        # Spread over the text: its end may be of another kind than its beginning.
        held = {(2 * i + 1) * len(tokens_NT) // (2 * count) for i in range(count)}
        seen = [row for row in range(len(tokens_NT)) if row not in held]
        return Trials(
            model, replace(context, calibration=tokens_NT[seen]), tokens_NT[sorted(held)], context.scratch / "trials"
        )

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        space, trials = self._space(model), self._trials(model, context)
        base = trials.loss(Chain())
        if not math.isfinite(base):
            raise ModelError(
                f"auto compares losses, and that of {model.name} on the rows that score is not finite: check the "
                "checkpoint, or compute in a wider dtype"
            )
        profile: dict[str, list[list[float]]] = {}
        for i, step in enumerate(space.steps):
            sizes = space.sizes(i, space.whole)
            size = sizes[0]
            chosen = [min(sizes, key=lambda kept: (abs(1 - kept / size - share), kept)) for share in PROFILE]
            profile[step.name()] = [[size, 0.0]]
            for kept in sorted({*chosen} - {size}, reverse=True):
                state = (*space.whole[:i], kept, *space.whole[i + 1 :])
                profile[step.name()].append([kept, trials.loss(space.chain(state)) - base])
            context.progress("each dimension alone", (i + 1) / len(space.steps))
        return Prepared(context.scratch).finish(loss=base, profile=profile)

    @override
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        if not amount:
            return model.copy().after(self.done(amount, 0.0, chain=str(Chain()), steps=[]))
        found = self._found(model, prepared, amount, context)
        chain = chains.parse(found["chain"])
        # Next to nothing may be the chain of no steps; its result is still a model of its own.
        cut = execute(chain, model, context, context.scratch / "chain") if chain.links else model.copy()
        steps = [asdict(done) for done in cut.done[len(model.done) :]]
        removed = (model.counts.n_params - cut.counts.n_params) / context.dense.counts.n_params
        whole = Model(
            cut.hf,
            cut.tokenizer,
            name=cut.name,
            fingerprint=cut.fingerprint,
            stored_dtype=cut.stored_dtype,
            done=model.done,
        )
        return whole.after(self.done(amount, removed, **found, steps=steps))

    def _found(self, model: Model, prepared: Prepared, amount: float, context: Context) -> dict[str, Any]:
        """The chain found for an amount and what is known of the search, from the folder if it was searched before."""
        file = context.scratch / f"found-{amount!r}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        found = self._search(model, prepared, amount, context)
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.replace(file)
        return found

    def _search(self, model: Model, prepared: Prepared, amount: float, context: Context) -> dict[str, Any]:
        space, trials = self._space(model), self._trials(model, context)
        dense = context.dense.counts.n_params
        states = space.states((amount - ROUNDED) * dense)
        if not states:
            least = tuple(space.sizes(i, space.whole)[-1] for i in range(len(space.steps)))
            raise ChainError(
                f"auto can remove at most {space.removed(least) / dense:.1%} of the parameters of {model.name} over "
                f"{self.over}, got {amount:.1%}: ask for less"
            )
        base = cast(float, prepared.facts["loss"])
        profile = cast("dict[str, list[tuple[int, float]]]", prepared.facts["profile"])
        curves = [tuple(zip(*profile[step.name()], strict=True)) for step in space.steps]
        search = _Search(space, trials, base, Estimate(space.whole, cast(Any, tuple(curves))), self.search)
        guess = dict(zip(states, search.estimate.alone(states).tolist(), strict=True))
        alone = [state for state in states if sum(map(operator.ne, state, space.whole)) == 1]
        for state in sorted(alone, key=guess.__getitem__)[: -(-self.search // 2)]:
            if guess[state] <= FAR * min(guess.values()):
                search.attempt(state)
        search.explore(states, self.search // 2)
        search.settle()
        search.explore(states, self.search)
        trials.forget(Chain())
        chain, best, loss = search.chosen()
        return {
            "chain": str(chain),
            "sizes": {
                DIMENSIONS[step.name()]: [size, kept]
                for step, size, kept in zip(space.steps, space.whole, best, strict=True)
            },
            "trials": len(search.found),
            "held_rows": len(trials.held_NT),
            "held_loss": [base, base + loss],
        }
