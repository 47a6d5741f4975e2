"""LoRA: low-rank adapters on every matrix of the blocks, trained on text and merged into the weights.

Shapes: B rows of a batch, T tokens of a row, O and I outputs and inputs of a matrix, R rank.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from typing_extensions import override

from mariotte.data import tokens
from mariotte.errors import ChainError, DataError, ModelError
from mariotte.models.model import Model
from mariotte.models.step import MANIFEST, Context, Prepared, Step
from mariotte.recover.stream import Source, Stream, course, find_source
from mariotte.training.loop import Progress, TrainState, causal_loss, train
from mariotte.training.schedule import ConstantThenLinear

__all__ = ["LoRA"]

_ADAPTER = "default"
_LATEST = "latest"
_RUN = "trunk.json"
_SAVE_SECONDS = 30.0
"""A killed trunk loses at most this much; chosen by us: a save of the 8B models' adapters takes about a second."""


class _Masked(LoraVariant):
    """A low-rank change of the weights that are not zero, so that a sparse matrix stays sparse.

    Without it the merged change fills every zero; with a mask applied only after training, the model that is kept
    is not the one whose loss was lowered. Cost: the product of the factors, R·O·I, once a matrix and pass.
    """

    def __init__(self, mask_OI: Tensor) -> None:
        self.mask_OI = mask_OI

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] a static method in peft, called on the instance
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        dropped = module.lora_dropout[active_adapter](x)  # as without a mask: the adapter's input alone
        return result + nn.functional.linear(dropped, delta(module) * self.mask_OI)


def _factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """A, (R, I), and B, (O, R), of an adapted matrix."""
    first = cast(nn.Linear, layer.lora_A[_ADAPTER])
    second = cast(nn.Linear, layer.lora_B[_ADAPTER])
    return cast(nn.Parameter, first.weight), cast(nn.Parameter, second.weight)


def delta(layer: LoraLayer) -> Tensor:
    """What an adapter adds to its matrix, alpha / R · B A, (O, I), float32."""
    a_RI, b_OR = _factors(layer)
    scaling = cast("dict[str, float]", layer.scaling)  # alpha / R
    return (b_OR @ a_RI) * scaling[_ADAPTER]


def matrices(model: Model) -> dict[str, nn.Linear]:
    """The matrices of the blocks by their path from the model."""
    entry = model.entry
    paths = [entry.query, entry.key, entry.value, entry.output, entry.gate, entry.up, entry.down]
    return {
        f"{entry.blocks}.{i}.{path}": cast(nn.Linear, block.module.get_submodule(path))
        for i, block in enumerate(model.blocks)
        for path in paths
        if path is not None
    }


@dataclass(frozen=True, kw_only=True)
class LoRA(Step):
    """Recover with low-rank adapters on all linear layers of the blocks, merged at the end.

    Parameters
    ----------
    rank : R
    alpha : the change of a matrix is alpha / R · B A
    lr : learning rate of the trunk; None takes 2e-3, less beyond a hidden size of 128, see Notes
    dropout : of the adapters' input, in [0, 1)
    batch : rows of a step
    block : tokens of a row; None takes the run's
    warmup : steps over which the learning rate rises, the same for every D
    corpus : trained on, its training split; None takes the run's

    Notes
    -----
    One trunk serves every D. It is trained at a constant learning rate; the run of D tokens leaves it at the last
    whole batch within 0.9·D, with adapter, optimizer and position, and lowers the learning rate linearly to zero over
    the rest. So the tokens of a smaller D are the first ones of a larger D, and the result at one D is the same bits
    whatever other D were asked for, in which order, and however often the work was interrupted (on one machine with
    one number of threads). D counts every token seen, decay included, rounded down to whole rows; the last batch
    holds the rows that are left. Training text repeats, shuffled anew, where D exceeds it: the facts say how often.

    The defaults are ours, from the testbed's models of width 48 and 128 with 30 % of the feed-forward neurons or of
    the width gone, and 4k to 64k tokens. A rate of 4e-3 and more recovered faster what was badly cut but left worse a
    model that had lost next to nothing (loss 1.349 before, 1.379 after 64k tokens); 1e-3 recovered less.
    Batches of 4 rows recovered more than 8 or 16 at 4k and 16k tokens, as much at 64k. Beyond width 128 the rate
    falls as width to the power -2/3, to 2e-4 at 4096, where 1e-4 to 3e-4 is usual.

    Where an earlier step of the chain set weights to zero, all zeros stay: the change is masked in training and in
    merging alike. The facts count them (``mask_reapplied``).

    Costs, with D tokens in all: memory, one copy of the model when merging, none while training; disk, three float32
    copies of the adapter a D.

    References
    ----------
    [hu2022lora]_ section 4. The constant rate with a branch that decays: [hagele2024scaling]_.
    """

    unit: ClassVar[str] = "tokens"
    family: ClassVar[str] = "recovery"
    reference: ClassVar[str] = "hu2022lora"

    rank: int = 16
    alpha: float = 32.0
    lr: float | None = None
    dropout: float = 0.0
    batch: int = 4
    block: int | None = None
    warmup: int = 2
    corpus: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 1), ("batch", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ChainError(f"lora: {name} must be at least {least}, got {getattr(self, name)}")
        if self.block is not None and self.block < 2:
            raise ChainError(f"lora: block must be at least 2 tokens, got {self.block}")
        if not 0 <= self.dropout < 1:
            raise ChainError(f"lora: dropout must be in [0, 1), got {self.dropout}")
        for name in ("alpha", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ChainError(f"lora: {name} must be positive, got {value}")

    @override
    def refuse(self, model: Model) -> str | None:
        for path, matrix in matrices(model).items():
            if not isinstance(matrix, nn.Linear):  # pyright: ignore[reportUnnecessaryIsInstance] cast above
                return f"needs linear layers, and {path} of this {model.entry.model_type} is a {type(matrix).__name__}"
            if type(matrix.weight.data) is not Tensor or not matrix.weight.is_floating_point():
                return f"trains beside plain weights, and {path} is quantized: put lora before the quantization"
        return None

    @override
    def covers(self, prepared: Prepared, amounts: Sequence[int | float]) -> bool:
        leaves = self._leaves(amounts, int(prepared.facts["run"]["block"]))
        return all(_whole(_snapshot(prepared.folder, leave)) for leave in leaves)

    def _leaves(self, amounts: Sequence[int | float], block: int) -> list[int]:
        """The steps at which amounts leave the trunk, each once.

        Those of less than one row need no trunk: `apply` refuses them, and the others do not suffer.
        """
        leaves = {course(int(amount), block, self.batch).leave for amount in amounts if amount >= block}
        return sorted(leaves - {0})

    @override
    def reads(self, model: Model, context: Context) -> Mapping[str, str]:
        """The training text, the tokenizer that reads it and the length of its rows.

        Raises
        ------
        DataError
            When there is no text to train on, or no tokenizer to read it with.
        """
        source = self._source(model, context)
        return {
            "text": source.text,
            "tokenizer": source.tokenizer_sha256,
            "block": str(self.block or context.block),
        }

    @override
    def prepare(self, model: Model, context: Context, amounts: Sequence[int | float]) -> Prepared:
        """Train the trunk as far as the largest amount needs it, keeping its state where each amount leaves it.

        Raises
        ------
        ModelError
            When the model's matrices cannot be adapted.
        DataError
            When there is no text to train on, or no tokenizer to read it with, or a row is longer than the model's
            positions.
        """
        if reason := self.refuse(model):
            raise ModelError(f"lora {reason}")
        run = self._run(model, context)
        folder = context.scratch
        _settle(folder, run)
        leaves = [leave for leave in self._leaves(amounts, run["block"]) if not _whole(_snapshot(folder, leave))]
        if leaves:
            # Read as far as the last branch will go, once, rather than again when it does.
            stream = self._stream(model, context, int(max(amounts)) // run["block"])
            for leave in leaves:
                self._trunk(model, context, stream, leave, last=leaves[-1])
        _forget(folder / _LATEST)  # also what a killed run left half removed
        return Prepared(folder).finish(run=run)

    @override
    def apply(self, model: Model, prepared: Prepared, amount: int | float, context: Context) -> Model:
        """The model after `amount` tokens, the adapter merged into its weights.

        The facts of its `Done`: rows seen, passes begun over the text (`epochs`), the loss of the first batch before
        any training, the mean loss over the decay (each batch before it was learned), and how many weights were held
        at zero.

        Raises
        ------
        ChainError
            When the amount is less than one row.
        DataError
            When the text or the settings are not those that the trunk was trained with.
        """
        run = self._run(model, context)
        block: int = run["block"]
        plan = course(int(amount), block, self.batch)
        if prepared.facts["run"] != run:
            changed = sorted(key for key in run if run[key] != prepared.facts["run"].get(key))
            raise DataError(
                f"the trunk in {prepared.folder} was trained with another {' and '.join(changed)}: remove that folder "
                "and run again"
            )
        stream = self._stream(model, context, plan.rows)
        state = self._state(model, context)
        with torch.no_grad():
            loss_begin = causal_loss(state.module, stream.rows(0, min(self.batch, plan.rows)).to(model.device)).item()
        if plan.leave:
            state.load(_snapshot(prepared.folder, plan.leave))
        branched = before = state.tokens
        losses: list[float] = []

        def watch(progress: Progress) -> None:
            nonlocal before
            context.counters.decay_tokens += progress.tokens - before
            before = progress.tokens
            losses.append(progress.loss)
            context.progress("lora decay", (progress.step - plan.leave) / plan.decay)

        train(
            state,
            self._batches(stream, plan.rows),
            schedule=ConstantThenLinear(steps=plan.steps, decay=plan.decay, warmup=self.warmup),
            until=plan.steps,
            watch=watch,
        )
        assert state.tokens == plan.rows * block, f"{state.tokens} tokens seen, {plan.rows} rows of {block} planned"
        merged = model.copy()
        held = self._merge_(merged, state)
        return merged.after(
            self.done(
                amount,
                state.tokens,
                tokens=state.tokens,
                corpus=run["corpus"],
                rows=plan.rows,
                block=block,
                steps=plan.steps,
                decay_tokens=state.tokens - branched,
                epochs=-(-plan.rows // len(stream.tokens_NT)),
                rank=self.rank,
                alpha=self.alpha,
                lr=run["lr"],
                loss_begin=loss_begin,
                loss_end=sum(losses) / len(losses),
                mask_reapplied=held,
            )
        )

    def _rate(self, model: Model) -> float:
        return self.lr or 2e-3 * min(1.0, (128 / model.shape.hidden) ** (2 / 3))

    def _run(self, model: Model, context: Context) -> dict[str, Any]:
        """What a trunk depends on, as plain JSON: a folder made under another one is not continued.

        Raises
        ------
        DataError
            As `reads`, and when a row is longer than the model's positions.
        """
        source = self._source(model, context)
        block = self.block or context.block
        tokens.check_block(block, model, "lora")
        return dataclasses.asdict(self) | {
            "block": block,
            "corpus": source.name,
            "lr": self._rate(model),
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
        block = self.block or context.block

        def generator(epoch: int, window: int) -> torch.Generator:
            return context.generator("lora", "rows", epoch, window)

        return self._source(model, context).stream(block, rows, generator)

    def _batches(self, stream: Stream, rows: int) -> Callable[[int], Tensor]:
        return lambda step: stream.rows(step * self.batch, min((step + 1) * self.batch, rows))

    def _state(self, model: Model, context: Context) -> TrainState:
        """A fresh adapter, which changes nothing yet, on a twin that shares the model's weights and trains none."""
        # Its own parameters over the same storage: peft marks what must not train, and the model is not ours to mark.
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.hf.parameters()}
        memo |= {id(b): b for b in model.hf.buffers()}
        twin = copy.deepcopy(model.hf, memo)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),
            lora_dropout=self.dropout,
            target_modules=list(matrices(model)),
        )
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # peft draws from the global generator; we draw anew below
            module = inject_adapter_in_model(config, twin, adapter_name=_ADAPTER)
        masked = sum(done.zeros for done in model.done) > 0
        for path, matrix in matrices(model).items():
            layer = cast(LoraLayer, module.get_submodule(path))
            a_RI, b_OR = _factors(layer)
            generator = context.generator("lora", "start", path)
            # As peft and the paper's code: uniform within 1 / sqrt(I); B is zero. Float32 beside weights of any dtype.
            start_RI = (2 * torch.rand(a_RI.shape, generator=generator) - 1) / math.sqrt(a_RI.shape[1])
            a_RI.data = start_RI.to(a_RI.device)
            b_OR.data = torch.zeros(b_OR.shape, device=b_OR.device)
            if masked:
                layer.lora_variant[_ADAPTER] = _Masked((matrix.weight != 0).detach())
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self._rate(model), weight_decay=0.0, fused=True)
        return TrainState(module, [optimizer], context.seed)

    def _trunk(self, model: Model, context: Context, stream: Stream, leave: int, *, last: int) -> None:
        """Train from the furthest state not beyond `leave` up to it, and keep the state there."""
        folder = context.scratch
        state = self._state(model, context)
        start = max(
            (path for path in folder.iterdir() if _whole(path) and _step(path) <= leave), key=_step, default=None
        )
        if start is None:
            context.counters.trunks += 1
        else:
            state.load(start)
        saved = time.monotonic()
        before = state.tokens

        def watch(progress: Progress) -> None:
            nonlocal saved, before
            context.counters.trunk_tokens += progress.tokens - before
            before = progress.tokens
            if time.monotonic() - saved >= _SAVE_SECONDS and progress.step < leave:
                state.save(folder / _LATEST)
                saved = time.monotonic()
            context.progress("lora trunk", progress.step / last)

        rising = ConstantThenLinear(steps=leave, warmup=self.warmup)
        train(state, self._batches(stream, leave * self.batch), schedule=rising, until=leave, watch=watch)
        state.save(_snapshot(folder, leave))

    @torch.no_grad()
    def _merge_(self, model: Model, state: TrainState) -> int:
        """Add what the adapters learned to the weights; the number of weights held at zero."""
        held = 0
        for path, matrix in matrices(model).items():
            layer = cast(LoraLayer, state.module.get_submodule(path))
            change_OI = delta(layer)
            if isinstance(variant := layer.lora_variant.get(_ADAPTER), _Masked):
                change_OI = change_OI * variant.mask_OI
                held += int((~variant.mask_OI).sum())
            # float32: a small change would vanish if it were rounded to the weight's dtype before the sum.
            matrix.weight.copy_(matrix.weight.float() + change_OI)
        return held


def _snapshot(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def _whole(folder: Path) -> bool:
    """Whether a folder holds a whole state: its manifest is written last."""
    return (folder / MANIFEST).is_file()


def _step(folder: Path) -> int:
    return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"])


def _forget(folder: Path) -> None:
    """Remove a state, its manifest first: half of a state must not look whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _settle(folder: Path, run: dict[str, Any]) -> None:
    """Make a folder this run's: states of another run are removed, its own are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / _RUN
    if told.is_file() and json.loads(told.read_text(encoding="utf-8")) == run:
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for state in [*folder.glob("step-*"), folder / _LATEST]:
        _forget(state)
    draft = folder / f".{_RUN}"
    draft.write_text(json.dumps(run), encoding="utf-8")
    draft.replace(told)
