"""Weights that checkpoints hold packed: by torchao when a model is saved, unpacked when it is loaded.

In memory a model computes with what its integers or small floats stand for, in its own dtype. torchao, which
transformers saves and loads through ``TorchAoConfig``, does the same on its way into a product, so that a packed
checkpoint gives the logits that were measured: of eight-bit floats to the bit; of four-bit integers as far as the sums
of NVIDIA's tensor cores are those of other products.

Shapes: O outputs and I inputs of a matrix, N groups of G weights that share a scale.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mariotte.errors import ModelError

METHOD = "torchao"
"""What a config calls the quantization of such a checkpoint."""

INSTALL = "pip install 'mariotte[quant]'"

GROUPS = (32, 64, 128, 256)
"""Weights that share a scale in four-bit integers: those that torchao knows."""

INPUTS, OUTPUTS = 1024, 8
"""Multiples to which torchao fills up matrices of four-bit integers with zeros."""

_TRIPS = 8
"""Round trips until a row's scale is its own: one or two do in practice."""

_TRIPS_INT4 = 32
"""The same for groups of four-bit integers: two to eight in practice."""

_LEVELS = 16

_CAPABILITY = 8
"""Of an NVIDIA GPU that has torchao's kernel for four-bit integers: Ampere's, and newer ones."""


@dataclass(frozen=True)
class Form:
    """How torchao packs weights.

    Parameters
    ----------
    stored : what a step's facts say under ``stored``: one of `STORED`
    group : weights that share a scale; None: a row
    """

    stored: str
    group: int | None = None


STORED = (FLOAT8, INT4) = ("torchao float8", "torchao int4")
"""Eight-bit floats (e4m3) of `round_float8`, and four-bit integers of `round_int4`."""


def form_of(facts: Mapping[str, Any]) -> Form | None:
    """How checkpoints hold what a step with these facts has rounded; None where they hold it as it is."""
    if facts.get("stored") not in STORED:
        return None
    return Form(facts["stored"], facts.get("group"))


def installed() -> bool:
    """Whether torchao is there."""
    return importlib.util.find_spec("torchao") is not None


def cannot_hold_int4(device: torch.device) -> str | None:
    """Why four-bit integers cannot be computed with on a device, in a clause; None where they can."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU of compute capability {_CAPABILITY}.0 or newer, and this runs on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < _CAPABILITY:
        return f"needs a GPU of compute capability {_CAPABILITY}.0 or newer, and this one has {major}.{minor}"
    return None


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config says that torchao packed its weights."""
    stated = cast("dict[str, Any]", config.get("quantization_config") or {})
    return stated.get("quant_method") == METHOD


def rounded(weight_OI: Tensor, form: Form) -> Tensor:
    """A matrix rounded to what its packed form stands for: `round_float8` or `round_int4`."""
    return round_int4(weight_OI, _group(form)) if form.stored == INT4 else round_float8(weight_OI)


def _group(form: Form) -> int:
    assert form.group is not None
    return form.group


def _config(form: Form) -> Any:
    import torchao.quantization as quantization

    made = cast(Any, quantization)
    if form.stored == INT4:
        return made.Int4WeightOnlyConfig(
            group_size=form.group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    return made.Float8WeightOnlyConfig()


def _quantized(weight_OI: Tensor, form: Form) -> Any:
    """What torchao makes of a matrix."""
    from torchao.quantization import quantize_

    outputs, inputs = weight_OI.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    quantize_(linear, _config(form))
    return linear.weight


def _float8(weight_OI: Tensor, dtype: torch.dtype | None = None) -> Any:
    """A matrix as torchao holds it, on the CPU: e4m3 floats, and a float32 scale for each row.

    Parameters
    ----------
    dtype : of what it stands for; None takes the matrix' own
    """
    from torchao.quantization import Float8Tensor

    made = _quantized(weight_OI.cpu(), Form(FLOAT8))
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


def int4_levels(weight_NG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers of weights as torchao's ``Int4WeightOnlyConfig`` chooses them, and what they stand for.

    Parameters
    ----------
    weight_NG : (N, G) bfloat16

    Returns
    -------
    (N, G) int32 from 0 to 15, (N, 1) bfloat16 distance of two levels, (N, 1) bfloat16 value of the integer 8

    Notes
    -----
    Of a group whose least and largest weights are a and b the scale is s = (b - a) / 15 and the middle m = a + 8 s,
    each rounded to bfloat16, as is every step of (w - (m - 8 s)) / s, which is then rounded to an integer. Zero need
    not be a level.
    """
    from torchao.quantization import quant_primitives

    torchao, shape = cast(Any, quant_primitives), (1, weight_NG.shape[1])
    scale_N, middle_N = torchao._choose_qparams_affine_tinygemm(
        weight_NG,
        torchao.MappingType.ASYMMETRIC,
        shape,
        torch.int32,
        0,
        _LEVELS - 1,
        scale_dtype=weight_NG.dtype,
        zero_point_dtype=weight_NG.dtype,
    )
    level_NG = torchao._quantize_affine_tinygemm(
        weight_NG, shape, scale_N, middle_N, torch.int32, quant_min=0, quant_max=_LEVELS - 1
    )
    return level_NG, scale_N.view(-1, 1), middle_N.view(-1, 1)


def int4_values(level_NG: Tensor, scale_N1: Tensor, middle_N1: Tensor) -> Tensor:
    """What integers of `int4_levels` stand for, (N, G) bfloat16: (q - 8) s + m, rounded once, as the kernels do."""
    exact_NG = (level_NG - _LEVELS // 2).double() * scale_N1.double() + middle_N1.double()
    return exact_NG.to(torch.bfloat16)


def round_int4(weight_OI: Tensor, group: int) -> Tensor:
    """A matrix rounded to four-bit integers as torchao's ``Int4WeightOnlyConfig`` does, a scale for each group.

    Parameters
    ----------
    weight_OI : (O, I) floating, rounded to bfloat16 first
    group : weights of a row that share a scale

    Returns
    -------
    (O, I) in its dtype, each one a bfloat16; rounding it again changes nothing

    Notes
    -----
    Where a group has not got both the least and the highest level, in about one of ten, its span is smaller than it was
    and its scale another the next time: the trip is repeated until it is not, so that packing the result gives the
    result.
    """
    value_NG = weight_OI.to(torch.bfloat16, copy=True).reshape(-1, group)
    moving_N = torch.ones(len(value_NG), dtype=torch.bool, device=value_NG.device)
    for _ in range(_TRIPS_INT4):
        old_NG = value_NG[moving_N]
        new_NG = int4_values(*int4_levels(old_NG))
        value_NG[moving_N] = new_NG
        moving_N = moving_N.masked_scatter(moving_N, (new_NG != old_NG).any(1))
        if not bool(moving_N.any()):
            break
    return value_NG.view(weight_OI.shape).to(weight_OI.dtype)


def int4_bytes(outputs: int, inputs: int, group: int) -> int:
    """Bytes of a matrix as torchao packs its four-bit integers: filled up with zeros, four bytes beside each group."""
    high, wide = (size + -size % multiple for size, multiple in ((outputs, OUTPUTS), (inputs, INPUTS)))
    return high * wide // 2 + high * wide // group * 4


def _held(weight_OI: Tensor, form: Form, dtype: torch.dtype) -> Any:
    """A matrix as torchao holds it, of what stands for numbers of this dtype; None where it cannot be held here."""
    if form.stored == FLOAT8:
        return _float8(weight_OI, dtype)
    if dtype != torch.bfloat16 or cannot_hold_int4(weight_OI.device):
        return None
    return _quantized(weight_OI.to(dtype), form)


@torch.no_grad()
def _plain(weight: Any, dtype: torch.dtype) -> Tensor:
    """What a matrix that torchao holds stands for, in this dtype where the matrix is.

    Raises
    ------
    ModelError
        When it takes a GPU to tell, and there is none.
    """
    if not hasattr(weight, "scale_and_zero"):
        return cast(Tensor, weight.dequantize(dtype))
    where = weight.device if not cannot_hold_int4(weight.device) else torch.device("cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "four-bit integers that torchao packed for a GPU can be read where there is one, and here is none: "
            "load the checkpoint there, or make one of rtn@4 instead"
        )
    inputs, there = weight.shape[1], weight.to(where)
    # The kernel says what its layout means: products with the unit vectors, exact in any order.
    columns = [
        nn.functional.linear(torch.eye(inputs, dtype=torch.bfloat16, device=where)[start : start + INPUTS], there)
        for start in range(0, inputs, INPUTS)
    ]
    return torch.cat(columns).T.to(weight.device, dtype).contiguous()


def pack_(hf: PreTrainedModel, weights: Mapping[str, Tensor], form: Form | None) -> bool:
    """Give some matrices of a model torchao's form, for saving it; its config then says so.

    Parameters
    ----------
    hf : the model, whose weights may be of another dtype than those given; not to be computed with until unpacked
    weights : of `rounded`, by the path of their matrix
    form : how; None: none are packed

    Returns
    -------
    Whether it was done: not when some weights are no longer what `rounded` left, or there are none, or this machine
    cannot hold them so
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    if form is None or not weights:
        return False
    held: dict[str, Any] = {}
    for path, weight_OI in weights.items():
        own = cast(Tensor, cast(Any, hf.get_submodule(path)).weight)
        held[path] = _held(weight_OI, form, own.dtype)
        if held[path] is None or not _plain(held[path], own.dtype).to(own.device).equal(own.detach()):
            return False
    for path, weight in held.items():
        cast(Any, hf.get_submodule(path)).weight = nn.Parameter(weight, requires_grad=False)
    modules = cast("list[tuple[str, Any]]", list(cast(Any, hf).named_modules()))
    others = [path for path, module in modules if isinstance(module, nn.Linear) and path not in held]
    config = TorchAoConfig(_config(form), modules_to_not_convert=others or None)
    cast(Any, hf).hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    hf.config.quantization_config = config
    return True


def unpack_(hf: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the matrices that torchao packed ordinary weights again, and let the config say nothing of it.

    Parameters
    ----------
    dtype : of these weights

    Raises
    ------
    ModelError
        When it takes a GPU to tell what they are, and there is none.
    """
    for module in hf.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and hasattr(weight, "qdata"):
            module.weight = nn.Parameter(_plain(weight, dtype))
    delattr(hf.config, "quantization_config")
    # What transformers remembers of how the model was made would pack it again when it is saved.
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
        with contextlib.suppress(AttributeError):
            delattr(hf, name)
