"""``mariotte doctor``: what this installation has, what it lacks, and how fast this machine is."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mariotte.cli.console import print_json, print_table, progress, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from mariotte.plan.speed import Calibration

__all__ = ["doctor"]

_PACKAGES = {
    "numpy": "laws, plans",
    "scipy": "laws",
    "pandas": "tables, reports",
    "SQLAlchemy": "stores",
    "altair": "reports",
    "torch": "the bench",
    "transformers": "the bench",
    "safetensors": "the bench",
    "lm-eval": "tasks of lm-eval",
    "psycopg": "PostgreSQL stores",
}

_SQUARE = 2048
"""Rows and columns of the matrices whose product is timed; a tenth of a second on one core."""

_BYTES = 256 << 20
"""Of the matrix that meets a vector: more than any cache holds."""


_FEW, _MANY = 2, 10
"""Blocks of the models whose steps are timed."""


def doctor(
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure the speed of this machine, for plans; takes some seconds.")
    ] = False,
    device: Annotated[str, typer.Option(help="What to measure: cpu, cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Compute in this dtype.  [default: float32 on a CPU, bfloat16 elsewhere]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what this installation has and lacks; with --bench, measure how fast this machine is.

    Speed is kept in a small file in the user's cache, one entry a device; plans read it, and predict speeds by it.
    """
    from mariotte.plan.speed import calibration_file, processor, read_calibrations

    if bench:
        from mariotte.plan.speed import write_calibration

        with progress(f"measure {device}") as update:
            measured = measure_speed(device, dtype, lambda what: update(0, text=what))
        write_calibration(measured)
    found = [
        {"package": name, "version": _version(name), "for": what, "missing": _version(name) is None}
        for name, what in _PACKAGES.items()
    ]
    calibrations = read_calibrations()
    here = {key: one for key, one in calibrations.items() if key.startswith(f"{processor()} | ")}
    if as_json:
        print_json(
            {
                "packages": found,
                "processor": processor(),
                "calibration_file": str(calibration_file()),
                "calibrations": list(here.values()),
            }
        )
        return
    print_table(
        "packages", ["package", "version", "for"], [[p["package"], p["version"] or "missing", p["for"]] for p in found]
    )
    say(f"processor: {processor()}")
    if not here:
        say("speed: not calibrated; 'mariotte doctor --bench' measures it, and plans then say how fast a model will be")
        return
    print_table(
        f"speed, from {calibration_file()}",
        ["device", "dtype", "GFLOP/s", "GB/s", "operation, us", "block, us", "measured"],
        [
            [
                c.machine,
                c.dtype,
                c.flops_per_s / 1e9,
                c.bytes_per_s / 1e9,
                c.operation_s * 1e6,
                1e6 * c.block_s if c.block_s else "-",
                c.measured,
            ]
            for c in here.values()
        ],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_speed(
    device: str,
    dtype: str | None,
    told: Callable[[str], None] = lambda what: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """What the device reaches: a product of matrices, a matrix and a vector, the smallest operation, blocks of a model.

    Parameters
    ----------
    device, dtype : what and in what; None for float32 on a CPU and bfloat16 elsewhere
    told : of each part before it is measured
    clock : seconds

    Raises
    ------
    MariotteError
        When torch is missing, or the device or dtype is unknown or not here.
    """
    import datetime

    from mariotte.errors import MariotteError

    if find_spec("torch") is None:
        raise MariotteError("--bench needs torch, which is not installed: install mariotte[bench]")
    import torch

    from mariotte.models.hardware import hardware
    from mariotte.models.load import find_device, find_dtype
    from mariotte.plan.speed import Calibration

    find_device(device)
    where = torch.device(device)
    name = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    kind = find_dtype(name)
    square = torch.randn(_SQUARE, _SQUARE, device=where).to(kind)
    told("multiplying matrices")
    product_s = _seconds(lambda: square @ square, where, clock)
    rows = _BYTES // (_SQUARE * kind.itemsize)
    wide, vector = torch.randn(rows, _SQUARE, device=where).to(kind), torch.randn(_SQUARE, device=where).to(kind)
    told("reading memory")
    read_s = _seconds(lambda: wide @ vector, where, clock)
    small = torch.randn(8, 8, device=where)
    told("calling operations")
    operation_s = _seconds(lambda: small + small, where, clock, repeat=256)
    told("calling blocks")
    block_s, step_s = _blocks(where, kind, clock)
    return Calibration(
        machine=hardware(where),
        device=where.type,
        dtype=name,
        threads=torch.get_num_threads(),
        flops_per_s=2.0 * _SQUARE**3 / product_s,
        bytes_per_s=float(wide.numel() * kind.itemsize) / read_s,
        operation_s=operation_s,
        block_s=block_s,
        step_s=step_s,
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _blocks(where: Any, kind: Any, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds that a decoding step takes for each block, and beside all blocks, where there is next to nothing to do.

    A tiny Llama of two depths: the difference is what calls cost, which for small models is all.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def step(layers: int) -> float:
        sizes = LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=16,
        )
        model = LlamaForCausalLM(sizes).to(where, kind).eval()
        ids = torch.zeros(1, 8, dtype=torch.long, device=where)
        cache = model(ids, use_cache=True).past_key_values

        def one() -> None:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)  # the token just written

        return _seconds(one, where, clock, repeat=8)

    with torch.no_grad():
        few, many = step(_FEW), step(_MANY)
    block_s = max((many - few) / (_MANY - _FEW), 1e-9)
    return block_s, max(few - _FEW * block_s, 1e-9)


def _seconds(operation: Callable[[], Any], where: Any, clock: Callable[[], float], repeat: int = 1) -> float:
    """The least of seven timings: what the device can do when nothing else disturbs it."""
    import torch

    def wait() -> None:
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    operation()
    wait()
    found: list[float] = []
    for _ in range(7):
        began = clock()
        for _ in range(repeat):
            operation()
        wait()
        found.append((clock() - began) / repeat)
    return min(found)
