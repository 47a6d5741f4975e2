"""A loaded model seen through its family's entry, with what has been done to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mariotte import accounting, architectures
from mariotte.accounting import Counts
from mariotte.architectures import Architecture, Kind, Shape


@dataclass(frozen=True, kw_only=True)
class Done:
    """What one step did to a model.

    Parameters
    ----------
    step : canonical text of the link
    name, unit, family : of the step
    amount : as asked, in the step's unit; None for a step without one
    obtained : as obtained after rounding, in the same unit
    scope : the part of the model that the step worked on
    zeros : weights that the step set to zero
    in_scope : weights that were in its scope; 0 for a step that zeroes nothing
    tokens : tokens seen, for a recovery
    facts : widths before and after, rounding, notes: small and plain JSON
    """

    step: str
    name: str
    unit: str
    family: str
    amount: float | None
    obtained: float | None
    scope: str = "all"
    zeros: int = 0
    in_scope: int = 0
    tokens: int = 0
    facts: Mapping[str, Any]


class Block:
    """One decoder block: its norms and projections, whatever the family calls them."""

    def __init__(self, module: nn.Module, entry: Architecture) -> None:
        self.module, self.entry = module, entry

    def _linear(self, path: str) -> nn.Linear:
        return cast(nn.Linear, self.module.get_submodule(path))

    @property
    def attention_norm(self) -> nn.Module:
        """The norm that feeds attention."""
        return self.module.get_submodule(self.entry.attention_norm)

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm that feeds the MLP."""
        return self.module.get_submodule(self.entry.mlp_norm)

    @property
    def query(self) -> nn.Linear:
        """(N·H, D)."""
        return self._linear(self.entry.query)

    @property
    def key(self) -> nn.Linear:
        """(K·H, D)."""
        return self._linear(self.entry.key)

    @property
    def value(self) -> nn.Linear:
        """(K·H, D)."""
        return self._linear(self.entry.value)

    @property
    def output(self) -> nn.Linear:
        """(D, N·H)."""
        return self._linear(self.entry.output)

    @property
    def gate(self) -> nn.Linear | None:
        """(F, D), or None for an MLP without a gate."""
        return None if self.entry.gate is None else self._linear(self.entry.gate)

    @property
    def up(self) -> nn.Linear:
        """(F, D)."""
        return self._linear(self.entry.up)

    @property
    def down(self) -> nn.Linear:
        """(D, F)."""
        return self._linear(self.entry.down)

    @property
    def attention_shortcut(self) -> nn.Linear | None:
        """(D, D), what the stream passes beside attention, or None where it is added as it is."""
        return self._shortcut(self.entry.attention_shortcut)

    @property
    def mlp_shortcut(self) -> nn.Linear | None:
        """(D, D), or (final, D) in the last block: what the stream passes beside the MLP; None as above."""
        return self._shortcut(self.entry.mlp_shortcut)

    def _shortcut(self, path: str) -> nn.Linear | None:
        found = self.module.get_submodule(path) if self.entry.irregular else None
        return found if isinstance(found, nn.Linear) else None

    @property
    def attention(self) -> tuple[nn.Linear, ...]:
        """The matrices of attention: query, key, value, output."""
        return (self.query, self.key, self.value, self.output)

    @property
    def ffn(self) -> tuple[nn.Linear, ...]:
        """The matrices of the MLP: gate if there is one, up, down."""
        return (*(() if self.gate is None else (self.gate,)), self.up, self.down)


class Model:
    """A transformers model, its tokenizer, its entry, and what was done to it.

    Parameters
    ----------
    hf : the transformers model, in eval mode
    tokenizer : its tokenizer, None when the folder has none
    name : as the user named it
    fingerprint : hash of config and weights as they were loaded
    stored_dtype : dtype of the checkpoint that it came from, in which bytes are counted
    done : what was done to it, in order
    derived : whether some of it was done since it was loaded, so that the fingerprint is its base's
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        name: str,
        fingerprint: str,
        stored_dtype: torch.dtype = torch.float32,
        done: Sequence[Done] = (),
        derived: bool = False,
    ) -> None:
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.fingerprint, self.stored_dtype = fingerprint, stored_dtype
        self.done, self.derived = tuple(done), derived
        self.entry = architectures.find(hf.config.model_type)

    @property
    def kind(self) -> Kind:
        """What its family predicts: causal, masked or seq2seq."""
        return self.entry.kind

    @property
    def config(self) -> dict[str, Any]:
        """The config as plain values, describing the model as it is now."""
        return self.hf.config.to_dict()

    @property
    def shape(self) -> Shape:
        """Sizes, from the config."""
        return architectures.shape(self.config)

    @property
    def counts(self) -> Counts:
        """Parameters, bytes in the stored dtype, and FLOPs, from the shapes alone.

        What was quantized counts as its packed integers take, unless a later step has worked on the weights since.
        """
        counted = accounting.count_shape(self.shape, bytes_per_param=self.stored_dtype.itemsize)
        saved = 0
        for done in reversed(self.done):
            if done.family != "quantization":
                break
            saved += done.facts["weights"] * self.stored_dtype.itemsize - done.facts["packed_bytes"]
        return replace(counted, n_bytes=counted.n_bytes - saved)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.weight.device

    @property
    def blocks(self) -> list[Block]:
        """The decoder blocks, from input to output."""
        return [Block(module, self.entry) for module in cast(nn.ModuleList, self.hf.get_submodule(self.entry.blocks))]

    @property
    def embeddings(self) -> nn.Embedding:
        """(V, D)."""
        return cast(nn.Embedding, self.hf.get_submodule(self.entry.embeddings))

    @property
    def head(self) -> nn.Linear:
        """(V, D); shares its weight with the embeddings when tied."""
        return cast(nn.Linear, self.hf.get_submodule(self.entry.head))

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head."""
        return self.hf.get_submodule(self.entry.final_norm)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits of every position, (B, T, V), in the model's dtype; no cache."""
        return self.hf(input_ids=tokens_BT.to(self.device), use_cache=False).logits

    def copy(self) -> Model:
        """An independent copy: cutting it leaves this model as it is."""
        return Model(
            copy.deepcopy(self.hf),
            self.tokenizer,
            name=self.name,
            fingerprint=self.fingerprint,
            stored_dtype=self.stored_dtype,
            done=self.done,
            derived=self.derived,
        )

    def rewritten(self, done: Done) -> Model:
        """The same model, with the last entry of its history told otherwise."""
        self.done = self.done[:-1]
        return self.after(done)

    def after(self, done: Done) -> Model:
        """The same model, with one more entry in its history."""
        return Model(
            self.hf,
            self.tokenizer,
            name=self.name,
            fingerprint=self.fingerprint,
            stored_dtype=self.stored_dtype,
            done=(*self.done, done),
            derived=True,
        )

    def measured_params(self) -> int:
        """Parameters actually held, shared ones once: what the accounting must equal."""
        return sum(parameter.numel() for parameter in self.hf.parameters())

    def matrices(self, *scopes: str) -> list[nn.Linear]:
        """The blocks' matrices of these scopes (all, attention, ffn), each once; for the scope head also the head."""
        parts = {*scopes, "attention", "ffn"} if "all" in scopes else set(scopes)
        found = [
            matrix
            for block in self.blocks
            for matrix in (
                *(block.attention if "attention" in parts else ()),
                *(block.ffn if "ffn" in parts else ()),
            )
        ]
        return [*found, *([self.head] if "head" in parts else [])]

    def zeros(self, *scopes: str) -> int:
        """Weights of the matrices of these scopes (without any: of all the blocks' matrices) that are exactly zero."""
        return sum(int((matrix.weight == 0).sum()) for matrix in self.matrices(*(scopes or ("all",))))
