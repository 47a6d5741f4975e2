"""A checkpoint that loads anywhere: saved, loaded back by stock transformers, compared, then put into place."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mariotte import __version__
from mariotte.errors import ModelError
from mariotte.models import packed
from mariotte.models.dynamic import modules
from mariotte.models.load import (
    LOADED_BY,
    SIDECAR,
    quiet_transformers,
    read_config,
    read_weights,
    stream_weights,
    weight_files,
)
from mariotte.models.model import Model, forward
from mariotte.models.paging import pager_of
from mariotte.models.streaming import cast_, save_

_PROBE = (4, 32)  # rows and tokens on which the saved and the reloaded model are compared


def _probe(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.shape.vocab, _PROBE, generator=generator)


def tokenizer_class(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """The transformers class that reads a saved tokenizer as it is.

    ``AutoTokenizer`` for almost all; for some model types it puts the family's own rules in place of the file's, and
    then a tokenizer of another kind must be loaded by its general class.
    """
    vocabulary = cast("list[str]", tokenizer.convert_ids_to_tokens(list(range(min(512, len(tokenizer))))))
    probe = f"{' '.join(vocabulary)} {tokenizer.decode(list(range(len(vocabulary))))}"
    with quiet_transformers():
        found = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    ids = cast("list[int]", tokenizer(probe, verbose=False)["input_ids"])
    same = bool(found(probe, verbose=False)["input_ids"] == ids and found.decode(ids) == tokenizer.decode(ids))
    return "AutoTokenizer" if same else "PreTrainedTokenizerFast"


def _packable(model: Model) -> tuple[dict[str, Tensor], packed.Form | None]:
    """The weights that a checkpoint should hold packed, by the path of their matrix, and how.

    None in a class of ours, or in an encoder-decoder, whose packed matrices transformers does not read back; in a
    family whose layers have a pass of their own, such as Falcon's, that packed ones do not go through; and where two
    kinds would be packed, or other layers round what they read, of which a config can name one.
    """
    scopes = {done.scope: form for done in model.rounded if (form := packed.form_of(done.facts)) is not None}
    unread = model.entry.irregular or model.kind == "seq2seq" or len({*scopes.values()}) > 1 or modules(model.hf.config)
    matrices = model.paths(*scopes) if scopes and not unread else {}
    if not matrices or any(type(matrix) is not nn.Linear for matrix in matrices.values()):
        return {}, None
    return {path: matrix.weight for path, matrix in matrices.items()}, next(iter(scopes.values()))


def file_bytes(folder: Path) -> int:
    """Bytes of the weights in a model folder, as their files hold them."""
    total = 0
    for file in weight_files(folder):
        with file.open("rb") as content:
            total += file.stat().st_size - 8 - int.from_bytes(content.read(8), "little")
    return total


def card(model: Model, folder: Path, dense_params: int, stored: torch.dtype, tokenizer: str = "AutoTokenizer") -> str:
    """The model card of a folder with its weights: what was done, what is left, how to load it."""
    counts = model.counts
    removed = 1 - counts.n_params / dense_params
    chain = " | ".join(done.step for done in model.done) or "dense"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    rows = "\n".join(
        f"| `{done.step}` | {done.unit} | {number(done.amount)} | {number(done.obtained)} | {done.zeros:,} |"
        for done in model.done
    )
    loader, irregular = LOADED_BY[model.kind].__name__, model.entry.irregular
    trust = ", trust_remote_code=True" if irregular else ""
    how = (
        "A `transformers` checkpoint with sizes that its family's config cannot state. Its class is in "
        "`modeling_mariotte.py` beside\nthe weights, which `trust_remote_code=True` lets `transformers` run: read it "
        "first. `mariotte.load` knows the class and\nruns no code of this folder."
        if irregular
        else "An ordinary `transformers` checkpoint:"
    )
    if said := _of_quantization(model, packed.is_packed(read_config(folder))):
        how = f"{said}\n\n{how}"
    return f"""---
library_name: transformers
base_model: {json.dumps(model.name)}
tags: [compression, mariotte]
---
# {model.name} after `{chain}`

Compressed with Mariotte {__version__}. The licence and the terms of use of the base model apply.

| | |
|---|---|
| base model | `{model.name}` ({dense_params:,} parameters) |
| chain | `{chain}` |
| parameters | {counts.n_params:,} ({removed:.1%} removed) |
| without embeddings | {counts.n_params_non_embedding:,} |
| bytes | {file_bytes(folder):,} ({str(stored).removeprefix("torch.")}) |
| base fingerprint | `{model.fingerprint}` |

| step | unit | asked | obtained | weights zeroed |
|---|---|---|---|---|
{rows}

{how}

```python
from transformers import {loader}, {tokenizer}
model = {loader}.from_pretrained("path/to/this/folder"{trust})
tokenizer = {tokenizer}.from_pretrained("path/to/this/folder")
```

When it was saved it was loaded back and its logits compared with those of the model in memory. How much quality was
lost has to be measured for your data: `mariotte run`, or any evaluation of your own.
"""


def _of_quantization(model: Model, small: bool) -> str:
    """What the card says of weights, and perhaps inputs, that were rounded, and of weights that are held packed."""
    said: list[str] = []
    stored = [done.facts.get("stored") for done in model.rounded]
    if small:
        held = "eight-bit floats" if packed.FLOAT8 in stored else "four-bit integers for an NVIDIA GPU"
        said.append(f"Some weights are {held}, which `transformers` reads where torchao is installed.")
    if stored and not (small and all(stored)):
        said.append(
            "Quantization is simulated: weights are stored as what their integers stand for. Packed, the model would "
            f"take {model.counts.n_bytes:,} bytes."
        )
    if modules(model.hf.config):
        said.append(
            "Some matrices round what they read: `transformers` does that after `import mariotte.models.dynamic`."
        )
    return "\n".join(said)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder for a checkpoint, if one could be put there: asked before the work, not after it.

    Raises
    ------
    ModelError
        When it holds something already, or nothing can be written there.
    """
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is not empty: give a new folder for the checkpoint")
    there = next(folder for folder in (target, *target.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ModelError(
            f"the checkpoint cannot be written to {target}: {there} is no folder that can be written; give another"
        )
    return target


def save(
    model: Model, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, dense_params: int | None = None
) -> Path:
    """Save a model so that ``transformers`` loads it, and prove it.

    The folder appears only when it is whole: everything is written beside it, loaded back, compared and renamed. With
    an irregular model goes the file of its class, which transformers runs only when told ``trust_remote_code=True``.

    Parameters
    ----------
    model : what to save
    folder : where; must not exist yet, or be empty
    dtype : of the stored weights; None takes that in which the model was computed, so that what is stored is to the bit
        what was measured
    dense_params : parameters of the dense model, for the card; None takes this model's

    Raises
    ------
    ModelError
        When the folder holds something already, cannot be written, or what was written does not load back to the same
        logits.
    """
    target = check_target(folder)
    stored = dtype or model.hf.dtype
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"the checkpoint cannot be written to {target}: {error.strerror}; give a folder that can be written"
        ) from error
    try:
        _write(model, temporary, stored, dense_params or model.counts.n_params)
        _open_to_all(temporary)
        if target.exists():
            target.rmdir()
        temporary.replace(target)
    except OSError as error:
        raise ModelError(
            f"the checkpoint cannot be written to {target}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _open_to_all(folder: Path) -> None:
    """Give files the rights that new files have: a temporary folder is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _write(model: Model, folder: Path, stored: torch.dtype, dense_params: int) -> None:
    # A copy: casting in place would round the weights of the model that the caller goes on measuring.
    rounded = _cast(model.copy(), stored)
    small = packed.pack_(rounded.hf, *_packable(model))
    try:
        with quiet_transformers():
            if model.streamed:
                save_(rounded.hf, folder, stored)
            else:
                rounded.hf.save_pretrained(folder, safe_serialization=True)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own for a full disk
        raise OSError(None, " ".join(str(error).split())[:200]) from error
    if small:
        packed.unpack_(rounded.hf, torch.float32)
    loaded_by = "AutoTokenizer" if model.tokenizer is None else tokenizer_class(model.tokenizer, folder)
    (folder / "README.md").write_text(card(model, folder, dense_params, stored, loaded_by), encoding="utf-8")
    sidecar = {
        "mariotte": __version__,
        "base_model": model.name,
        "base_fingerprint": model.fingerprint,
        "dense_params": dense_params,
        "steps": [dataclasses.asdict(done) for done in model.done],
    }
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
    compare(rounded, folder)


def _cast(model: Model, dtype: torch.dtype) -> Model:
    """The model with its parameters in `dtype`; not its buffers: rounded rotary frequencies make another model."""
    if model.streamed:
        cast_(model.hf, dtype)
        return model
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def compare(model: Model, folder: Path) -> None:
    """Load `folder` with stock transformers and compare logits with `model`, both in float32.

    Of a streamed model the folder is streamed too: read back by our own reader into transformers' own modules.

    Raises
    ------
    ModelError
        When it does not load, or the logits differ by more than rounding.
    """
    pager = pager_of(model.embeddings.weight)
    try:
        if pager is None:
            loaded = read_weights(folder, torch.float32, what="the checkpoint")
        else:
            pager.let_go()
            loaded = stream_weights(folder, torch.float32, model.device, pager.folder, what="the checkpoint")
    except ModelError as error:
        raise ModelError(f"the checkpoint does not load back, so it was not kept: {error}") from error
    tokens_BT = _probe(model)
    reference = _cast(model.copy(), torch.float32)
    if pager is None:
        reference.hf.cpu()  # pyright: ignore[reportArgumentType]
    else:
        tokens_BT = tokens_BT.to(model.device)
    expected = reference.logits(tokens_BT)
    if pager is not None:
        pager.let_go()
    found = forward(loaded, model.kind, tokens_BT)
    if (other := pager_of(next(loaded.parameters()))) is not None:
        other.let_go()  # and not when the collector comes by
    # Same weights and same code: what remains is the order of float32 sums.
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= 1e-4 * max(scale, 1.0):
        raise ModelError(
            f"the checkpoint loads back to other logits (off by {worst:.3g} of {scale:.3g}), so it was not kept"
        )
