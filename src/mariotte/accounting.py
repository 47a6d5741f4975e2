"""Parameters, bytes and FLOPs from a config's shapes alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mariotte.architectures import Shape, shape
from mariotte.errors import ModelError

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes a parameter, by the dtype's name in a config."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model of a given shape costs.

    Parameters
    ----------
    n_params : parameters, a tied embedding counted once
    n_params_non_embedding : without the input embedding and the output head, tied or not
    n_bytes : bytes of the parameters in the stated dtype
    flops_per_token : forward FLOPs a token (a multiply and an add are two), output head included, embedding look-up not
    attention, ffn, embeddings : parameters of all attention projections, of all MLPs, of embedding and head
    shortcuts : of the matrices through which the blocks of a sliced model hand on their input
    """

    n_params: int
    n_params_non_embedding: int
    n_bytes: int
    flops_per_token: float
    attention: int
    ffn: int
    embeddings: int
    shortcuts: int = 0


def count(config: Mapping[str, Any], *, context: int = 0, dtype: str | None = None) -> Counts:
    """Count a model from its config.

    Parameters
    ----------
    config : the content of ``config.json``
    context : tokens already in the cache; each adds the cost of attending to it
    dtype : name of the parameters' dtype; None takes the config's own, float32 if it states none

    Raises
    ------
    ModelError
        When the family is not described, a size is missing or the dtype has no known size.

    Notes
    -----
    FLOPs follow the usual ``2 n`` for every matrix a token passes, plus ``4 L N H context`` for scores and weighted
    sum.
    Norms, rotary embeddings and softmax are left out: below one percent for any width in use.
    """
    name = dtype or str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in BYTES:
        raise ModelError(f"dtype must be one of {', '.join(BYTES)}, got {name!r}")
    return count_shape(shape(config), context=context, bytes_per_param=BYTES[name])


def count_shape(s: Shape, *, context: int = 0, bytes_per_param: float = 4) -> Counts:
    """Count a model from its sizes; see `count`."""
    query, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention_matrices = s.hidden * (2 * query + 2 * keys)
    attention_biases = (query + 2 * keys) * s.attention_bias + s.hidden * s.output_bias
    ins = 2 if s.gated else 1
    widths = [(s.ffn_of(layer), s.written_by(layer)) for layer in range(s.layers)]
    ffn_matrices = sum(ffn * (ins * s.hidden + written) for ffn, written in widths)
    ffn_biases = sum(ins * ffn + written for ffn, written in widths) * s.mlp_bias
    # Norms have weights, or are folded into the matrices behind them.
    norms = 0 if s.shortcuts else 2 * s.hidden * s.layers + s.final_size
    shortcuts = sum(s.hidden * (s.hidden + written) for _, written in widths) * s.shortcuts
    embeddings = s.vocab * (s.hidden + (0 if s.tied else s.final_size))
    attention = s.layers * (attention_matrices + attention_biases)
    ffn = ffn_matrices + ffn_biases
    non_embedding = attention + ffn + norms + shortcuts
    matrices = s.layers * attention_matrices + ffn_matrices + shortcuts + s.vocab * s.final_size
    return Counts(
        n_params=non_embedding + embeddings,
        n_params_non_embedding=non_embedding,
        n_bytes=round((non_embedding + embeddings) * bytes_per_param),
        flops_per_token=2.0 * matrices + 4.0 * s.layers * query * context,
        attention=attention,
        ffn=ffn,
        embeddings=embeddings,
        shortcuts=shortcuts,
    )
