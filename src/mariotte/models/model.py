"""A loaded model seen through its family's entry, with what has been done to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mariotte import accounting, architectures
from mariotte.accounting import Counts
from mariotte.architectures import Architecture, Kind, Shape
from mariotte.errors import ModelError
from mariotte.models.modeling_mariotte import LowRank
from mariotte.models.paging import pager_of, pieces


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


SCOPES = ("all", "attention", "ffn", "embeddings", "head")
"""Named groups of weight matrices; see `Model.paths`."""


def forward(hf: nn.Module, kind: Kind, tokens_BT: Tensor, written_BU: Tensor | None = None) -> Tensor:
    """Logits of a transformers model of one kind; see `Model.logits`."""
    if kind == "causal":
        return hf(input_ids=tokens_BT, use_cache=False).logits
    # Said, so that a token that happens to be the padding's is read like any other.
    everything_BT = torch.ones_like(tokens_BT)
    if kind == "masked":
        return hf(input_ids=tokens_BT, attention_mask=everything_BT).logits
    written_BU = tokens_BT if written_BU is None else written_BU
    return hf(input_ids=tokens_BT, attention_mask=everything_BT, decoder_input_ids=written_BU, use_cache=False).logits


class Stacked:
    """The same matrix of all experts of a block, which transformers holds in one parameter, seen as a layer.

    Parameters
    ----------
    module : what holds it
    name : of the parameter in it; that of the biases, if there are any, ends in ``_bias``
    transposed : held as (E, I, O) and not as (E, O, I)
    """

    def __init__(self, module: nn.Module, name: str, *, transposed: bool) -> None:
        self.weight = cast(nn.Parameter, getattr(module, name))
        self.bias = cast("nn.Parameter | None", getattr(module, f"{name}_bias", None))
        self.transposed = transposed

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, and the biases if there are any."""
        yield from (parameter for parameter in (self.weight, self.bias) if parameter is not None)

    def applied(self, expert: int, x_SI: Tensor) -> Tensor:
        """What the matrix of one expert makes of its inputs, (S, O)."""
        weight = self.weight[expert]
        bias_O = None if self.bias is None else self.bias[expert]
        return nn.functional.linear(x_SI, weight.T if self.transposed else weight, bias_O)

    @property
    def experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """O of one expert."""
        return self.weight.shape[2 if self.transposed else 1]

    @property
    def in_features(self) -> int:
        """I of one expert."""
        return self.weight.shape[1 if self.transposed else 2]


class OfExpert:
    """The matrix of one expert of a block, seen as a layer: what it reads are the tokens that take the expert.

    Parameters
    ----------
    held : module that holds the MLPs of all experts
    stacked : the matrix of all of them
    number : of the expert
    before : for a matrix that reads neurons, the one of all experts that gives their gates and ups; None for that one
    """

    def __init__(self, held: nn.Module, stacked: Stacked, number: int, before: Stacked | None = None) -> None:
        self.held, self.stacked, self.number, self.before = held, stacked, number, before

    @property
    def weight(self) -> Tensor:
        """As it is held, (O, I) or (I, O): a view, to be written through at once or not at all."""
        return self.stacked.weight[self.number]

    @property
    def transposed(self) -> bool:
        """Held as (I, O)."""
        return self.stacked.transposed

    @property
    def out_features(self) -> int:
        """O."""
        return self.stacked.out_features

    @property
    def in_features(self) -> int:
        """I."""
        return self.stacked.in_features

    def register_forward_pre_hook(
        self, hook: Callable[[OfExpert, tuple[Tensor, ...]], None]
    ) -> torch.utils.hooks.RemovableHandle:
        """Have `hook` called with what the matrix reads, (S, I), whenever the experts run and a token takes this one.

        Notes
        -----
        What reads neurons has its expert's gate and up computed once more.
        """

        def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_MD, taken_Mk = cast("tuple[Tensor, Tensor]", arguments[:2])
            x_SI = x_MD[(taken_Mk == self.number).any(1)]
            if self.before is not None:
                x_SI = cast(Any, module)._apply_gate(self.before.applied(self.number, x_SI))
            if len(x_SI):
                hook(self, (x_SI,))

        return self.held.register_forward_pre_hook(watch)


class Block:
    """One block: its norms and projections, whatever the family calls them.

    Parameters
    ----------
    module : the block itself
    entry : of its stack: an encoder may keep its parts elsewhere than the decoder
    path : of the block, from the model
    """

    def __init__(self, module: nn.Module, entry: Architecture, path: str) -> None:
        self.module, self.entry, self.path = module, entry, path

    def _linear(self, path: str) -> nn.Linear:
        if not path:
            raise ModelError(
                f"{self.entry.model_type} holds query, key and value in one matrix, {self.entry.fused}: ask for the "
                "block's attention instead"
            )
        return cast(nn.Linear, self._at(path))

    def _at(self, path: str) -> nn.Module | Stacked:
        experts = self.entry.experts
        if experts and path.startswith(f"{experts}."):
            held = self.module.get_submodule(experts)
            return Stacked(held, path.removeprefix(f"{experts}."), transposed=self.entry.experts_transposed)
        return self.module.get_submodule(path)

    def factors(self, path: str) -> list[tuple[str, nn.Linear]]:
        """A matrix of the block by its path from it; of one that is the product of two, these, the first to read first.

        Raises
        ------
        ModelError
            When the family has no such matrix.
        """
        matrix = cast("nn.Linear | LowRank", self._linear(path))
        if isinstance(matrix, LowRank):
            return [(f"{path}.inner", matrix.inner), (f"{path}.outer", matrix.outer)]
        return [(path, matrix)]

    def _of_mlp(self, path: str) -> nn.Linear:
        if self.entry.experts or (self.entry.fused_mlp and path != self.entry.down):
            held = "the MLPs of all experts together" if self.entry.experts else "gate and up in one matrix"
            raise ModelError(f"{self.entry.model_type} holds {held}: ask for the block's ffn instead")
        return self._linear(path)

    @property
    def attention_norm(self) -> nn.Module:
        """The norm that feeds attention."""
        return self.module.get_submodule(self.entry.attention_norm)

    @property
    def mlp_norm(self) -> nn.Module:
        """The norm that feeds the MLP."""
        return self.module.get_submodule(self.entry.mlp_norm)

    @property
    def head_norms(self) -> tuple[nn.Module, ...]:
        """The norms of queries and of keys, where there are any."""
        return tuple(self.module.get_submodule(path) for path in self.entry.head_norms)

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
        return None if self.entry.gate is None else self._of_mlp(self.entry.gate)

    @property
    def up(self) -> nn.Linear:
        """(F, D)."""
        return self._of_mlp(self.entry.up)

    @property
    def down(self) -> nn.Linear:
        """(D, F)."""
        return self._of_mlp(self.entry.down)

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
        """The matrices of attention: query, key, value or the one that holds them, output; those of cross attention.

        Of one that is the product of two, these; likewise below.
        """
        return tuple(matrix for path in self.entry.attention_paths for _, matrix in self.factors(path))

    @property
    def ffn(self) -> tuple[nn.Linear, ...]:
        """The matrices of the MLP: gate if there is one, up, or the one that holds both, down; those of all experts."""
        return tuple(matrix for path in self.entry.ffn_paths for _, matrix in self.factors(path))


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
        self.entry = architectures.of(hf.config.to_dict())

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
    def added_times(self) -> float:
        """The number with which what a block adds to the stream is multiplied: 1 in most families."""
        return float(self.config.get(self.entry.residual, 1.0)) if self.entry.residual else 1.0

    @property
    def rounded(self) -> tuple[Done, ...]:
        """The quantizations whose integers the weights still stand for: those after which nothing else was done."""
        others = [place for place, done in enumerate(self.done, 1) if done.family != "quantization"]
        return self.done[max(others, default=0) :]

    @property
    def longest(self) -> int | None:
        """Tokens that it reads at most, None where its config sets no bound."""
        return self.entry.longest(self.config)

    @property
    def counts(self) -> Counts:
        """Parameters, bytes in the stored dtype, and FLOPs, from the shapes alone.

        What was quantized counts as its packed integers take, unless a later step has worked on the weights since.
        """
        counted = accounting.count_shape(self.shape, bytes_per_param=self.stored_dtype.itemsize)
        width = self.stored_dtype.itemsize
        saved = sum(done.facts["weights"] * width - done.facts["packed_bytes"] for done in self.rounded)
        return replace(counted, n_bytes=counted.n_bytes - saved)

    @property
    def streamed(self) -> bool:
        """Whether its weights are on disk, and read when something computes with them; see ``load(stream=...)``."""
        return pager_of(self.embeddings.weight) is not None

    @property
    def device(self) -> torch.device:
        """Where the weights are, or are computed with."""
        return self.embeddings.weight.device

    @property
    def blocks(self) -> list[Block]:
        """The blocks, from input to output: an encoder's before the decoder's; one that layers share is there once."""
        return [
            Block(module, entry, f"{entry.blocks}.{index}")
            for entry in self.entry.stacks
            for index, module in enumerate(cast(nn.ModuleList, self.hf.get_submodule(entry.blocks)))
        ]

    @property
    def embeddings(self) -> nn.Embedding:
        """(V, D), or of a width of its own; of an encoder-decoder both stacks read it."""
        return cast(nn.Embedding, self.hf.get_submodule(self.entry.embeddings))

    @property
    def head(self) -> nn.Linear:
        """(V, D); shares its weight with the embeddings when tied."""
        return cast(nn.Linear, self.hf.get_submodule(self.entry.head))

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last block.

        Raises
        ------
        ModelError
            When the family has none.
        """
        if not self.entry.final_norm:
            raise ModelError(
                f"{self.entry.model_type} has no norm behind its last block: ask a block for its own norms"
            )
        return self.hf.get_submodule(self.entry.final_norm)

    def logits(self, tokens_BT: Tensor, written_BU: Tensor | None = None) -> Tensor:
        """Logits of every position in the model's dtype, without a cache.

        Parameters
        ----------
        tokens_BT : what is read
        written_BU : of an encoder-decoder, what the decoder is given; None gives it what the encoder reads

        Returns
        -------
        (B, T, V), of an encoder-decoder (B, U, V): of the token that comes next, or of a masked model that stands there
        """
        written_BU = None if written_BU is None else written_BU.to(self.device)
        return forward(self.hf, self.kind, tokens_BT.to(self.device), written_BU)

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

    def paths(self, *scopes: str) -> dict[str, nn.Linear]:
        """The matrices of these scopes by their path from the model, from input to output, each weight once.

        Of a matrix that is the product of two, these.

        Parameters
        ----------
        scopes : attention: projections of attention, cross attention among them; ffn: of the MLPs; all: both, as in the
            study that compared these scopes; embeddings: tables of tokens, positions and token types; head: the matrix
            that gives the logits, which is the embeddings' where they are tied

        Raises
        ------
        ModelError
            When the model has no such scope.
        """
        if unknown := set(scopes) - set(SCOPES):
            raise ModelError(f"a model's scopes are {', '.join(SCOPES)}, got {', '.join(sorted(unknown))}: take these")
        entry, parts = self.entry, {*scopes, *(("attention", "ffn") if "all" in scopes else ())}
        copies = (name.removesuffix(".weight") for name in entry.copies)
        tables = [
            entry.embeddings,
            *copies,
            *(p for stack in entry.stacks for p in (stack.positions, stack.types) if p),
        ]
        found: dict[str, nn.Linear] = {}
        seen: set[int] = set()

        def add(path: str, matrix: nn.Module | Stacked) -> None:
            weight = cast(nn.Linear, matrix).weight
            if id(weight) not in seen:
                seen.add(id(weight))
                found[path] = cast(nn.Linear, matrix)

        for path in tables if "embeddings" in parts else ():
            add(path, self.hf.get_submodule(path))
        for block in self.blocks:
            within = (
                *(block.entry.attention_paths if "attention" in parts else ()),
                *(block.entry.ffn_paths if "ffn" in parts else ()),
            )
            for path in within:
                for place, matrix in block.factors(path):
                    add(f"{block.path}.{place}", matrix)
        if "head" in parts:
            add(entry.head, self.head)
        return found

    def matrices(self, *scopes: str) -> list[nn.Linear]:
        """The matrices of these scopes, from input to output, each weight once; see `paths`."""
        return list(self.paths(*scopes).values())

    def zeros(self, *scopes: str) -> int:
        """Weights of the matrices of these scopes (without any: of all the blocks' matrices) that are exactly zero."""
        matrices = self.matrices(*(scopes or ("all",)))
        return sum(int((piece == 0).sum()) for matrix in matrices for piece in pieces(matrix.weight))
