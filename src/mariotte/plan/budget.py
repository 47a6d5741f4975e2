"""What a plan may spend and must keep: ``12GB``, ``60%``, ``1.3x``, ``loss <= +3%`` read into numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from mariotte.chain import parse_change, parse_number
from mariotte.errors import ChainError, MariotteError

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)
}

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_SIZE = re.compile(rf"\s*(?P<number>{_NUMBER})\s*(?P<unit>%|[kKMGT]?i?B|)\s*")
_TIMES = re.compile(rf"\s*(?P<number>{_NUMBER})\s*[xX×]\s*")
_FLOOR = re.compile(r"\s*(?P<metric>[^\s<>=]+)\s*(?P<sign><=|>=|<|>)\s*(?P<change>.+)")


@dataclass(frozen=True)
class Size:
    """A number of bytes, or a share of the dense model's.

    Parameters
    ----------
    text : as written
    number : bytes, or a fraction
    relative : whether `number` is a share of the dense model's
    """

    text: str
    number: float
    relative: bool = False

    def of(self, dense: float) -> float:
        """The bytes, where the dense model has `dense`."""
        return self.number * dense if self.relative else self.number


@dataclass(frozen=True)
class Floor:
    """How far a metric may move from the dense model's value.

    Parameters
    ----------
    text : as written
    metric : its name, such as ``loss`` or ``knowledge.top1``
    number : the change that is still allowed, in `unit`
    unit : ``%`` of the dense value, ``pp`` percentage points of a share, or nothing: the metric's own
    """

    text: str
    metric: str
    number: float
    unit: str

    @property
    def name(self) -> str:
        """The metric without its measure."""
        return self.metric.rpartition(".")[2]

    def limit(self, base: float) -> float:
        """The value that may just be reached, where the dense model has `base`."""
        if self.unit == "%":
            return base + self.number / 100 * abs(base)
        return base + (self.number / 100 if self.unit == "pp" else self.number)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a compressed model may take up, and what it must keep; what is None is not asked for.

    Parameters
    ----------
    floors : of metrics, each a change from the dense value that is still allowed
    bytes : of the stored weights, packed where they are quantized
    memory : of weights and cache while `batch` sequences of `context` tokens are written
    context, batch : what `memory` and speed are stated at
    speedup : at least so many times the dense model's decoding speed
    latency_s : at most so many seconds a token, of one step of the whole batch
    recovery_tokens : at most so many tokens of training after a cut; 0 for none
    gpu_hours, money : at most so much for everything that is run; money in any currency, at `price_per_hour`
    price_per_hour : of one device
    sure : probability with which each floor is to be kept

    Raises
    ------
    MariotteError
        When a number cannot be, such as a speed-up of 0.
    """

    floors: tuple[Floor, ...] = ()
    bytes: Size | None = None
    memory: Size | None = None
    context: int = 4096
    batch: int = 1
    speedup: float | None = None
    latency_s: float | None = None
    recovery_tokens: int = 0
    gpu_hours: float | None = None
    money: float | None = None
    price_per_hour: float | None = None
    sure: float = field(default=0.8)

    def __post_init__(self) -> None:
        for name, size in (("bytes", self.bytes), ("memory", self.memory)):
            if size is not None and not (math.isfinite(size.number) and size.number > 0):
                raise MariotteError(
                    f"{name} must be above 0, got {size.text!r}: such as 12GB, or 60% of the dense model"
                )
        for name, number in (
            ("speedup", self.speedup),
            ("latency_s", self.latency_s),
            ("gpu_hours", self.gpu_hours),
            ("money", self.money),
            ("price_per_hour", self.price_per_hour),
        ):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise MariotteError(f"{name} must be a number above 0, got {number:g}")
        for name, whole in (("context", self.context), ("batch", self.batch)):
            if whole < 1:
                raise MariotteError(f"{name} must be at least 1, got {whole}")
        if self.recovery_tokens < 0:
            raise MariotteError(f"recovery tokens must be 0 or more, got {self.recovery_tokens}")
        if not 0.5 <= self.sure < 1:
            raise MariotteError(
                f"sure is the probability of keeping a floor and must be in [0.5, 1), got {self.sure:g}: such as 0.8"
            )
        if self.money is not None and self.price_per_hour is None:
            raise MariotteError("money needs the price of an hour: give --price as well, such as --price 2.5")

    @property
    def asks_for_size(self) -> bool:
        """Whether something besides quality is asked for."""
        return any(each is not None for each in (self.bytes, self.memory, self.speedup, self.latency_s))


def parse_size(text: str) -> Size:
    """Read ``12GB``, ``500MB``, ``8GiB``, a plain number of bytes, or ``60%`` of the dense model.

    Raises
    ------
    ChainError
        When the text is none, or nothing is left.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (found["unit"] not in _UNITS and found["unit"] != "%"):
        raise ChainError(
            f"a size is a number with %, B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, got {text!r}: such as 12GB"
        )
    number, relative = float(found["number"]), found["unit"] == "%"
    number = number / 100 if relative else number * _UNITS[found["unit"]]
    if not (math.isfinite(number) and number > 0):
        raise ChainError(f"a size must be above 0 and finite, got {text!r}: such as 12GB, or 60% of the dense model")
    return Size(text.strip(), number, relative)


def parse_times(text: str) -> float:
    """Read a speed-up such as ``1.3x``.

    Raises
    ------
    ChainError
        When the text is none.
    """
    found = _TIMES.fullmatch(text)
    if found is None or not 0 < float(found["number"]) < math.inf:
        raise ChainError(f"a speed-up is a number above 0 with an x, got {text!r}: such as 1.3x")
    return float(found["number"])


def max_loss(text: str) -> Floor:
    """The floor of ``--max-loss``: how much more loss is still allowed.

    Raises
    ------
    ChainError
        When the text is no change, or not an increase.
    """
    number, unit = parse_change(text)
    if number < 0 or unit == "pp":
        raise ChainError(f"a loss may rise by a number or by a share of itself, got {text!r}: such as +3%")
    return Floor(f"loss <= {text.strip()}", "loss", number, unit)


def parse_floor(text: str) -> Floor:
    """Read what must hold of a metric's change: ``knowledge.top1 >= -2pp``, ``loss <= +3%``.

    Raises
    ------
    ChainError
        When the text is none, or allows no value on the side to which compression moves a metric.
    """
    found = _FLOOR.fullmatch(text)
    if found is None:
        raise ChainError(
            f"a floor is METRIC OP ±NUMBER with %, pp or nothing, got {text!r}: such as 'top1 >= -2pp' or 'loss <= +3%'"
        )
    number, unit = parse_change(found["change"])
    rises = found["sign"] in ("<", "<=")
    if rises and number < 0:
        raise ChainError(
            f"{text!r} asks for less of {found['metric']} than the dense model has: compression does not promise that; "
            "allow a rise such as <= +3%, or a fall such as >= -2pp"
        )
    if not rises and number > 0:
        raise ChainError(
            f"{text!r} asks for more of {found['metric']} than the dense model has: compression does not promise that; "
            "allow a fall such as >= -2pp"
        )
    return Floor(text.strip(), found["metric"], number, unit)


def read_budget(
    *,
    max_loss: str | None = None,
    keep: Iterable[str] = (),
    bytes: str | None = None,
    memory: str | None = None,
    context: int = 4096,
    batch: int = 1,
    speedup: str | None = None,
    latency_s: float | None = None,
    recovery_tokens: str | int = 0,
    gpu_hours: float | None = None,
    money: float | None = None,
    price_per_hour: float | None = None,
    sure: float = 0.8,
) -> Budget:
    """A budget from texts as a user writes them; see `Budget` and the parsers here.

    Raises
    ------
    MariotteError
        For the first text that says nothing, or something impossible.
    """
    floors = ([] if max_loss is None else [_max_loss(max_loss)]) + [parse_floor(text) for text in keep]
    names = [floor.name for floor in floors]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ChainError(f"a budget states one floor a metric, got {names.count(twice[0])} of {twice[0]}: keep one")
    tokens = parse_number(recovery_tokens) if isinstance(recovery_tokens, str) else recovery_tokens
    if isinstance(tokens, float):
        raise ChainError(f"recovery tokens are a whole number, got {recovery_tokens!r}: such as 64k or 1M")
    return Budget(
        floors=tuple(floors),
        bytes=None if bytes is None else parse_size(bytes),
        memory=None if memory is None else parse_size(memory),
        context=context,
        batch=batch,
        speedup=None if speedup is None else parse_times(speedup),
        latency_s=latency_s,
        recovery_tokens=tokens,
        gpu_hours=gpu_hours,
        money=money,
        price_per_hour=price_per_hour,
        sure=sure,
    )


_max_loss = max_loss  # the parameter of `read_budget` has its name
