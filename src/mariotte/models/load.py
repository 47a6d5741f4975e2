"""From a name to a model: a folder, ``testbed/NAME`` or a hub id; safetensors only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mariotte import architectures
from mariotte.architectures import Architecture, Kind
from mariotte.errors import ModelError, UnknownNameError
from mariotte.locate import folder_of, read_config
from mariotte.models import packed
from mariotte.models.dynamic import restore_
from mariotte.models.irregular import freeze_shortcuts_
from mariotte.models.model import Done, Model
from mariotte.models.streaming import fill_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LOADED_BY: Mapping[Kind, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""The class of transformers that loads models of a kind."""

SIDECAR = "mariotte.json"
"""Beside the weights of a checkpoint of ours: what was done to it."""

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@contextlib.contextmanager
def quiet_transformers() -> Generator[None]:
    """Loading without transformers' own bars and notices: the bench reports its own progress."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def locate(name: str) -> Path:
    """The folder that holds a model, fetched from the hub when it is nowhere else.

    Raises
    ------
    ModelError
        When there is no such folder and the hub cannot be asked or does not have it.
    UnknownNameError
        When `name` is ``testbed/...`` and the testbed has no such model.
    """
    folder = folder_of(name)
    if folder is not None:
        return folder
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ModelError(
            f"no model {name!r}: it is no folder here and the hub did not give it ({type(error).__name__}: {reason}); "
            "check the name, or download it where there is a network"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises
    ------
    ModelError
        When there are none; a folder with pickled weights is refused by that name.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when it is read: "
            "convert it to safetensors first"
        )
    raise ModelError(f"{folder} holds a config.json but no weights: expected model.safetensors beside it")


def fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights: what identifies a model, whatever it is called."""
    found = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder; None when it holds none.

    Notes
    -----
    Where there is a ``tokenizer.json``, it is the tokenizer. ``AutoTokenizer`` would take a family's own class for some
    model types, Qwen2 among them, whatever the folder says, and put that class' rules in place of the file's.
    """
    if (folder / "tokenizer.json").is_file():
        kind = PreTrainedTokenizerFast
    elif any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model")):
        kind = AutoTokenizer
    else:
        return None
    try:
        with quiet_transformers():
            return cast(PreTrainedTokenizerBase, kind.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # the tokenizers library raises bare exceptions for files that it cannot read
        raise ModelError(f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`.

    Raises
    ------
    ModelError
        When torch knows no such device, or this machine or this build of torch has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = " ".join(str(error).split(".")[0].split())[:120]
        raise ModelError(
            f"device {str(name)!r} cannot be used ({reason}): name one that is here, such as cpu"
        ) from error
    return device


def find_dtype(name: str) -> torch.dtype:
    """The floating dtype called `name`.

    Raises
    ------
    UnknownNameError
        When it is none that models are computed in.
    """
    if name not in DTYPES:
        raise UnknownNameError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _history(folder: Path) -> tuple[Done, ...]:
    """What a checkpoint of ours says was done to it; nothing for any other."""
    path = folder / SIDECAR
    if not path.is_file():
        return ()
    try:
        return tuple(Done(**step) for step in json.loads(path.read_text(encoding="utf-8"))["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} must say what was done to the model, and cannot be read: remove it or save again"
        ) from error


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    stream: Path | None = None,
) -> Model:
    """Load a language model of any kind and see it through its family's entry.

    Parameters
    ----------
    name_or_path : a folder, ``testbed/NAME``, or a hub id such as ``Qwen/Qwen2.5-0.5B``
    device : where to put it
    dtype : to compute in; None takes float32 on the CPU (bfloat16 is slow there) and the checkpoint's own elsewhere
    trust_remote_code : run modelling code that the checkpoint carries; off unless you ask. Irregular checkpoints of
        ours need none: their class is known here, and the copy in the folder is not run
    stream : leave the weights in their files, for a model larger than memory: each is read when something computes with
        it, and those used longest ago are let go. What a step changes is kept in this folder, which must have room for
        the changed model, and for as long as the model is in use

    Raises
    ------
    ModelError
        When there is no such model, it has no weights in safetensors, its weights do not match its config, or its
        family is not described in ``architectures/``, or cannot be streamed.
    """
    name = os.fspath(name_or_path)
    if not name.strip():
        raise ModelError("a model must be named: a folder, testbed/NAME or a hub id, got an empty name")
    folder = locate(name)
    config = read_config(folder)
    if not config.get("model_type"):
        raise ModelError(f"{folder / 'config.json'} must state a model_type, got none")
    architectures.shape(config)  # refuses a family or a size that cannot be read, before any weight is
    weight_files(folder)
    chosen = find_dtype(dtype) if isinstance(dtype, str) else dtype
    stored = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    where = find_device(device)
    if chosen is None:
        chosen = torch.float32 if where.type == "cpu" else stored
    if stream is None:
        hf = read_weights(folder, chosen, what=name, trust_remote_code=trust_remote_code)
        hf.to(where)  # pyright: ignore[reportArgumentType]
    else:
        hf = stream_weights(folder, chosen, where, stream, what=name)
    return Model(
        hf,
        load_tokenizer(folder),
        name=name,
        fingerprint=fingerprint(folder),
        stored_dtype=stored,
        done=_history(folder),
    )


def read_weights(folder: Path, dtype: torch.dtype, *, what: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A transformers model of a folder, in eval mode on the CPU, every weight of it from the folder.

    Parameters
    ----------
    what : the model's name for messages

    Raises
    ------
    ModelError
        When the weights are damaged, or are not exactly those that the config asks for.
    """
    config = read_config(folder)
    entry = architectures.of(config)
    if packed.is_packed(config) and not packed.installed():
        raise ModelError(f"{what} holds weights that torchao packed, and it is not installed: {packed.INSTALL}")
    try:
        with quiet_transformers():
            loaded: Any = LOADED_BY[entry.kind].from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                attn_implementation=entry.kernel,
            )
    except (SafetensorError, ValueError, RuntimeError, OSError, KeyError) as error:
        said = " ".join(str(error).split())
        if "size mismatch" in said or "ignore_mismatched_sizes" in said:
            said = "its weights have other shapes than its config says"
        raise ModelError(f"{what} cannot be loaded: {said[:400]}") from error
    hf, loading = cast("tuple[PreTrainedModel, dict[str, list[str]]]", loaded)
    # transformers fills what is missing with random numbers, which would measure as a broken model.
    for kind, said in (
        ("missing_keys", "lacks weights that its config asks for"),
        ("unexpected_keys", "holds weights that its config does not know"),
    ):
        names = sorted(
            name for name in loading[kind] if not any(fnmatchcase(name, pattern) for pattern in entry.ignored)
        )
        if names:
            raise ModelError(f"{what} {said}, such as {names[0]}: config and weights do not belong together")
    if packed.is_packed(config) and (folder / SIDECAR).is_file():
        # Of ours, of which the history says so; to a stranger's a second quantizer must see that it is quantized.
        packed.unpack_(hf, dtype)
    freeze_shortcuts_(hf)
    _restate_tie(hf, entry)
    return hf.eval()


def stream_weights(
    folder: Path, dtype: torch.dtype, device: torch.device, scratch: Path, *, what: str
) -> PreTrainedModel:
    """As `read_weights`, with every weight left in the folder's files; see `load`.

    Parameters
    ----------
    scratch : folder for weights that are changed
    what : the model's name for messages

    Raises
    ------
    ModelError
        When files are damaged or do not hold exactly the weights that the config asks for, or the family's files
        cannot be read block by block.
    """
    entry = architectures.of(read_config(folder))
    try:
        with quiet_transformers():
            config = cast(PreTrainedConfig, AutoConfig.from_pretrained(folder, local_files_only=True))
            with torch.device("meta"):
                made = LOADED_BY[entry.kind].from_config(config, attn_implementation=entry.kernel, dtype=dtype)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"{what} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    hf = cast(PreTrainedModel, made).eval()
    restore_(hf)
    with quiet_transformers():
        fill_(hf, weight_files(folder), entry, device, scratch, what=what)
    freeze_shortcuts_(hf)
    _restate_tie(hf, entry)
    return hf


def _restate_tie(hf: PreTrainedModel, entry: Architecture) -> None:
    """Make the config say whether the head is the embeddings: that of T5 says that it is whatever the file says."""
    tied = hf.get_submodule(entry.head).weight is hf.get_submodule(entry.embeddings).weight
    if bool(getattr(hf.config, entry.tied, False)) != tied:
        setattr(hf.config, entry.tied, tied)
