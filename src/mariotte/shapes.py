"""What a chain leaves of a model, from shapes alone: parameters, bytes, memory; no weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mariotte import accounting, architectures
from mariotte.accounting import BYTES, Counts, cut_width, rounding
from mariotte.architectures import Architecture, Shape
from mariotte.chain import Chain, Link
from mariotte.errors import ModelError

ACTIVATION_TOKENS = 1024
"""Tokens whose activations are held at once while a prompt is read, at most: longer ones are read in pieces."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A model of which only the sizes are known.

    Parameters
    ----------
    name : as the user calls it
    config : the content of ``config.json``
    shape : its sizes
    entry : its family
    dtype : of the stored weights
    """

    name: str
    config: Mapping[str, Any]
    shape: Shape
    entry: Architecture
    dtype: str

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any]) -> Sized:
        """The sizes that a config states.

        Raises
        ------
        MariotteError
            When the family is not described, a size is missing or the dtype has no known size.
        """
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        if dtype not in BYTES:
            raise ModelError(f"dtype of {name} must be one of {', '.join(BYTES)}, got {dtype!r}")
        shape = architectures.shape(config)
        return cls(name=name, config=config, shape=shape, entry=architectures.of(config), dtype=dtype)

    @property
    def counts(self) -> Counts:
        """Of the dense model."""
        return accounting.count_shape(self.shape, bytes_per_param=BYTES[self.dtype])


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a chain leaves.

    Parameters
    ----------
    shape : the sizes after it
    n_params : parameters
    n_bytes : of the stored weights, packed where they are quantized
    obtained : what the first cut removes in its own unit after rounding, 0 without one
    zeros : weights that are zero and still stored
    flops_per_token : of a forward pass, zeros counted like others
    bits : of the weights in the blocks, None where they are not quantized
    """

    shape: Shape
    n_params: int
    n_bytes: int
    obtained: float
    zeros: int
    flops_per_token: float
    bits: int | None = None


def left_by(model: Sized, chain: Chain) -> Left | None:
    """What a chain leaves of a model; None for a chain that has a step of which shapes do not tell.

    Recoveries leave sizes as they are.
    """
    shape, obtained, zeros, bits, zero_points = model.shape, 0.0, 0, None, False
    first = True
    for link in chain.links:
        if link.name in RECOVERIES:
            continue
        if link.name in _QUANTIZERS:
            if set(link.fields) - {"symmetric"} or link.scope not in (None, "all"):
                return None
            bits = _QUANTIZERS[link.name](link)
            zero_points = link.name != "int8" and not link.fields.get("symmetric")
            continue
        if link.name not in _CUTS or link.amount is None or isinstance(link.amount, str) or "of" in link.fields:
            return None
        cut = _CUTS[link.name](shape, model.entry, link)
        if cut is None:
            return None
        shape, share, zeroed = cut
        zeros += zeroed
        obtained, first = (share if first else obtained), False
    if bits is not None and shape.shortcuts:
        return None
    counts = accounting.count_shape(shape, bytes_per_param=BYTES[model.dtype])
    n_bytes = counts.n_bytes
    if bits is not None:
        itemsize = BYTES[model.dtype]
        weights, rows = _block_matrices(shape)
        # As `compress.quantize.packed_bytes`, but for what is rounded up to whole bytes matrix by matrix.
        packed = math.ceil(weights * bits / 8) + rows * itemsize + (math.ceil(rows * bits / 8) if zero_points else 0)
        n_bytes -= weights * itemsize - packed
    return Left(
        shape=shape,
        n_params=counts.n_params,
        n_bytes=n_bytes,
        obtained=obtained,
        zeros=zeros,
        flops_per_token=counts.flops_per_token,
        bits=bits,
    )


def cache_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """Bytes of one token of one sequence in the cache: a key and a value of K heads, every layer."""
    return sum(shape.heads_of(layer)[1] * sum(shape.widths_of(layer)) for layer in range(shape.layers)) * itemsize


def memory_bytes(model: Sized, left: Left, context: int, batch: int) -> int:
    """Bytes of weights, cache and activations while `batch` sequences of `context` tokens are written.

    Notes
    -----
    Activations are those of one block and of the logits of one token a sequence: the stream twice, queries, keys,
    values and the MLP's inner width, for at most `ACTIVATION_TOKENS` tokens. What a program and its libraries take up
    besides is not in it. Quantized weights count as packed, which a runtime for such weights holds them as.
    """
    shape, itemsize = left.shape, BYTES[model.dtype]
    cache = context * batch * cache_bytes_per_token(shape, itemsize)
    inner = (
        2 * shape.hidden
        + (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        + 2 * max(shape.ffn_of(layer) for layer in range(shape.layers))
    )
    at_once = min(context * batch, ACTIVATION_TOKENS)
    return left.n_bytes + cache + (at_once * inner + batch * shape.vocab) * itemsize


RECOVERIES = ("lora", "full", "distill", "block")
"""Steps that train what is there and change no size."""

_Cut = tuple[Shape, float, int]
"""The shape after a cut, what it removes in its own unit, weights that are zero."""


def _neurons(shape: Shape, entry: Architecture, link: Link) -> _Cut | None:
    if shape.ffns is not None or entry.lacking(["causal", "dense"]) is not None:
        return None
    multiple = rounding(shape.ffn, _whole(link, "round_to"), at=shape.hidden)
    width = cut_width(shape.ffn, _amount(link), multiple)
    return replace(shape, ffn=width), 1 - width / shape.ffn, 0


def _hidden(shape: Shape, entry: Architecture, link: Link) -> _Cut | None:
    if entry.kind != "causal" or shape.shortcuts or shape.experts or not entry.head_dim or not _turns(entry):
        return None
    heads = shape.heads if entry.hidden_multiple_of_heads else 1
    multiple = rounding(shape.hidden, _whole(link, "round_to"), multiple_of=heads)
    width = cut_width(shape.hidden, _amount(link), multiple)
    after = shape if width == shape.hidden else replace(shape, hidden=width, tied=False)
    return after, 1 - width / shape.hidden, 0


def _sliced(shape: Shape, entry: Architecture, link: Link) -> _Cut | None:
    if entry.kind != "causal" or shape.shortcuts or shape.experts or not _turns(entry):
        return None
    multiple, amount = _whole(link, "round_to") or 8, _amount(link)
    asked = int(shape.hidden * (1 - amount) + 1e-9)
    width = min(max(asked - asked % multiple, multiple), shape.hidden) if amount else shape.hidden
    if width == shape.hidden:
        return shape, 0.0, 0
    after = replace(shape, hidden=width, tied=False, shortcuts=True, final=shape.final_size)
    return after, 1 - width / shape.hidden, 0


def _blocks(shape: Shape, entry: Architecture, link: Link) -> _Cut | None:
    if entry.kind != "causal" or shape.shortcuts or shape.stored is not None:
        return None
    kept = cut_width(shape.layers, _amount(link), 1)
    return replace(shape, layers=kept), 1 - kept / shape.layers, 0


def _zeros(shape: Shape, entry: Architecture, link: Link) -> _Cut | None:
    if shape.encoder is not None or link.scope not in (None, "all"):
        return None
    return shape, _amount(link), int(_amount(link) * _block_matrices(shape)[0])


def _turns(entry: Architecture) -> bool:
    """Whether the stream can be rotated: as `mariotte.compress.rotation.cannot_turn` says it."""
    return entry.turns


_CUTS: Mapping[str, Callable[[Shape, Architecture, Link], _Cut | None]] = {
    "ffn": _neurons,
    "prunenet": _neurons,
    "prunenet-random": _neurons,
    "slice": _hidden,
    "slicegpt": _sliced,
    "shortgpt": _blocks,
    "sleb": _blocks,
    "laco": _blocks,
    "magnitude": _zeros,
    "wanda": _zeros,
    "sparsegpt": _zeros,
}


def _asked_bits(link: Link) -> int:
    return int(link.amount) if isinstance(link.amount, int | float) else 8


_QUANTIZERS: Mapping[str, Callable[[Link], int]] = {"int8": lambda link: 8, "rtn": _asked_bits, "gptq": _asked_bits}


def _amount(link: Link) -> float:
    assert isinstance(link.amount, int | float), link
    return float(link.amount)


def _whole(link: Link, name: str) -> int | None:
    value = link.fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _block_matrices(shape: Shape) -> tuple[int, int]:
    """Weights of the matrices of attention and MLP in all blocks, and their rows: outputs, each with a scale."""
    attentions, ins = 1 + shape.cross, 2 if shape.gated else 1
    weights = rows = 0
    for layer in range(shape.blocks):
        query, keys = (heads * shape.head_dim for heads in shape.heads_of(layer))
        ffn, written = shape.ffn_of(layer), shape.written_by(layer)
        mlps = shape.experts or 1
        weights += shape.hidden * (2 * query + 2 * keys) * attentions + ffn * (ins * shape.hidden + written) * mlps
        rows += (query + 2 * keys + shape.hidden) * attentions + (ins * ffn + written) * mlps
    return weights, rows
