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
    """

    n_params: int
    n_params_non_embedding: int
    n_bytes: int
    flops_per_token: float
    attention: int
    ffn: int
    embeddings: int


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
    ffn_matrices = s.hidden * s.ffn * (ins + 1)
    ffn_biases = (ins * s.ffn + s.hidden) * s.mlp_bias
    norms = 2 * s.hidden * s.layers + s.hidden
    embeddings = s.vocab * s.hidden * (1 if s.tied else 2)
    attention = s.layers * (attention_matrices + attention_biases)
    ffn = s.layers * (ffn_matrices + ffn_biases)
    non_embedding = attention + ffn + norms
    matrices = s.layers * (attention_matrices + ffn_matrices) + s.vocab * s.hidden
    return Counts(
        n_params=non_embedding + embeddings,
        n_params_non_embedding=non_embedding,
        n_bytes=round((non_embedding + embeddings) * bytes_per_param),
        flops_per_token=2.0 * matrices + 4.0 * s.layers * query * context,
        attention=attention,
        ffn=ffn,
        embeddings=embeddings,
    )
