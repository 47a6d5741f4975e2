"""The one training loop: the testbed's models and every recovery are trained by it.

Shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.optim import Optimizer

from mariotte.errors import MariotteError
from mariotte.models.step import MANIFEST

if TYPE_CHECKING:
    from accelerate import Accelerator

_FORMAT = 1


class DivergedError(MariotteError):
    """Training that left the numbers; the state is as it was before the step that failed.

    Parameters
    ----------
    said : the sentence
    step : the step that failed, counted from 0
    """

    def __init__(self, said: str, step: int) -> None:
        super().__init__(said)
        self.step = step

    @classmethod
    def of(cls, what: str, value: float, step: int) -> DivergedError:
        """The error for a value that is no number."""
        return cls(f"the {what} became {value} at step {step} of training; lower the learning rates", step)

    def __reduce__(self) -> tuple[type[DivergedError], tuple[str, int]]:  # it may cross from one process to another
        return DivergedError, (str(self), self.step)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a step of training tells the one who watches: counts after the step, loss before it."""

    step: int
    tokens: int
    loss: float
    factor: float


def _whole(value: Tensor) -> Tensor:
    """All of a tensor on the CPU, also where this process holds a part of it; then every process must ask."""
    gather = cast("Callable[[], Tensor] | None", getattr(value, "full_tensor", None))
    return (value if gather is None else gather()).detach().cpu().contiguous()


def _parted(value: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor that this process holds of a parameter of its shape; all of it where that is whole."""
    if value.shape != like.shape or not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    parts = cast(DTensor, like)
    # None: every process has the same values, and none of them is sent.
    return distribute_tensor(value.to(parts.device), parts.device_mesh, parts.placements, src_data_rank=None)


@dataclass
class TrainState:
    """A run at one moment: enough to go on exactly as if it had never stopped.

    Parameters
    ----------
    module : the model; only its parameters with ``requires_grad`` are trained and saved
    optimizers : over those parameters; their learning rates at construction are what the schedule scales
    seed : of everything random inside the model (dropout). Each step draws from a generator seeded by
        (seed, step), so that the step count is the whole state of the generator, on any device
    step : steps already made
    tokens : tokens already seen
    notes : plain JSON that travels with the state, such as sums over the steps made
    """

    module: nn.Module
    optimizers: Sequence[Optimizer]
    seed: int = 0
    step: int = 0
    tokens: int = 0
    notes: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    _rates: list[list[float]] = field(init=False, repr=False)
    _together: _Together | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in self.optimizers]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; a tied one once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def values(self) -> dict[str, Tensor]:
        """The parameters that train as they are now, on the CPU, whole."""
        return {name: _whole(p) for name, p in self.trained.items()}

    @property
    def parted(self) -> bool:
        """Whether this process holds a part of the parameters only."""
        return self._together is not None and any(hasattr(p, "full_tensor") for p in self.trained.values())

    def agreed(self, said: bool) -> bool:
        """What the first process says where each holds a part, and all must save or none; else what is said here."""
        if not self.parted:
            return said
        answer = torch.tensor([int(said)], device=next(iter(self.trained.values())).device)
        torch.distributed.broadcast(answer, 0)
        return bool(answer)

    def set_rates_(self, factor: float) -> None:
        """Set every learning rate to its rate at construction times a factor."""
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def save(self, folder: Path) -> None:
        """Write the state as safetensors and a manifest, which comes last: a manifest means a whole state.

        A folder that already holds a state keeps it until the new manifest replaces the old one in one move.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"parameter/{name}": value for name, value in self.values().items()}
        scalars: dict[str, float] = {}
        for i, optimizer in enumerate(self.optimizers):
            states = cast("dict[int, dict[str, object]]", optimizer.state_dict()["state"])
            for j, entries in states.items():
                for name, value in entries.items():
                    key = f"optimizer/{i}/{j}/{name}"
                    if isinstance(value, Tensor):
                        tensors[key] = _whole(value)
                    elif isinstance(value, (int, float)):
                        scalars[key] = value
                    else:
                        raise AssertionError(f"cannot save {key} of type {type(value).__name__}")
        data = folder / f"state-{self.step:07d}.safetensors"
        save_file(tensors, data)
        manifest = {
            "format": _FORMAT,
            "data": data.name,
            "seed": self.seed,
            "step": self.step,
            "tokens": self.tokens,
            "scalars": scalars,
            "notes": self.notes,
        }
        draft = folder / (MANIFEST + ".draft")
        draft.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        draft.replace(folder / MANIFEST)
        for old in folder.glob("state-*.safetensors"):
            if old != data:
                old.unlink()

    def load(self, folder: Path) -> TrainState:
        """Take over a saved state, in place, and return self.

        The module and the optimizers must have been built as they were for the saved run: the folder holds
        values, not structure. Learning rates and other settings of the optimizers stay as built.

        Raises
        ------
        MariotteError
            When the folder holds no whole state, or one of another model; train anew into another folder.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MariotteError(
                f"{folder} holds no training state: expected {MANIFEST}; train from the start"
            ) from None
        tensors = load_file(folder / manifest["data"])
        trained = self.trained
        saved = {key.removeprefix("parameter/") for key in tensors if key.startswith("parameter/")}
        if saved != set(trained):
            odd = sorted(saved ^ set(trained))
            raise MariotteError(
                f"the training state in {folder} is of another model: {len(odd)} parameters differ, "
                f"first '{odd[0]}'; train into another folder"
            )
        for name, p in trained.items():
            value = tensors[f"parameter/{name}"]
            if value.shape != p.shape:
                raise MariotteError(
                    f"the training state in {folder} is of another model: '{name}' is {tuple(value.shape)} there "
                    f"and {tuple(p.shape)} here; train into another folder"
                )
            p.data.copy_(_parted(value, p.data))
        for i, optimizer in enumerate(self.optimizers):
            states: dict[int, dict[str, object]] = {}
            for key, value in (*tensors.items(), *manifest["scalars"].items()):
                kind, *where = key.split("/", 3)
                if kind == "optimizer" and int(where[0]) == i:
                    states.setdefault(int(where[1]), {})[where[2]] = value
            _put_moments(optimizer, states)
        self.seed, self.step, self.tokens = manifest["seed"], manifest["step"], manifest["tokens"]
        self.notes = manifest.get("notes", {})
        return self


def _put_moments(optimizer: Optimizer, states: Mapping[int, Mapping[str, object]]) -> None:
    """Give an optimizer what it remembers of each parameter, by its number; in parts, where the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in cast("list[Tensor]", group["params"])]
    parted = {
        j: {name: _parted(v, parameters[j].data) if isinstance(v, Tensor) else v for name, v in entries.items()}
        for j, entries in states.items()
    }
    optimizer.state.clear()  # it may be of parameters that the optimizer no longer has
    optimizer.load_state_dict({"state": parted, "param_groups": optimizer.state_dict()["param_groups"]})


def causal_loss(module: Callable[..., Any], tokens_BT: Tensor, **inputs: Any) -> Tensor:
    """Mean negative log-likelihood, in nats, of each row's T - 1 last tokens given those before.

    Parameters
    ----------
    module : a transformers causal language model, compiled or not
    tokens_BT : (B, T) token ids
    inputs : what else the module is given

    Returns
    -------
    scalar, float32
    """
    logits_BTV = module(input_ids=tokens_BT, use_cache=False, **inputs).logits[:, :-1]
    # float32: in bf16 the logarithm of a sum over V terms is off by more than a step of training gains.
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


@dataclass(frozen=True)
class _Together:
    """A step of training shared by several processes, each with its rows of every batch.

    What is sharded, and how, is accelerate's configuration; the mean gradient is that of one process alone, of every
    loss that is a mean over rows. Every process does the same work and needs a folder of its own.
    """

    accelerator: Accelerator
    module: nn.Module
    optimizers: Sequence[Optimizer]

    @classmethod
    def find(cls, state: TrainState) -> _Together | None:
        """The other processes that ``accelerate launch`` or ``torchrun`` started with this one; None without any."""
        # Not on one process: wrapped, a step of the testbed's models would take longer and learn the same.
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return None
        if state._together is None:  # pyright: ignore[reportPrivateUsage] of this file
            state._together = cls._prepared(state)  # pyright: ignore[reportPrivateUsage]
        return state._together  # pyright: ignore[reportPrivateUsage]

    @classmethod
    def _prepared(cls, state: TrainState) -> _Together:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        accelerator = Accelerator()
        if accelerator.distributed_type == DistributedType.FSDP:
            if not accelerator.is_fsdp2:
                raise MariotteError("training is sharded by FSDP 2, got fsdp_version 1: set fsdp_version: 2")
            if any(p._backward_hooks for p in state.trained.values()):  # pyright: ignore[reportPrivateUsage]
                raise MariotteError(
                    "weights that stay zero cannot be trained in shards: train adapters, or do without FSDP"
                )
        # Sharding makes other parameters of the parameters, and what an optimizer remembers of them must come along.
        moments = [cast("dict[int, dict[str, object]]", o.state_dict()["state"]) for o in state.optimizers]
        module, *optimizers = cast("list[Any]", accelerator.prepare(state.module, *state.optimizers))
        if accelerator.distributed_type == DistributedType.FSDP:
            for optimizer, entries in zip(state.optimizers, moments, strict=True):
                _put_moments(optimizer, entries)
        return cls(accelerator, module, optimizers)

    def backward(self, loss: Callable[[nn.Module, Tensor], Tensor], tokens_BT: Tensor) -> float:
        """The mean loss of a batch, its gradient left with the parameters of every process."""
        n, index = self.accelerator.num_processes, self.accelerator.process_index
        own_BT = tokens_BT[index::n]
        # So that the mean over processes is that over rows; one without rows still exchanges gradients, of nothing.
        weight = n * len(own_BT) / len(tokens_BT)
        mean = loss(self.module, own_BT if len(own_BT) else tokens_BT[:1]) * weight
        self.accelerator.backward(mean)
        return cast(Tensor, self.accelerator.reduce(mean.detach(), "mean")).item()

    def clip(self, trained: Sequence[nn.Parameter], norm: float) -> float:
        """Scale the gradient down to a norm; the norm that it had."""
        return float(_whole(cast(Tensor, self.accelerator.clip_grad_norm_(trained, norm))))


def train(
    state: TrainState,
    batch: Callable[[int], Tensor],
    *,
    schedule: Callable[[int], float],
    until: int,
    clip: float | None = 1.0,
    loss: Callable[[nn.Module, Tensor], Tensor] = causal_loss,
    watch: Callable[[Progress], None] | None = None,
) -> TrainState:
    """Train in place from the state's step to another.

    Parameters
    ----------
    state : changed in place
    batch : tokens (B, T) of a step counted from 0; a function of the step alone, so that a resumed run sees
        what an uninterrupted one sees
    schedule : factor of the learning rates at a step
    until : step at which to stop; nothing happens when the state is already there
    clip : largest norm of the gradient over all trained parameters; None never clips
    loss : mean loss over the predictions of the rows given
    watch : called after every step

    Returns
    -------
    the same state

    Raises
    ------
    MariotteError
        When nothing trains, or cannot be sharded as accelerate is told to.
    DivergedError
        When the loss or the gradient stops being a number: lower the learning rates. The state is as it was before
        that step.

    Notes
    -----
    Under ``accelerate launch`` the processes share each batch by rows, and parameters and optimizers are prepared by
    accelerate, so that copies of the model or shards of it (FSDP, version 2) are configuration. In one process
    accelerate is not even imported.
    """
    trained = list(state.trained.values())
    if not trained:
        raise MariotteError("training needs parameters with requires_grad, got none; unfreeze some or add an adapter")
    device = trained[0].device
    was_training = state.module.training
    together = _Together.find(state)
    trained = list(state.trained.values())  # others, where they were sharded
    optimizers = state.optimizers if together is None else together.optimizers
    state.module.train()
    try:
        # Forked: a run neither disturbs the caller's random numbers nor depends on them.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while state.step < until:
                torch.manual_seed((state.seed << 32) + state.step)
                tokens_BT = batch(state.step)
                factor = schedule(state.step)
                state.set_rates_(factor)
                if together is None:
                    mean = loss(state.module, tokens_BT.to(device))
                    mean.backward()
                    value = mean.item()
                else:
                    value = together.backward(loss, tokens_BT.to(device))
                if not math.isfinite(value):
                    raise DivergedError.of("loss", value, state.step)
                if clip is not None:
                    clipped = (
                        nn.utils.clip_grad_norm_(trained, clip).item() if not together else together.clip(trained, clip)
                    )
                    if not math.isfinite(clipped):
                        raise DivergedError.of("gradient", clipped, state.step)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                state.step += 1
                state.tokens += tokens_BT.numel()
                if watch is not None:
                    watch(Progress(step=state.step, tokens=state.tokens, loss=value, factor=factor))
    finally:
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)  # what a step that failed left behind
        state.module.train(was_training)
    return state
