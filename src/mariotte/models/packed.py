"""Eight-bit floats in checkpoints: packed by torchao when a model is saved, unpacked when it is loaded.

In memory a model computes with what its integers or small floats stand for, in its own dtype. torchao, which
transformers saves and loads through ``TorchAoConfig``, does the same on its way into a product, so that a packed
checkpoint gives the logits that were measured, to the bit.

Shapes: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

STORED = "torchao float8"
"""What a step's facts say under ``stored`` when checkpoints hold its weights as torchao's eight-bit floats."""

METHOD = "torchao"
"""What a config calls the quantization of such a checkpoint."""

INSTALL = "pip install 'mariotte[quant]'"

_TRIPS = 8
"""Round trips until a row's scale is its own: one or two do in practice."""


def installed() -> bool:
    """Whether torchao is there."""
    return importlib.util.find_spec("torchao") is not None


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config says that torchao packed its weights."""
    stated = cast("dict[str, Any]", config.get("quantization_config") or {})
    return stated.get("quant_method") == METHOD


def _config() -> Any:
    import torchao.quantization as quantization

    made: Any = cast(Any, quantization).Float8WeightOnlyConfig()
    return made


def _float8(weight_OI: Tensor, dtype: torch.dtype | None = None) -> Any:
    """A matrix as torchao holds it, on the CPU: e4m3 floats, and a float32 scale for each row.

    Parameters
    ----------
    dtype : of what it stands for; None takes the matrix' own
    """
    from torchao.quantization import Float8Tensor, quantize_

    outputs, inputs = weight_OI.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach().cpu(), requires_grad=False)
    quantize_(linear, _config())
    made = cast(Any, linear.weight)
    # torchao divides zeros by zero: rows of zeros get a scale of one.
    empty_O1 = made.scale == 0
    return Float8Tensor(
        cast(Tensor, made.qdata).view(torch.uint8).masked_fill(empty_O1, 0).view(torch.float8_e4m3fn),
        cast(Tensor, made.scale).masked_fill(empty_O1, 1.0),
        made.block_size,
        made.mm_config,
        made.act_quant_kwargs,
        made.kernel_preference,
        dtype or made.dtype,
    )


def round_float8(weight_OI: Tensor) -> Tensor:
    """A matrix rounded to eight-bit floats (e4m3) as torchao's ``Float8WeightOnlyConfig`` does, a scale for each row.

    Parameters
    ----------
    weight_OI : (O, I) floating

    Returns
    -------
    (O, I) in its dtype; rounding it again changes nothing

    Notes
    -----
    A scale is a row's largest magnitude over 448, in float32. Of what the floats stand for it may come out as its
    neighbour, so that the trip is repeated until it does not: packing the result gives the result.
    """
    for _ in range(_TRIPS):
        rounded_OI = cast(Tensor, _float8(weight_OI).dequantize()).to(weight_OI.device)
        if rounded_OI.equal(weight_OI):
            break
        weight_OI = rounded_OI
    return weight_OI


def pack_(hf: PreTrainedModel, weights: Mapping[str, Tensor]) -> bool:
    """Give some matrices of a model torchao's form, for saving it; its config then says so.

    Parameters
    ----------
    hf : the model, whose weights may be of another dtype than those given; not to be computed with until unpacked
    weights : of `round_float8`, by the path of their matrix

    Returns
    -------
    Whether it was done: not when some weights are no longer what `round_float8` left, or there are none
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    packed: dict[str, Any] = {}
    for path, weight_OI in weights.items():
        own = cast(Tensor, cast(Any, hf.get_submodule(path)).weight)
        packed[path] = _float8(weight_OI, own.dtype)
        if not packed[path].dequantize().equal(own.detach().cpu()):
            return False
    if not packed:
        return False
    for path, weight in packed.items():
        cast(Any, hf.get_submodule(path)).weight = nn.Parameter(weight, requires_grad=False)
    modules = cast("list[tuple[str, Any]]", list(cast(Any, hf).named_modules()))
    others = [path for path, module in modules if isinstance(module, nn.Linear) and path not in packed]
    config = TorchAoConfig(_config(), modules_to_not_convert=others or None)
    cast(Any, hf).hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    hf.config.quantization_config = config
    return True


def unpack_(hf: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the matrices that torchao packed ordinary weights again, and let the config say nothing of it.

    Parameters
    ----------
    dtype : of these weights
    """
    for module in hf.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
            module.weight = nn.Parameter(cast(Tensor, cast(Any, weight).dequantize(dtype)))
    delattr(hf.config, "quantization_config")
    # What transformers remembers of how the model was made would pack it again when it is saved.
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
        with contextlib.suppress(AttributeError):
            delattr(hf, name)
