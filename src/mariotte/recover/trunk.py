"""What recoveries by training share: one trunk for every D, branches that decay, text in order.

Shapes: B rows of a batch, T tokens of a row, N rows of the validation split.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from mariotte.chain import AUTO, Link, print_number
from mariotte.data import tokens
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.gains import STOPPING
from mariotte.models.model import Model
from mariotte.models.nll import token_nll
from mariotte.models.step import Context, Prepared, Step, not_finite
from mariotte.recover import stopping
from mariotte.recover.learner import Learner
from mariotte.recover.losses import Loss, judged, mean_loss, text_loss
from mariotte.recover.states import BEST, LATEST, forget, settle, snapshot, step_of
from mariotte.recover.stopping import Levels
from mariotte.recover.stream import Course, Source, Stream, course, find_source
from mariotte.training.loop import DivergedError, Progress, TrainState, train
from mariotte.training.schedule import ConstantThenLinear

_FORMAT = 2
"""Of the folder of a trunk; goes up when states of an older one can no longer be read."""

_SAVE_SECONDS = 30.0
"""A killed run loses at most this much; chosen by us: a save of the 8B models' adapters takes about a second."""

_LOOKS = 4
"""How often `keep_best` looks during the decay, its end included."""


@dataclass(frozen=True, kw_only=True)
class Recovery(Step):
    """A recovery that trains on text; a subclass says what trains and which loss is lowered.

    Parameters
    ----------
    lr : learning rate of the trunk; None takes the recovery's own, which falls with the width of the model
    batch : rows of a step
    block : tokens of a row; None takes the run's
    warmup : steps over which the learning rate rises, the same for every D
    corpus : trained on, its training split; None takes the run's
    trunk : false trains every D by itself from the beginning, its learning rate falling linearly over all of its
        steps, as published studies of recovery do; nothing is then shared between D
    keep_best : true keeps the state with the lowest loss on the validation split, of the model as it came, the point
        where the decay begins and four points of the decay; studies of recovery leave it off
    repeats : true allows D beyond the training text, which then repeats, shuffled anew
    gain : with the amount auto, the share of the held-out loss: a doubling that is unlikely to bring so much ends it
    most : with the amount auto, tokens that it may see at most; None takes 1M

    Notes
    -----
    One trunk serves every D. It is trained at a constant learning rate; the run of D tokens leaves it at the last
    whole batch within 0.9·D, with parameters, optimizer and position, and lowers the learning rate linearly to zero
    over the rest. So the tokens of a smaller D are the first ones of a larger D, and the result at one D is the same
    bits whatever other D were asked for, in which order, and however often the work was interrupted (on one machine
    with one number of threads). D counts every token seen, decay included, rounded down to whole rows; the last batch
    holds the rows that are left.

    With the amount auto, D is doubled from 15 batches or a little more (4k tokens with four rows of 64) until it is
    unlikely (one in ten) that the next doubling takes `gain` of the loss on 64 rows of the validation split off it, or
    `most` or the end of the training text is reached, or training no longer gives numbers. The loss, not the damage
    that remains, is what the gain is a share of: a model recovered on the text that it is scored on can end below the
    dense one. What is likely goes by the last doubling and by how gains of doublings follow one another, learned from
    the testbed (`mariotte.gains`); it is asked from the second amount on. The result is that of the amount with the
    lowest loss, to the bit what the recovery gives when asked for this amount; the record says it as its tokens, and
    its facts all losses, what was expected, and why it ended (``stopped``).

    A loss or a gradient that is no number ends the trunk: the D that left it before are served, the others fail.

    Every result is compared with the model that came in, on a few rows of the validation split, and the facts say so
    in words (``warning``) when recovery did harm.
    """

    unit: ClassVar[str] = "tokens"
    family: ClassVar[str] = "recovery"

    lr: float | None = None
    batch: int = 4
    block: int | None = None
    warmup: int = 2
    corpus: str | None = None
    # None where off, or on by default: a field that is left out leaves the ids of records as they were.
    trunk: bool | None = None
    keep_best: bool | None = None
    repeats: bool | None = None
    gain: float | None = None
    most: int | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name, default in (("trunk", True), ("keep_best", False), ("repeats", False)):
            if getattr(self, name) == default:
                object.__setattr__(self, name, None)
        who = self.name()
        for name, least in (("batch", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ChainError(f"{who}: {name} must be at least {least}, got {getattr(self, name)}")
        if self.block is not None and self.block < 2:
            raise ChainError(f"{who}: block must be at least 2 tokens, got {self.block}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ChainError(f"{who}: lr must be positive, got {self.lr}")
        if self.gain is not None and not 0 < self.gain < 1:
            raise ChainError(f"{who}: gain must be a share of the loss in (0, 1), such as 1%, got {self.gain}")
        if self.most is not None and self.gain is None:
            raise ChainError(f"{who}: most goes with a gain, got none: write {who}@auto(gain=1%, most=...)")
        if self.most is not None and self.most < 1:
            raise ChainError(f"{who}: most must be at least 1 token, got {self.most}")

    # -- what a recovery says of itself -------------------------------------------------------------------------------

    @abstractmethod
    def rate(self, model: Model) -> float:
        """The learning rate of the trunk when none is asked for."""

    @abstractmethod
    def learner(self, model: Model, context: Context) -> Learner:
        """What trains: fresh, equal to the model, the same for the same seed."""

    def loss(self, model: Model, context: Context) -> Loss:
        """What training lowers: the cross entropy of the text, unless a recovery says otherwise."""
        return text_loss

    def settings(self) -> Mapping[str, Any]:
        """What the facts say of its fields, beside the learning rate."""
        return {}

    # -- the contract of a step ---------------------------------------------------------------------------------------

    @override
    def accepted(self, amount: int | float | str | None) -> int | float:
        """The amount; of a recovery that chooses it, what it may be at most."""
        who = self.name()
        if amount == AUTO:
            if self.gain is None:
                raise ChainError(f"{who}@auto needs the gain under which it stops, got none: write {who}@auto(gain=1%)")
            return self.most or stopping.MOST
        if self.gain is not None:
            came = "none" if amount is None else amount if isinstance(amount, str) else print_number(amount)
            raise ChainError(f"{who} with a gain chooses its amount, got {came}: write {who}@auto, or leave gain out")
        return super().accepted(amount)

    @override
    def link(self, amount: int | float | None = None) -> Link:
        link = super().link(amount)
        return link if self.gain is None else dataclasses.replace(link, amount=AUTO)

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        amounts = self._trunk_amounts(amounts, prepared.facts["run"]["block"])
        missing = self._missing(prepared.folder, amounts, prepared.facts["run"]["block"], prepared.facts["rows_held"])
        broken = prepared.facts["broken"]
        return all(broken is not None and leave > broken["step"] for leave in missing)

    @override
    def reads(self, model: Model, context: Context) -> Mapping[str, str]:
        """The training text, the tokenizer that reads it and the length of its rows.

        Raises
        ------
        DataError
            When there is no text to train on, or no tokenizer to read it with.
        """
        source = self._source(model, context)
        found = {
            "text": source.text,
            "tokenizer": source.tokenizer_sha256,
            "block": str(self._block(context)),
        }
        if self.keep_best or self.gain is not None:
            found["held_out"] = source.corpus.fingerprint("valid")
        if self.gain is not None:
            found["law"] = json.dumps(dataclasses.asdict(STOPPING), sort_keys=True)
        return found

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Train the trunk as far as the largest amount needs it, keeping its state where each amount leaves it.

        A trunk whose loss is no number any more is kept as far as it came.

        Raises
        ------
        ModelError
            When the model cannot be trained so.
        DataError
            When there is no text to train on, or no tokenizer to read it with, or a row is longer than the model's
            positions.
        """
        if reason := self.refuse(model) or not_finite(model):
            raise ModelError(f"{self.name()} {reason}")
        run = self._run(model, context)
        self.loss(model, context)  # what it refuses is refused before anything is written
        folder = context.scratch
        settle(folder, run)
        block: int = run["block"]
        amounts = self._trunk_amounts(amounts, block)
        # Read as far as the last branch will go, once, rather than again when it does.
        rows = max(1, int(max(amounts, default=0)) // block)
        stream = self._stream(model, context, rows)
        held = len(stream.tokens_NT) if len(stream.tokens_NT) < rows else None
        leaves = self._missing(folder, amounts, block, held)
        broken: dict[str, Any] | None = None
        try:
            if leaves:
                self._grow(model, context, stream, leaves)
        except DivergedError as error:
            broken = {"step": error.step, "said": str(error)}
        else:
            forget(folder / LATEST)  # also what a killed run left half removed
        return Prepared(folder).finish(run=run, rows_held=held, broken=broken)

    @override
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        """The model after `amount` tokens, what was learned merged into its weights.

        The facts of its `Done`: rows seen, passes begun over the text (`epochs`), the loss of the first batch before
        any training, the mean loss over the decay (each batch before it was learned), how many weights were held
        at zero, and the loss on rows of the validation split before and after, with a `warning` where it rose.

        Raises
        ------
        ChainError
            When the amount is less than one row.
        DataError
            When the text or the settings are not those that the trunk was trained with, or the text is shorter than
            the amount and `repeats` does not allow that.
        DivergedError
            When the loss stopped being a number before this amount was reached, or what was reached computes none.
        """
        if self.gain is not None:
            return self._until(self.gain, int(amount), model, dataclasses.replace(context, scratch=prepared.folder))
        run = self._run(model, context)
        block: int = run["block"]
        plan = self._course(amount, block)
        if prepared.facts["run"] != run:
            changed = sorted(key for key in run if run[key] != prepared.facts["run"].get(key))
            raise DataError(
                f"the trunk in {prepared.folder} was trained with another {' and '.join(changed)}: remove that folder "
                "and run again"
            )
        stream = self._stream(model, context, plan.rows)
        if plan.rows > (held := len(stream.tokens_NT)) and not self.repeats:
            raise DataError(
                f"{self.name()}@{print_number(amount)} asks for {plan.rows:,} rows of {block} tokens, and the training "
                f"split of {run['corpus']} holds {held:,}: ask for at most {held * block} tokens, or allow "
                f"{self.name()}@{print_number(amount)}(repeats=true)"
            )
        broken = prepared.facts["broken"]
        if broken is not None and plan.leave > broken["step"]:
            raise DivergedError(broken["said"], broken["step"])
        learner, state = self._state(model, context)
        loss = self.loss(model, context)
        with torch.no_grad():
            loss_begin = loss(state.module, stream.rows(0, min(self.batch, plan.rows)).to(model.device)).item()
        held_out = self._held_out(model, context, plan)
        best = self._branch(model, context, prepared, plan, stream, state, held_out)
        decay_tokens = (plan.rows - plan.leave * self.batch) * block
        assert state.tokens == plan.rows * block, f"{state.tokens} tokens seen, {plan.rows} rows of {block} planned"
        facts: dict[str, Any] = {
            "corpus": run["corpus"],
            "rows": plan.rows,
            "block": block,
            "steps": plan.steps,
            "decay_tokens": decay_tokens,
            "epochs": -(-plan.rows // len(stream.tokens_NT)),
            **self.settings(),
            "lr": run["lr"],
            "loss_begin": loss_begin,
            "loss_end": state.notes["loss_sum"] / state.notes["loss_steps"],
        }
        if best is not None:
            state.load(self._branch_folder(prepared, plan) / BEST)
            facts["kept"] = best
        if state.parted:  # what was learned is put together in a twin that is whole
            learned = state.values()
            learner, state = self._state(model, context)
            for name, p in state.trained.items():
                p.data.copy_(learned[name])
        recovered = model.copy()
        facts["mask_reapplied"] = learner.write_(recovered)
        facts |= judged(model, recovered, held_out)
        forget(self._branch_folder(prepared, plan))
        # The loss of a step is that before it: what the last one did shows only here.
        after = facts.get("valid_after")
        if after is None:
            after = token_nll(recovered, stream.rows(0, 1)).mean().item()
        if not math.isfinite(after):
            said = f"the loss is {after} after the last step of training; lower the learning rates"
            raise DivergedError(said, plan.steps)
        seen = plan.rows * block
        return recovered.after(self.done(amount, seen, tokens=seen, **facts))

    # -- an amount of its own choice ----------------------------------------------------------------------------------

    def _trunk_amounts(self, amounts: Sequence[int | float], block: int) -> Sequence[int | float]:
        """The amounts that the trunk must serve before any result is known."""
        if self.gain is None:
            return amounts
        return [min(amount, stopping.first_amount(self.batch, block)) for amount in amounts]

    def _until(self, gain: float, most: int, model: Model, context: Context) -> Model:
        """The model after doublings of the amount, until the next is unlikely to bring `gain`.

        Raises
        ------
        DataError
            When there is no validation split to decide by.
        DivergedError
            When the loss is no number already at the first amount.
        """
        plain = dataclasses.replace(self, gain=None, most=None)
        source, block = self._source(model, context), self._block(context)
        try:
            held_NT = source.held_out(block, stopping.HELD_ROWS)
        except DataError as error:
            raise DataError(f"{self.name()}@auto needs a validation split to decide by: {error}") from error
        levels = Levels.open(context.scratch, source.corpus.fingerprint("valid"))
        if 0 not in levels.loss:
            levels.add(0, token_nll(model, held_NT).double().mean().item())
        seen: dict[int, float] = {0: levels.loss[0]}
        expected: dict[str, float] = {}
        possible: dict[str, float] = {}
        result: tuple[int, Model] | None = None
        while True:
            last = max(seen)
            if (found := stopping.expected_gain(seen)) is not None:
                expected[str(2 * last)], possible[str(2 * last)] = found
                if possible[str(2 * last)] < gain:
                    stopped = "gain"
                    break
            following = min(most, 2 * last or stopping.first_amount(self.batch, block))
            if not self.repeats:
                rows = max(1, following // block)
                following = min(following, len(self._stream(model, context, rows).tokens_NT) * block)
            if last and following // block <= last // block:
                stopped = "most" if most // block <= last // block else "text"
                break
            if following not in levels.loss:
                try:
                    recovered = plain.apply(model, plain.prepare(model, context, [following]), following, context)
                except DivergedError:
                    if not last:
                        raise
                    stopped = "diverged"
                    break
                levels.add(following, token_nll(recovered, held_NT).double().mean().item())
                result = (following, recovered)
            seen[following] = levels.loss[following]
        best = min((amount for amount in seen if amount), key=lambda amount: (seen[amount], amount))
        if result is None or result[0] != best:
            result = (best, plain.apply(model, plain.prepare(model, context, [best]), best, context))
        done = result[1].done[-1]
        facts = {
            "chain": done.step,
            "gain": gain,
            "stopped": stopped,
            "law": dataclasses.asdict(STOPPING),
            "held_rows": len(held_NT),
            "held_loss": {str(amount): loss for amount, loss in seen.items()},
            "expected_gain": expected,
            "possible_gain": possible,
        }
        return result[1].rewritten(dataclasses.replace(done, step=str(self.link(most)), facts={**done.facts, **facts}))

    # -- the trunk and its branches -----------------------------------------------------------------------------------

    def _grow(self, model: Model, context: Context, stream: Stream, leaves: Sequence[int]) -> None:
        """Train the trunk from the furthest state that is kept, and keep its state at each of `leaves`."""
        folder = context.scratch
        _, state = self._state(model, context)
        loss = self.loss(model, context)
        before = saved = 0.0

        def watch(progress: Progress) -> None:
            nonlocal saved, before
            context.counters.trunk_tokens += progress.tokens - int(before)
            before = progress.tokens
            if state.agreed(time.monotonic() - saved >= _SAVE_SECONDS) and progress.step not in leaves:
                state.save(folder / LATEST)
                saved = time.monotonic()
            context.progress(f"{self.name()} trunk", progress.step / leaves[-1])

        batches = self._batches(stream, leaves[-1] * self.batch)
        began = False
        for leave in leaves:
            kept = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None and step <= leave]
            furthest, path = max(kept, default=(0, None))
            if path is not None and furthest > state.step:
                state.load(path)
            elif not began and furthest == 0:
                context.counters.trunks += 1
            began = True
            before, saved = state.tokens, time.monotonic()
            rising = ConstantThenLinear(steps=leave, warmup=self.warmup)
            try:
                train(state, batches, schedule=rising, until=leave, loss=loss, watch=watch)
            except DivergedError:
                state.save(folder / LATEST)  # the last good one; asked for again, it fails at once
                raise
            state.save(snapshot(folder, leave))

    def _branch(
        self,
        model: Model,
        context: Context,
        prepared: Prepared,
        plan: Course,
        stream: Stream,
        state: TrainState,
        held_out: Tensor | str,
    ) -> dict[str, Any] | None:
        """Train `state`, fresh, to the end of a run; what was kept and why when the best state is asked for."""
        folder = self._branch_folder(prepared, plan)
        looks = {plan.leave + -(-plan.decay * i // _LOOKS) for i in range(_LOOKS + 1)} | {0}
        if not self.keep_best:
            looks = set[int]()
        elif isinstance(held_out, str):
            raise DataError(f"{self.name()}: keep_best needs a validation split: {held_out}")

        def look() -> None:
            found: dict[str, float] = state.notes.setdefault("valid", {})
            if state.step not in looks or str(state.step) in found:
                return
            assert isinstance(held_out, Tensor)
            value = mean_loss(state.module, held_out.to(model.device))
            if state.agreed(not found or value < min(found.values())):
                state.save(folder / BEST)
            found[str(state.step)] = value

        latest = folder / LATEST
        if step_of(latest) is not None:
            state.load(latest)
        else:
            look()
            if plan.leave:
                valid = state.notes.get("valid", {})
                state.load(snapshot(prepared.folder, plan.leave))
                state.notes = {"valid": valid}
                look()
            state.notes |= {"loss_sum": 0.0, "loss_steps": 0}
        before, saved = state.tokens, time.monotonic()

        def watch(progress: Progress) -> None:
            nonlocal before, saved
            context.counters.decay_tokens += progress.tokens - before
            before = progress.tokens
            state.notes["loss_sum"] += progress.loss
            state.notes["loss_steps"] += 1
            look()
            if state.agreed(time.monotonic() - saved >= _SAVE_SECONDS) and progress.step < plan.steps:
                state.save(latest)
                saved = time.monotonic()
            context.progress(f"{self.name()} decay", (progress.step - plan.leave) / plan.decay)

        try:
            train(
                state,
                self._batches(stream, plan.rows),
                schedule=ConstantThenLinear(steps=plan.steps, decay=plan.decay, warmup=self.warmup),
                until=plan.steps,
                loss=self.loss(model, context),
                watch=watch,
            )
        except DivergedError:
            state.save(latest)  # the last good one; asked for again, it fails at once
            raise
        if not self.keep_best:
            return None
        found: dict[str, float] = state.notes["valid"]
        step = min(found, key=lambda key: (found[key], int(key)))
        return {"step": int(step), "valid": dict(found)}

    def _state(self, model: Model, context: Context) -> tuple[Learner, TrainState]:
        """A fresh learner, and the state of its training before the first step."""
        learner = self.learner(model, context)
        trained = [p for p in learner.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr or self.rate(model), weight_decay=0.0, fused=True)
        return learner, TrainState(learner.module, [optimizer], context.seed)

    @override
    def training_tokens(self, amounts: Sequence[int]) -> float:
        if self.gain is not None:  # at most: the doublings before the last are as much as the last
            return (2.0 if self.trunk is not None else 1.1) * sum(amounts)
        if self.trunk is not None:
            return float(sum(amounts))
        # The trunk goes as far as the largest amount needs it, and every amount ends with a tenth of its own.
        return 0.9 * max(amounts, default=0) + 0.1 * sum(amounts)

    # -- rows and steps -----------------------------------------------------------------------------------------------

    def _course(self, amount: int | float, block: int) -> Course:
        plan = course(self.name(), int(amount), block, self.batch)
        return plan if self.trunk is None else dataclasses.replace(plan, leave=0)

    def _missing(self, folder: Path, amounts: Sequence[int | float], block: int, rows_held: int | None) -> list[int]:
        """The steps at which amounts leave the trunk, each once, where no state is kept yet.

        Those of less than one row, or of more than the text, need no trunk: `apply` refuses them, and the others do
        not suffer.
        """
        longest = math.inf if rows_held is None or self.repeats else rows_held
        plans = [self._course(amount, block) for amount in amounts if amount >= block]
        leaves = {plan.leave for plan in plans if plan.rows <= longest} - {0}
        return sorted(leave for leave in leaves if step_of(snapshot(folder, leave)) is None)

    def _batches(self, stream: Stream, rows: int) -> Callable[[int], Tensor]:
        return lambda step: stream.rows(step * self.batch, min((step + 1) * self.batch, rows))

    def _branch_folder(self, prepared: Prepared, plan: Course) -> Path:
        return prepared.folder / f"rows-{plan.rows:07d}"

    def _block(self, context: Context) -> int:
        return self.block or context.block

    def _run(self, model: Model, context: Context) -> dict[str, Any]:
        """What a trunk depends on, as plain JSON: a folder made under another one is not continued.

        Raises
        ------
        DataError
            As `reads`, and when a row is longer than the model's positions.
        """
        source = self._source(model, context)
        block = self._block(context)
        tokens.check_block(block, model, self.name())
        fields = dataclasses.asdict(self)
        del fields["gain"], fields["most"]  # they say how far to go, and change no step
        return fields | {
            "format": _FORMAT,
            "block": block,
            "corpus": source.name,
            "lr": self.lr or self.rate(model),
            "version": self.version,
            "seed": context.seed,
            "model": context.dense.fingerprint,
            "done": [done.step for done in model.done],
            "text": source.text,
            "tokenizer": source.tokenizer_sha256,
        }

    def _source(self, model: Model, context: Context) -> Source:
        return find_source(self.name(), self.corpus or context.corpus, model)

    def _stream(self, model: Model, context: Context, rows: int) -> Stream:
        """The text of training, read as far as `rows` rows need."""

        def generator(epoch: int, window: int) -> torch.Generator:
            return context.generator(self.name(), "rows", epoch, window)

        return self._source(model, context).stream(self._block(context), rows, generator)

    def _held_out(self, model: Model, context: Context, plan: Course) -> Tensor | str:
        """A few rows of the validation split, (N, T), or why there are none.

        As many as cost, before and after, at most 3 % of the training: a row seen is about three rows scored.
        """
        rows = 64 if self.keep_best else min(64, max(4, plan.rows // 25))
        try:
            return self._source(model, context).held_out(self._block(context), rows)
        except DataError as error:  # a text without one can be trained on all the same
            return str(error)
