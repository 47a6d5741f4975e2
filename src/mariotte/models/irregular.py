"""Models whose sizes their family's config cannot state: how they are made from ordinary ones, and loaded.

Their classes are in ``modeling_mariotte.py``, which transformers copies beside the weights when such a model is saved.
Here they are made known to transformers, so that a process that has imported Mariotte never runs the folder's copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mariotte.models.dynamic import restore_
from mariotte.models.model import Model
from mariotte.models.modeling_mariotte import FAMILIES, Shortcut, classes

CLASSES: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {name: classes(name) for name in FAMILIES}
"""Config and model of every family that can be irregular."""

_OF_THE_CLASS = ("model_type", "architectures", "auto_map", "transformers_version")
"""What a config says of its class and not of the model."""

for _config, _model in CLASSES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModelForCausalLM")


def skeleton(model: Model, sizes: Mapping[str, Any]) -> PreTrainedModel:
    """An irregular model of a family, its parameters still to be given.

    Parameters
    ----------
    model : of the same family, irregular or not
    sizes : what its config must say otherwise than that of `model`

    Returns
    -------
    In eval mode, parameters on the meta device, buffers copies of `model`'s, where those are; those that
    `model` does not have, or not in this size, are on the meta device too
    """
    make_config, make_model = CLASSES[model.entry.model_type]
    stated = {key: value for key, value in model.config.items() if key not in _OF_THE_CLASS}
    if not FAMILIES[model.entry.model_type].head_dim:
        stated["head_dim"] = model.shape.head_dim
    config = make_config(**{**stated, **sizes})
    with torch.device("meta"):
        made = cast(Any, make_model)._from_config(config, attn_implementation=model.entry.kernel, dtype=model.hf.dtype)
    hf = cast(PreTrainedModel, made).eval()
    hf.generation_config = copy.deepcopy(model.hf.generation_config)
    buffers, saved = dict(model.hf.named_buffers()), set(hf.state_dict())
    for name, _ in list(hf.named_buffers()):
        path, _, leaf = name.rpartition(".")
        module = hf.get_submodule(path)
        new, old = cast(Tensor, getattr(module, leaf)), buffers.get(name)
        if old is not None and old.shape == new.shape:
            module.register_buffer(leaf, old.clone(), persistent=name in saved)
    restore_(hf)
    return hf


def freeze_shortcuts_(hf: nn.Module) -> None:
    """Say of shortcuts that they are not trained: transformers forgets it when it loads them."""
    for module in hf.modules():
        if isinstance(module, Shortcut):
            module.weight.requires_grad_(False)
