"""A checkpoint folder seen as a model whose weights stay in its files; see `paging`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mariotte.architectures import Architecture
from mariotte.errors import ModelError
from mariotte.models.layouts import Layout
from mariotte.models.paging import Cell, Joined, Pager, Source, Stored, read_header, write_shards

BLOCKS_HELD = 3
"""Largest blocks that a streamed model holds at once: that which is worked on, its dense twin, and room to read."""


def largest_block(hf: nn.Module, entry: Architecture) -> int:
    """Bytes of the largest block of a model, in its own dtype."""
    blocks = [block for stack in entry.stacks for block in cast(nn.ModuleList, hf.get_submodule(stack.blocks))]
    return max(sum(p.numel() * p.dtype.itemsize for p in block.parameters()) for block in blocks)


def fill_(
    hf: PreTrainedModel, files: Sequence[Path], entry: Architecture, device: torch.device, scratch: Path, *, what: str
) -> None:
    """Give a model on the meta device its weights, which stay in the files.

    Parameters
    ----------
    hf : built on the meta device in the dtype to compute in
    files : in safetensors
    entry : of its family
    device : to compute on
    scratch : folder for weights that are changed
    what : the model's name for messages

    Raises
    ------
    ModelError
        When files are damaged, or do not hold exactly the weights that the config asks for, or hold them in a layout
        that is not known here.
    """
    layout = Layout(hf)
    if reason := layout.unknown():
        raise ModelError(f"{what} {reason}")
    held: dict[str, Source] = {}
    for file in files:
        held |= read_header(file)
    sources = layout.as_computed(held, what)
    prefix = f"{hf.base_model_prefix}."
    if hf.base_model is not hf and not any(name.startswith(prefix) for name in sources):
        # Some published files are of the body alone, and say nothing of what stands in front of it.
        body = {f"{prefix}{name}" for name, _ in hf.base_model.named_parameters()}
        sources = {f"{prefix}{name}" if f"{prefix}{name}" in body else name: at for name, at in sources.items()}
    pager = Pager(scratch, device, BLOCKS_HELD * largest_block(hf, entry))
    used: set[str] = set()
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, aliases in names.items():
        there = [name for name in aliases if name in sources]
        if not there:
            raise ModelError(
                f"{what} lacks weights that its config asks for, such as {aliases[0]}: "
                "config and weights do not belong together"
            )
        used |= set(there)
        _check(what, there, sources, parameter)
        stored = Stored(Cell(pager, sources[there[0]], parameter.dtype))
        given = nn.Parameter(stored, requires_grad=False)  # a graph would hold every weight that it was made with
        for name in aliases:
            _put(hf, name, given)
    used |= _fill_buffers(hf, sources, device)
    unexpected = sorted(
        name
        for name in set(sources) - used
        if not any(fnmatchcase(name, pattern) for pattern in (*entry.ignored, "*rotary_emb.inv_freq"))
    )
    if unexpected:
        raise ModelError(
            f"{what} holds weights that its config does not know, such as {unexpected[0]}: "
            "config and weights do not belong together"
        )


def _check(what: str, there: Sequence[str], sources: Mapping[str, Source | Joined], parameter: nn.Parameter) -> None:
    for name in there:
        if sources[name].shape != tuple(parameter.shape):
            raise ModelError(
                f"{what} cannot be loaded: its weights have other shapes than its config says, {name} "
                f"{list(sources[name].shape)} and {list(parameter.shape)}"
            )
        first, same = sources[there[0]], sources[name]
        if name != there[0] and not all(map(torch.equal, first.pieces(), same.pieces())):
            raise ModelError(
                f"{what} says that {there[0]} and {name} are one, and holds two different ones: set its "
                "tie_word_embeddings to false"
            )


def _put(hf: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(hf.get_submodule(path), leaf, parameter)


def _fill_buffers(hf: PreTrainedModel, sources: Mapping[str, Source | Joined], device: torch.device) -> set[str]:
    """Read the buffers that the files hold and compute the others as transformers does; the names of those read."""
    read: set[str] = set()
    for parameter in hf.parameters():
        # What transformers marks so when it loads it: the initialisation below then leaves it alone.
        cast(Any, parameter)._is_hf_initialized = True
    computed = {name for name, _ in hf.named_non_persistent_buffers()}
    for name, buffer in list(hf.named_buffers()):
        path, _, leaf = name.rpartition(".")
        module = hf.get_submodule(path)
        persistent = name not in computed
        if persistent and name in sources:
            value = sources[name].read().to(device, buffer.dtype)
            cast(Any, value)._is_hf_initialized = True
            read.add(name)
        else:
            value = torch.empty_like(buffer, device=device)
        setattr(module, leaf, nn.Buffer(value, persistent=persistent))
    with torch.no_grad():
        hf.initialize_weights()
    return read


def cast_(hf: nn.Module, dtype: torch.dtype) -> None:
    """Give a model whose weights are on disk these in another dtype; nothing is read."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, aliases in names.items():
        if isinstance(parameter, Stored):
            given = nn.Parameter(parameter.another(dtype), requires_grad=False)
            for name in aliases:
                _put(hf, name, given)


def save_(hf: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Save a model whose weights are on disk as transformers does, a piece of one weight at a time.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    hf.save_pretrained(folder, state_dict={})  # config, generation config, and the file of a class of ours
    tied = cast("dict[str, str]", hf.all_tied_weights_keys)
    held = hf.state_dict(keep_vars=True)
    again = {name for name, source in tied.items() if held.get(name) is held.get(source)}
    tensors = {name: tensor for name, tensor in held.items() if name not in again}
    write_shards(Layout(hf).as_stored(tensors), folder, dtype)
