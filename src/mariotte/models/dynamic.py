"""Matrices that round what they read, and how checkpoints say which of them do.

A model with such matrices is its family's own, with weights of the same names and shapes. Its config says under
``quantization_config`` which matrices round their input and how; transformers reads that where this module has been
imported, as ``import mariotte`` and then any of its loading does. Elsewhere it warns of an unknown quantization type
and computes with unrounded inputs.

Shapes: T tokens, I inputs of a matrix.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from mariotte import architectures
from mariotte.errors import ModelError
from mariotte.models.model import Stacked

METHOD = "mariotte-dynamic"
"""What a config calls this kind of quantization."""

SCHEMES = ("token", "torch")
"""How an input is rounded: see `round_tokens` and `round_whole`."""

_LEAST_SCALE = 6.1e-5
"""Below it torch takes this one: SMALL_SCALE_THRESHOLD of its quantization utilities."""


def _through(rounded: Tensor, x: Tensor) -> Tensor:
    """What was rounded, with the gradient of what it was before."""
    return rounded.detach().to(x.dtype) + (x - x.detach())


def round_tokens(x_TI: Tensor) -> Tensor:
    """Inputs rounded to 255 levels around zero, as far as the largest of each token; (..., I)."""
    wide_TI = x_TI.detach().to(torch.promote_types(x_TI.dtype, torch.float32))
    scale_T1 = wide_TI.abs().amax(-1, keepdim=True) / 127
    scale_T1 = scale_T1.masked_fill(scale_T1 == 0, 1.0)
    return _through((wide_TI / scale_T1).round().clamp(-127, 127) * scale_T1, x_TI)


def round_whole(x_TI: Tensor) -> Tensor:
    """Inputs rounded to 128 levels between the least and the largest of all of them, one of which is zero; (..., I).

    The levels of torch's dynamic quantization: seven bits, which keeps sums of products within those of its kernels.
    """
    wide_TI = x_TI.detach().to(torch.promote_types(x_TI.dtype, torch.float32))
    low, high = wide_TI.amin().double().clamp(max=0), wide_TI.amax().double().clamp(min=0)
    exact = ((high - low) / 127).float()
    exact = exact.masked_fill(exact == 0, 0.1)
    zero = (-low / exact).round().clamp(0, 127)
    scale = exact.clamp(min=_LEAST_SCALE)
    # torch's kernels add the zero with one rounding, so that a value next to a half may become one.
    level_TI = (wide_TI.double() * (1 / scale).double() + zero).to(wide_TI.dtype).round().clamp(0, 127)
    return _through(((level_TI - zero) * scale).to(wide_TI.dtype), x_TI)


ROUND = {"token": round_tokens, "torch": round_whole}
"""By scheme, what is done to an input."""


class DynamicLinear(nn.Linear):
    """A linear layer that rounds its input first; made of one by `wrap_`."""

    scheme: str

    @override
    def forward(self, input: Tensor) -> Tensor:
        """(..., O) of (..., I)."""
        return super().forward(ROUND[self.scheme](input))


class DynamicConv1D(Conv1D):
    """The same for the layer that holds its weight as inputs x outputs."""

    scheme: str

    @override
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportUnknownParameterType] the parent is not typed
        """(..., O) of (..., I)."""
        return super().forward(ROUND[self.scheme](x))


class _DynamicExperts(nn.Module):
    """The MLPs of a mixture, each of whose matrices rounds what it reads; made a twin of the family's by `_twin`.

    Whatever way of computing experts transformers was told to take: one expert after another.
    """

    scheme: str
    transposed: bool

    @override
    def forward(self, hidden_states: Tensor, taken: Tensor, shares: Tensor) -> Tensor:
        """(M, D) of tokens (M, D), the experts that each takes, (M, k), and the share that each has, (M, k)."""
        ins, down = (Stacked(self, name, transposed=self.transposed) for name in _OF_EXPERTS)
        found = torch.zeros_like(hidden_states)
        for expert in sorted(set(cast("list[int]", taken.flatten().tolist()))):
            token, place = (taken == expert).nonzero(as_tuple=True)
            gate_up = ins.applied(expert, ROUND[self.scheme](hidden_states[token]))
            neurons = cast(Tensor, cast(Any, self)._apply_gate(gate_up))
            given = down.applied(expert, ROUND[self.scheme](neurons)) * shares[token, place, None]
            found = found.index_add(0, token, given.to(found.dtype))
        return found


_OF_EXPERTS = ("gate_up_proj", "down_proj")
"""What transformers calls the matrices of all experts of a block."""


@functools.cache
def _twin(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of experts that round what they read."""
    return type(f"Dynamic{kind.__name__}", (kind,), {"forward": _DynamicExperts.forward})


def _holds_experts(module: nn.Module) -> bool:
    held = dict(module.named_parameters(recurse=False))
    return all(name in held and held[name].ndim == 3 for name in _OF_EXPERTS)


_TWINS: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: DynamicLinear, Conv1D: DynamicConv1D}


_ALIKE: Mapping[str, type[nn.Module]] = {"FalconLinear": nn.Linear}
"""Kinds of layers, by their name, that compute what another one does."""


def _kind(module: nn.Module) -> type[nn.Module]:
    return _ALIKE.get(type(module).__name__, type(module))


def can_wrap(module: nn.Module) -> bool:
    """Whether a layer is of a kind whose input can be rounded."""
    return _kind(module) in _TWINS or _holds_experts(module)


def wrap_(hf: PreTrainedModel, paths: Iterable[str], scheme: str) -> None:
    """Make these layers of a model round their input, and let its config say so."""
    stated = modules(hf.config)
    entry = architectures.of(hf.config.to_dict())
    for path in paths:
        module = cast(Any, hf.get_submodule(path))
        # Its class alone changes: the parameters, and whoever holds the module, stay.
        if _holds_experts(module):
            module.__class__, module.transposed = _twin(cast("type[nn.Module]", type(module))), entry.experts_transposed
        else:
            module.__class__ = _TWINS[_kind(module)]
        module.scheme = stated[path] = scheme
    hf.config.quantization_config = {"quant_method": METHOD, "modules": stated}


def modules(config: Any) -> dict[str, str]:
    """The scheme of every layer that a config says rounds its input, by its path; empty where none does."""
    stated = getattr(config, "quantization_config", None)
    found = stated.to_dict() if isinstance(stated, QuantizationConfigMixin) else stated or {}
    return dict(found["modules"]) if found.get("quant_method") == METHOD else {}


def restore_(hf: PreTrainedModel) -> None:
    """Give a new model the layers that its config speaks of.

    Raises
    ------
    ModelError
        When it speaks of a layer that the model lacks, or that cannot round its input.
    """
    layers = dict(cast("Iterable[tuple[str, nn.Module]]", cast(Any, hf).named_modules()))
    for path, scheme in modules(hf.config).items():
        if path not in layers or not can_wrap(layers[path]):
            raise ModelError(
                f"the config says that {path} rounds its input, and the model has no such layer: they do not belong "
                "together, so compress the dense model anew"
            )
        wrap_(hf, [path], scheme)


def restate_(hf: PreTrainedModel) -> None:
    """Let the config of a model call the layers that round their input by the paths that they have now."""
    if modules(hf.config):
        layers = cast("list[tuple[str, nn.Module]]", list(cast(Any, hf).named_modules()))
        stated = {path: cast(str, vars(layer)["scheme"]) for path, layer in layers if "scheme" in vars(layer)}
        hf.config.quantization_config = {"quant_method": METHOD, "modules": stated}


@register_quantization_config(METHOD)
class DynamicConfig(QuantizationConfigMixin):
    """What ``config.json`` says of layers that round their input.

    Parameters
    ----------
    modules : the scheme of each by its path
    """

    def __init__(self, modules: Mapping[str, str], quant_method: str = METHOD) -> None:
        self.quant_method = cast(Any, quant_method)
        self.modules = dict(modules)


@register_quantizer(METHOD)
class DynamicQuantizer(HfQuantizer):
    """How transformers makes such a model when it loads one."""

    @override
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model.config.quantization_config = self.quantization_config
        restore_(model)
        return model

    @override
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # The weights are ordinary ones, which can be copied, cast and saved as such.
        stated = copy.deepcopy(modules(model.config))
        self.remove_quantization_config(model)
        model.config.quantization_config = {"quant_method": METHOD, "modules": stated}
        return model

    @override
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] the parent's has no body
        return True

    @property
    @override
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] the parent's has no body
        return True
