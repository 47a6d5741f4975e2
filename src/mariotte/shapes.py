"""What a chain leaves of a model, from shapes alone: parameters, bytes, memory; no weights, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mariotte import accounting, architectures
from mariotte.accounting import BYTES, Counts, cut_width, rounding
from mariotte.architectures import Architecture, Need, Shape
from mariotte.chain import Chain, Link
from mariotte.cuts import blocks, common, groups, heads, matrices, neurons, ranks, stream
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
    shape : the sizes after it; where text decides about some of them, those of a model all of whose blocks lose alike
    n_params : parameters
    n_bytes : of the stored weights, packed where they are quantized
    shares : what each cut removes in its own unit after rounding, in their order
    zeros : weights that are zero and still stored
    flops_per_token : of a forward pass, zeros counted like others
    bits : of the weights in the blocks, None where they are not quantized
    slack : parameters by which `n_params` may be off, where text decides what goes
    decided : what text decides, so that sizes do not tell it, a clause for each step; nothing where they tell all
    most : the largest sizes that are possible, where text decides; None where `shape` is what is left
    """

    shape: Shape
    n_params: int
    n_bytes: int
    shares: tuple[float, ...] = ()
    zeros: int = 0
    flops_per_token: float
    bits: int | None = None
    slack: int = 0
    decided: tuple[str, ...] = ()
    most: Shape | None = None

    @property
    def obtained(self) -> float:
        """What the first cut removes in its own unit after rounding, 0 without one."""
        return self.shares[0] if self.shares else 0.0


def left_by(model: Sized, chain: Chain) -> Left | None:
    """What a chain leaves of a model; None for a chain that has a step of which shapes do not tell.

    Recoveries leave sizes as they are. See `foretold` for why they do not tell.
    """
    try:
        return foretold(model, chain)
    except ModelError:
        return None


def foretold(model: Sized, chain: Chain) -> Left:
    """What a chain leaves of a model.

    Raises
    ------
    ModelError
        When a step cannot work on what the steps before it leave, or sizes do not tell what it leaves.
    """
    here = Here(model=model)
    for place, link in enumerate(chain.links):
        try:
            here = after(here, link)
        except ModelError as error:
            on = f"what {Chain(chain.links[:place])} leaves of {model.name}" if place else model.name
            raise ModelError(f"{link.name} cannot be foretold on {on}: it {error}") from None
    itemsize = BYTES[model.dtype]
    counts = accounting.count_shape(here.model.shape, bytes_per_param=itemsize)
    beside = 0 if here.told is None else here.told - counts.n_params
    width = itemsize if here.bits is None else here.bits / 8
    return Left(
        shape=here.model.shape,
        n_params=counts.n_params + beside,
        n_bytes=counts.n_bytes - here.saved + round(beside * width),
        shares=here.shares,
        zeros=here.zeros,
        flops_per_token=counts.flops_per_token,
        bits=here.bits,
        slack=here.slack,
        decided=here.decided,
        most=here.most,
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
    besides is not in it. Quantized weights count as packed, which a runtime for such weights holds them as. Where text
    decides which heads and neurons go, cache and activations are the most that they can be.
    """
    shape, itemsize = left.most or left.shape, BYTES[model.dtype]
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


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """What a step leaves.

    Parameters
    ----------
    shape : after it; where text decides, that of a model all of whose blocks lose alike
    share : what it removes in its own unit
    zeros : weights that are zero after it
    irregular : its result is of a class of ours
    told, slack : parameters after it and by how many they may be off, where `shape` has not just as many
    decided : what text decides, in a clause; empty where sizes tell all
    most : the largest sizes that are possible then
    grain : of what the inputs of the attention output and of the MLP's last matrix are multiples then
    """

    shape: Shape
    share: float
    zeros: int = 0
    irregular: bool = False
    told: int | None = None
    slack: int = 0
    decided: str = ""
    most: Shape | None = None
    grain: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Here:
    """A model on its way through a chain.

    Parameters
    ----------
    model : its sizes now
    shares, zeros, slack, decided, most, bits : as of `Left`
    told : parameters, where the shape has not just as many
    grain : of what the inputs of the attention output and of the MLP's last matrix are multiples, where text decides
    rounded : quantizations, while nothing else was done since
    saved : bytes that their packed integers take less
    """

    model: Sized
    shares: tuple[float, ...] = ()
    zeros: int = 0
    told: int | None = None
    slack: int = 0
    decided: tuple[str, ...] = ()
    most: Shape | None = None
    grain: tuple[int, int] | None = None
    rounded: tuple[Link, ...] = ()
    saved: int = 0
    bits: int | None = None


class UntoldError(ModelError):
    """Sizes do not tell what a step leaves, or whether it can work: text decides, or nobody described it."""


def after(here: Here, link: Link) -> Here:
    """One step further.

    Raises
    ------
    ModelError
        When the step cannot work on such a model, in a clause after its name.
    UntoldError
        When sizes do not tell what it leaves.
    """
    if link.name in RECOVERIES:
        if here.rounded:
            raise ModelError(f"trains weights, and {here.rounded[-1]} rounds them before: put it before")
        return here
    if link.name in _QUANTIZERS:
        return _rounded(here, link, _QUANTIZERS[link.name])
    if link.name not in _METHODS:
        raise UntoldError("is a step of which sizes alone tell nothing: measure it")
    if "of" in link.fields:
        raise UntoldError("counts its amount in parameters of the dense model: ask in its own unit")
    if not isinstance(link.amount, int | float) or not 0 <= link.amount < 1:
        raise ModelError(f"needs a share in [0, 1), got {link}: such as {link.name}@0.3")
    method, model = _METHODS[link.name], here.model
    _check(model, link, method)
    if reason := method.refuse(model, link):
        raise ModelError(reason)
    if here.decided and not method.zeroes:
        raise UntoldError(f"needs sizes that are known, and text decides {here.decided[-1]}: measure it")
    cut = method.cut(model, link)
    entry = model.entry
    if cut.irregular and not entry.irregular:
        entry = architectures.in_own_class(entry)
    if entry.irregular:  # as `architectures.of` reads it from the config of such a model
        entry = replace(
            entry,
            rms_norm=entry.rms_norm or cut.shape.shortcuts,
            grouped=entry.grouped and cut.shape.widths is None,
        )
    return replace(
        here,
        model=replace(model, shape=cut.shape, entry=entry),
        shares=(*here.shares, cut.share),
        zeros=here.zeros + cut.zeros,
        told=here.told if method.zeroes else cut.told,
        slack=here.slack + cut.slack,
        decided=(*here.decided, cut.decided) if cut.decided else here.decided,
        most=cut.most or here.most,
        grain=cut.grain or here.grain,
        # What works on rounded weights leaves them between their levels.
        rounded=(),
        saved=0,
        bits=None,
    )


def _check(model: Sized, link: Link, step: _Method | _Quantizer) -> None:
    scope = link.scope or step.scopes[0]
    if scope not in step.scopes:
        raise ModelError(f"has no scope {scope!r}: it has {', '.join(step.scopes)}")
    narrows = isinstance(step, _Method) and step.narrows
    reason = common.refuse_by_family(model, step.needs, mixtures=step.mixtures, cuts_widths=narrows, scope=scope)
    if reason is not None:
        raise ModelError(reason)


# Cuts.


def _nothing(model: Sized, link: Link) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class _Method:
    """What sizes tell of a method that removes; `needs`, `mixtures` and `scopes` are those of its class.

    Parameters
    ----------
    cut : what it leaves
    refuse : why it cannot work on a model, besides what its family says
    narrows : it takes rows and columns of matrices away
    zeroes : it sets weights to zero, and changes no size
    """

    cut: Callable[[Sized, Link], _Cut]
    refuse: Callable[[Sized, Link], str | None] = _nothing
    needs: tuple[Need, ...] = ("causal",)
    mixtures: bool = False
    scopes: tuple[str, ...] = ("all",)
    narrows: bool = True
    zeroes: bool = False


def _amount(link: Link) -> float:
    assert isinstance(link.amount, int | float), link
    return float(link.amount)


def _scope(link: Link) -> str:
    return link.scope or "all"


def _field(link: Link, name: str, default: float) -> float:
    value = link.fields.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _whole(link: Link, name: str) -> int | None:
    value = link.fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _fact(link: Link, name: str, default: bool) -> bool:
    value = link.fields.get(name)
    return value if isinstance(value, bool) else default


def _gone(before: Shape, after: Shape) -> int:
    return accounting.count_shape(before).n_params - accounting.count_shape(after).n_params


def _in_scope(model: Sized, scope: str) -> int:
    """Weights of the matrices of a scope."""
    return sum(outputs * inputs for outputs, inputs in matrices.matrices_of(model, scope))


def _neurons(model: Sized, link: Link) -> _Cut:
    width, _ = neurons.neuron_width(model, _amount(link), _whole(link, "round_to"))
    return _Cut(shape=replace(model.shape, ffn=width), share=1 - width / model.shape.ffn)


def _refuse_neurons(model: Sized, link: Link) -> str | None:
    return neurons.refuse_unequal_widths(model)


def _hidden(model: Sized, link: Link) -> _Cut:
    shape, entry = model.shape, model.entry
    heads = shape.heads if entry.hidden_multiple_of_heads else 1
    multiple = rounding(shape.hidden, _whole(link, "round_to"), multiple_of=heads)
    width = cut_width(shape.hidden, _amount(link), multiple)
    after = shape if width == shape.hidden else replace(shape, hidden=width, tied=False)
    return _Cut(shape=after, share=1 - width / shape.hidden)


def _sliced(model: Sized, link: Link) -> _Cut:
    shape = model.shape
    width = stream.sliced_width(shape, _amount(link), _whole(link, "round_to") or 8)
    return _Cut(shape=stream.sliced(shape, width), share=1 - width / shape.hidden, irregular=width < shape.hidden)


def _blocks(model: Sized, link: Link) -> _Cut:
    shape = model.shape
    spared = (_whole(link, "first") or 0) + (_whole(link, "last") or 0) if link.name == "sleb" else 0
    kept = blocks.kept_blocks(model, _amount(link), spared)
    # Lists of sizes by block are of equal ones here.
    by_block = {
        name: None if sizes is None else sizes[:kept]
        for name, sizes in (
            ("ffns", shape.ffns),
            ("attentions", shape.attentions),
            ("widths", shape.widths),
            ("ranks", shape.ranks),
        )
    }
    return _Cut(shape=replace(shape, layers=kept, **by_block), share=1 - kept / shape.layers)


def _refuse_blocks(model: Sized, link: Link) -> str | None:
    if link.name == "sleb":
        return blocks.refuse_sparing(model, _whole(link, "first") or 0, _whole(link, "last") or 0)
    if link.name == "laco":
        return blocks.refuse_merging(model, str(link.fields.get("rule", "difference")))
    return blocks.refuse_unlike_blocks(model)


def _heads(model: Sized, link: Link) -> _Cut:
    shape, by = model.shape, link.fields.get("by")
    _, choices = heads.choices_of_heads(model, by if isinstance(by, str) else None)
    queries, kv_heads = heads.nearest_heads(choices, shape.heads * (1 - _amount(link)))
    after = replace(shape, heads=queries, kv_heads=kv_heads)
    fewer = queries < shape.heads
    return _Cut(shape=after, share=1 - queries / shape.heads, irregular=fewer and not model.entry.head_dim)


def _refuse_heads(model: Sized, link: Link) -> str | None:
    return heads.refuse_heads(model)


def _experts(model: Sized, link: Link) -> _Cut:
    shape = model.shape
    kept = cut_width(shape.experts, _amount(link), 1)
    after = replace(shape, experts=kept, active=min(shape.active, kept))
    return _Cut(shape=after, share=1 - kept / shape.experts)


def _refuse_dense(model: Sized, link: Link) -> str | None:
    return neurons.refuse_dense(model)


def _ranks(model: Sized, link: Link) -> _Cut:
    after = replace(model.shape, ranks=ranks.ranks_left(model.shape, _amount(link), _scope(link)))
    gone = _gone(model.shape, after)
    if not gone:
        return _Cut(shape=model.shape, share=0.0)
    return _Cut(shape=after, share=gone / _in_scope(model, _scope(link)), irregular=True)


def _narrowed(model: Sized, link: Link) -> _Cut:
    shape, scope, round_to = model.shape, _scope(link), _whole(link, "round_to")
    queries = _field(link, "queries", 0.5)
    ffns, pairs, values = ranks.widths_left(shape, _amount(link), scope, queries=queries, round_to=round_to)
    after = ranks.with_widths(shape, ffns, pairs, values)
    gone = _gone(shape, after)
    if not gone:
        return _Cut(shape=shape, share=0.0)
    share = gone / _in_scope(model, scope)
    layers = range(shape.layers)
    narrow = any(after.widths_of(layer) != shape.widths_of(layer) for layer in layers)
    by_text = link.fields.get("allocation", "influence") != "uniform" and shape.layers > 1
    if not narrow:
        after = replace(after, widths=shape.widths)
        if not by_text and len(set(ffns)) == 1 and not model.entry.irregular:
            return _Cut(shape=replace(shape, ffn=ffns[0]), share=share)
    if not by_text:
        return _Cut(shape=after, share=share, irregular=True)
    of_neuron, _, of_value = ranks.multiples_of_widths(shape, round_to)
    attention = [shape.heads * shape.widths_of(layer)[1] for layer in layers]
    mlp = [shape.ffn_of(layer) for layer in layers]
    return _Cut(
        shape=after,
        share=share,
        irregular=True,
        decided=f"how the blocks share what {link.name} removes",
        most=replace(after, ffns=tuple(mlp)),
        grain=(
            math.gcd(*attention, *([shape.heads * of_value] if narrow else [])),
            math.gcd(*mlp, *([of_neuron] if list(ffns) != mlp else [])),
        ),
    )


def _refuse_narrowed(model: Sized, link: Link) -> str | None:
    scope = _scope(link)
    plain = scope == "ffn" and link.fields.get("allocation", "influence") == "uniform"
    return ranks.refuse_narrowing(model, scope, plain=plain)


def _pruned(model: Sized, link: Link) -> tuple[range, bool]:
    """The blocks that llm-pruner does not spare, and whether it spares any."""
    pruned = groups.spared_blocks(model.shape.layers, _whole(link, "first"), _whole(link, "last"))
    return pruned, len(pruned) < model.shape.layers


def _groups(model: Sized, link: Link) -> _Cut:
    shape, scope = model.shape, _scope(link)
    pruned, spares = range(shape.layers), False
    if link.name == "llm-pruner":
        pruned, spares = _pruned(model, link)
    of_block, _ = groups.equal_shape(model, _amount(link), scope, _whole(link, "round_to"), irregular=spares)
    share = groups.removed_share(shape, of_block, scope)
    fewer = of_block.heads < shape.heads
    if not spares:
        return _Cut(shape=of_block, share=share, irregular=fewer and not model.entry.head_dim)
    after = groups.sizes_by_block(shape, dict.fromkeys(pruned, of_block))
    if not fewer:
        after = replace(after, attentions=shape.attentions)
    if of_block.ffn == shape.ffn:
        after = replace(after, ffns=shape.ffns)
    return _Cut(shape=after, share=share, irregular=after != shape)


def _refuse_pruner(model: Sized, link: Link) -> str | None:
    return groups.refuse_pruner(model, _scope(link), _pruned(model, link)[0])


def _anywhere(model: Sized, link: Link) -> _Cut:
    """Groups that go wherever text says: their parameters are told, and their places are not."""
    shape, scope, round_to = model.shape, _scope(link), _whole(link, "round_to")
    if _fact(link, "uniform", default=False):
        return _groups(model, link)
    biases = _fact(link, "compensate", default=True)
    removed, slack = groups.removed_of_groups(shape, _amount(link), scope, round_to, biases=biases)
    total, stays, _ = groups.bounds_of_groups(shape, scope, round_to)
    target = min(round(total * _amount(link)), total - stays)
    if not target:
        return _Cut(shape=shape, share=0.0)
    layers = range(shape.layers)
    at_once = [groups.heads_at_once(shape, layer) for layer in layers]
    multiple = rounding(shape.ffn, round_to, at=shape.hidden)
    attentions, ffns = groups.alike(shape, target / total, target, scope, multiple)
    with_biases = replace(
        shape, output_bias=shape.output_bias or biases, down_bias=shape.down_bias or (biases and not shape.mlp_bias)
    )
    parts = common.PARTS[scope]
    after = replace(
        with_biases,
        attentions=tuple(attentions) if "attention" in parts else shape.attentions,
        ffns=tuple(ffns) if "ffn" in parts else shape.ffns,
    )
    mlp = [shape.ffn_of(layer) for layer in layers]
    return _Cut(
        shape=after,
        share=target / total,
        irregular=True,
        told=accounting.count_shape(shape).n_params - removed,
        slack=slack,
        decided=f"which groups {link.name} removes",
        most=with_biases,
        grain=(
            math.gcd(*(shape.heads_of(layer)[0] * shape.head_dim for layer in layers))
            if "attention" not in parts
            else shape.head_dim * math.gcd(*at_once),
            math.gcd(*mlp, *([multiple] if "ffn" in parts else [])),
        ),
    )


def _refuse_anywhere(model: Sized, link: Link) -> str | None:
    return groups.refuse_flap(model, _scope(link), uniform=_fact(link, "uniform", default=False))


def _zeros(model: Sized, link: Link) -> _Cut:
    zeros = int(_amount(link) * _in_scope(model, _scope(link)))
    after = matrices.untied(model) if zeros and _scope(link) == "head" else model.shape
    return _Cut(shape=after, share=_amount(link), zeros=zeros)


_GROUPED = ("all", "attention", "ffn")
_ANY = (*_GROUPED, "head")
_ONE_SHOT = _Method(cut=_zeros, needs=("one text",), mixtures=True, scopes=_GROUPED, narrows=False, zeroes=True)
_BY_SIZE = _Method(cut=_zeros, needs=(), mixtures=True, scopes=_ANY, narrows=False, zeroes=True)
_OF_NEURONS = _Method(cut=_neurons, refuse=_refuse_neurons)
_OF_BLOCKS = _Method(cut=_blocks, refuse=_refuse_blocks, mixtures=True, narrows=False)

_METHODS: Mapping[str, _Method] = {
    "ffn": _OF_NEURONS,
    "prunenet": _OF_NEURONS,
    "prunenet-random": _OF_NEURONS,
    "slice": _Method(cut=_hidden, refuse=lambda model, link: stream.refuse_slice(model)),
    "slicegpt": _Method(cut=_sliced, refuse=lambda model, link: stream.refuse_slicegpt(model)),
    "shortgpt": _OF_BLOCKS,
    "sleb": _OF_BLOCKS,
    "laco": _OF_BLOCKS,
    "heads": _Method(cut=_heads, refuse=_refuse_heads, mixtures=True),
    "flap": _Method(cut=_anywhere, refuse=_refuse_anywhere, scopes=_GROUPED),
    "llm-pruner": _Method(cut=_groups, refuse=_refuse_pruner, scopes=_GROUPED),
    "svd-llm": _Method(
        cut=_ranks, refuse=lambda model, link: ranks.refuse_low_rank(model), scopes=_GROUPED, narrows=False
    ),
    "modegpt": _Method(
        cut=_narrowed,
        refuse=_refuse_narrowed,
        needs=("causal",),
        scopes=_GROUPED,
        narrows=False,
    ),
    "experts": _Method(cut=_experts, refuse=_refuse_dense, mixtures=True),
    "expert-ffn": _Method(cut=_neurons, refuse=_refuse_dense, mixtures=True),
    "magnitude": _BY_SIZE,
    "magnitude-structured": _BY_SIZE,
    "random": _BY_SIZE,
    "wanda": _ONE_SHOT,
    "sparsegpt": _ONE_SHOT,
}

CUTS = tuple(name for name, method in _METHODS.items() if not method.zeroes)
"""Methods that take parameters away, of which sizes alone tell how many."""

ZEROES = tuple(name for name, method in _METHODS.items() if method.zeroes)
"""Methods that set weights to zero, which are stored as before."""


# Quantizers.

_Pack = Callable[[Link, int, int, int], int]
"""Bytes of a matrix of so many outputs and inputs, packed, where a number of the model's own takes so many bytes."""


@dataclass(frozen=True, kw_only=True)
class _Quantizer:
    """What sizes tell of a quantizer; `needs`, `mixtures` and `scopes` are those of its class.

    Parameters
    ----------
    bits : of a weight; None for those that are asked for
    packed : bytes of a matrix
    group : weights that share a scale unless the link says otherwise; None for a row
    groups : sizes of groups that there are; None for any
    otherwise : what to do where no group fits
    keeps_zeros : weights that are zero stay zero
    refuse : why it cannot work on a model, besides what its family and its groups say
    """

    bits: int | None
    packed: _Pack
    refuse: Callable[[Sized, Link], str | None] = _nothing
    group: int | None = None
    groups: tuple[int, ...] | None = None
    otherwise: str = "leave group out"
    keeps_zeros: bool = True
    needs: tuple[Need, ...] = ()
    mixtures: bool = False
    scopes: tuple[str, ...] = _ANY


def _eight(link: Link, outputs: int, inputs: int, itemsize: int) -> int:
    """A byte a weight, and a scale a row in the model's dtype."""
    return outputs * inputs + outputs * itemsize


def _dynamic(link: Link, outputs: int, inputs: int, itemsize: int) -> int:
    return outputs * inputs + (4 if link.fields.get("scheme") == "torch" else outputs * itemsize)


def _refuse_dynamic(model: Sized, link: Link) -> str | None:
    if link.fields.get("scheme") == "torch" and model.entry.experts and "ffn" in common.PARTS[_scope(link)]:
        return "needs matrices one by one for scheme=torch, and experts are stacked: take scheme=token"
    return None


def _float8(link: Link, outputs: int, inputs: int, itemsize: int) -> int:
    """A byte a weight, and a float32 scale a row."""
    return outputs * inputs + 4 * outputs


def _tiles(link: Link, outputs: int, inputs: int, itemsize: int) -> int:
    """Half a byte a weight and four bytes a group, of a matrix that is filled up to whole tiles."""
    high, wide = outputs + -outputs % 8, inputs + -inputs % 1024
    return high * wide // 2 + high * wide // (_whole(link, "group") or 128) * 4


def _levels(link: Link, outputs: int, inputs: int, itemsize: int) -> int:
    """Integers without gaps, and for each group a scale in the model's dtype and a zero point of as many bits."""
    bits = int(_amount(link))
    groups = outputs * inputs // (_whole(link, "group") or inputs)
    zero_points = 0 if _fact(link, "symmetric", default=False) else math.ceil(groups * bits / 8)
    return math.ceil(outputs * inputs * bits / 8) + groups * itemsize + zero_points


_QUANTIZERS: Mapping[str, _Quantizer] = {
    "int8": _Quantizer(bits=8, packed=_eight, mixtures=True),
    "int8-dynamic": _Quantizer(bits=8, packed=_dynamic, refuse=_refuse_dynamic, mixtures=True),
    "fp8": _Quantizer(bits=8, packed=_float8, needs=("linear",)),
    "int4": _Quantizer(
        bits=4,
        packed=_tiles,
        group=128,
        groups=(32, 64, 128, 256),
        otherwise="take rtn@4, whose groups are of any size",
        keeps_zeros=False,
        needs=("linear",),
    ),
    "rtn": _Quantizer(bits=None, packed=_levels, mixtures=True),
    "gptq": _Quantizer(bits=None, packed=_levels, needs=("one text",), mixtures=True),
}

QUANTIZERS = tuple(_QUANTIZERS)
"""Methods that round weights to fewer bits."""


def _rounded(here: Here, link: Link, step: _Quantizer) -> Here:
    """The model with packed matrices.

    Raises
    ------
    ModelError
        As `after`.
    """
    model, scope = here.model, _scope(link)
    _check(model, link, step)
    if reason := step.refuse(model, link):
        raise ModelError(reason)
    bits = step.bits
    if bits is None:
        if not isinstance(link.amount, int | float) or link.amount not in range(2, 9):
            raise ModelError(f"needs a whole number of bits from 2 to 8, got {link}: such as {link.name}@4")
        bits = int(link.amount)
    for done in here.rounded:
        if common.PARTS[_scope(done)] & common.PARTS[scope]:
            raise ModelError(
                f"needs weights that were not quantized yet, and {done} was done to them: "
                "quantize once, from the model before it"
            )
    if here.zeros and not step.keeps_zeros:
        raise ModelError("needs weights that were not set to zero, which none of its levels need be: take rtn@4")
    group = _whole(link, "group") or step.group
    widths = matrices.input_widths(model.shape, scope)
    if here.grain is not None and scope != "head":
        known = {"the hidden size": model.shape.hidden}
        may = dict(zip(("the attention output", "the MLP"), here.grain, strict=True))
        widths = known | {
            name: width
            for (name, width), part in zip(may.items(), ("attention", "ffn"), strict=True)
            if part in common.PARTS[scope]
        }
    if reason := matrices.misfit(group, widths, sizes=step.groups, otherwise=step.otherwise):
        if here.decided and not matrices.misfit(group, {"the hidden size": model.shape.hidden}):
            raise UntoldError(
                f"needs input widths that group={group} divides, and text decides {here.decided[-1]}: measure it"
            )
        raise ModelError(reason)
    shape = matrices.untied(model) if scope == "head" else model.shape
    itemsize = BYTES[model.dtype]
    saved = sum(
        outputs * inputs * itemsize - step.packed(link, outputs, inputs, itemsize)
        for outputs, inputs in matrices.matrices_of(model, scope)
    )
    return replace(
        here,
        model=replace(model, shape=shape),
        rounded=(*here.rounded, link),
        saved=here.saved + saved,
        bits=bits,
    )
