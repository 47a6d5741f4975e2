"""Cutting a model: new weights, and a config that says what the model has become.

Shapes: O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mariotte.accounting import cut_width as cut_width
from mariotte.accounting import rounding as rounding
from mariotte.models.irregular import freeze_shortcuts_, skeleton
from mariotte.models.model import Model
from mariotte.models.paging import Spilled, Stored, another, pager_of


def gathered(model: Model) -> dict[str, Tensor] | Spilled:
    """An empty mapping for the new weights of a model, by name, which `derive` or `scope.change` takes.

    Of a model in memory it is a dict. Of a streamed one it writes each tensor to scratch when it is put in, in the
    dtype of the parameter that it replaces, so that a method which fills it block by block holds one block.
    """
    pager = pager_of(model.embeddings.weight)
    if pager is None:
        return {}
    dtypes = {name: parameter.dtype for name, parameter in model.hf.named_parameters(remove_duplicate=False)}
    return Spilled(pager, dtypes)


def parameter_names(model: Model) -> dict[Tensor, str]:
    """Each parameter's name in the model; a shared one has the first of its names (the embeddings', when tied)."""
    return {parameter: name for name, parameter in model.hf.named_parameters()}


def norm_weight(norm: nn.Module) -> Tensor:
    """A norm's scale, (D,)."""
    return cast(Tensor, norm.weight)


def set_norm_eps_(model: Model, eps: float) -> None:
    """Give every norm another epsilon, of the residual stream and of heads; the config has to be told separately."""
    norms = [norm for block in model.blocks for norm in (block.attention_norm, block.mlp_norm, *block.head_norms)]
    for norm in (*norms, model.final_norm):
        (attribute,) = (name for name in ("variance_epsilon", "eps") if hasattr(norm, name))
        setattr(norm, attribute, eps)


@torch.no_grad()
def derive(
    model: Model,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    untie: bool = False,
    irregular: bool = False,
) -> Model:
    """A model with some weights replaced, perhaps by ones of another shape; the given one stays as it is.

    Parameters
    ----------
    model : what to start from
    weights : new values by parameter name, cast to the dtype and device of the parameter that they replace; such as
        `gathered` gives
    config : what the config must say now; it has to describe the new shapes
    untie : give the head a weight of its own, which must be among `weights`
    irregular : make it a model of the class for sizes that the family's config cannot state (``models/irregular.py``),
        whose own sizes `config` then states too; parameters and buffers that the model did not have must be among
        `weights`

    Returns
    -------
    An independent model with the same history. Its other parameters are copies.

    Notes
    -----
    Costs one copy of the parameters that stay, and never holds two of those that are replaced. Of a streamed model
    nothing is read: what stays is where it was, what is new in scratch.
    """
    shared: dict[str, nn.Parameter] = dict(model.hf.named_parameters())
    names, others = parameter_names(model), _other_names(model)
    head = f"{model.entry.head}.weight"
    tied = model.head.weight is model.embeddings.weight
    if irregular:
        sizes = {**(config or {}), model.entry.tied: tied and not untie}
        hf = skeleton(model, sizes)
        wanted = [name for name, _ in hf.named_parameters()]
        _set_buffers(hf, weights, model.device)
    else:
        # Handing deepcopy the parameters as already copied makes it copy the modules around them only.
        hf = copy.deepcopy(model.hf, {id(parameter): parameter for parameter in shared.values()})
        for key, value in (config or {}).items():
            setattr(hf.config, key, value)
        wanted = list(shared)
    derived = Model(
        hf,
        model.tokenizer,
        name=model.name,
        fingerprint=model.fingerprint,
        stored_dtype=model.stored_dtype,
        done=model.done,
    )
    unknown = set(weights) - {*wanted, *(name for name, _ in hf.named_buffers())} - ({head} if untie else set())
    assert not unknown, f"no parameters {sorted(unknown)}; the head needs untie=True when it is tied"
    embedded = shared[names[model.embeddings.weight]]
    for name in wanted:
        if name == head and tied:
            continue
        old = shared.get(name, embedded)
        assert name in weights or name in shared, f"{name} is new and has no value"
        value = _value(weights, name, old) if name in weights else another(old)
        _set_parameter(hf, name, value.contiguous(), old, also=() if irregular else others.get(name, ()))
    if untie and tied:
        _set_parameter(hf, head, _value(weights, head, embedded), embedded)
        setattr(hf.config, model.entry.tied, False)
    elif tied:
        derived.head.weight = derived.embeddings.weight
    for module in hf.modules():
        _restate_sizes(module)
    freeze_shortcuts_(hf)
    if untie:
        # What is no longer shared either when the head is not.
        own = (*model.entry.head_biases[1:], *model.entry.copies)
        for name in own:
            shared_until_now = hf.get_parameter(name)
            _set_parameter(hf, name, another(shared_until_now), shared_until_now)
        # transformers keeps the list of tied keys from when the model was made, and would tie them again when saving.
        tied_keys = cast("dict[str, str]", hf.all_tied_weights_keys)
        hf.all_tied_weights_keys = {name: source for name, source in tied_keys.items() if name not in (head, *own)}
    return derived


def _value(weights: Mapping[str, Tensor], name: str, old: Tensor) -> Tensor:
    """A new weight as a tensor of its own, where and in the dtype that the old one is."""
    if isinstance(weights, Spilled):
        return weights.stored(name).another(old.dtype)
    new = weights[name].detach()
    if isinstance(old, Stored):
        return old.cell.pager.stored(new, old.dtype)
    return new.to(old.device, old.dtype, copy=True)


def _set_buffers(hf: nn.Module, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Give the buffers that are named, and all that have no value yet, theirs."""
    for name, buffer in list(hf.named_buffers()):
        if name in values or buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            hf.get_submodule(path).register_buffer(leaf, values[name].to(device, buffer.dtype, copy=True))


def _other_names(model: Model) -> dict[str, list[str]]:
    """By a parameter's first name all that it has besides; an encoder-decoder's embeddings have many."""
    names = parameter_names(model)
    found: dict[str, list[str]] = {}
    for name, parameter in model.hf.named_parameters(remove_duplicate=False):
        if name != names[parameter]:
            found.setdefault(names[parameter], []).append(name)
    return found


def _set_parameter(hf: nn.Module, name: str, value: Tensor, like: nn.Parameter, also: Iterable[str] = ()) -> None:
    parameter = nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)
    for each in (name, *also):
        path, _, leaf = each.rpartition(".")
        setattr(hf.get_submodule(path), leaf, parameter)


def _restate_sizes(module: nn.Module) -> None:
    """Make what modules say of their sizes agree with their weights: adapters and exporters read it."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    else:
        config = cast(Any, getattr(module, "config", None))
        # Widths that differ by layer are the modules' own, and not the config's.
        by_layer = getattr(config, "ffn_sizes", None) is not None
        for name in ("hidden_size",) if by_layer else ("hidden_size", "intermediate_size"):
            if isinstance(getattr(module, name, None), int) and hasattr(config, name):
                setattr(module, name, getattr(config, name))
