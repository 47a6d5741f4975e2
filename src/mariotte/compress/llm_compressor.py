"""llm-compressor in a Python environment of its own: what it is handed, and what is read back.

It pins other versions of torch and transformers than ours, so that it is never imported here. A folder holds the job:
the model as a checkpoint, the calibration rows and what is asked; `llm_compressor_worker.py`, which imports nothing of
Mariotte, runs in its environment and leaves the rounded weights there. Tensors travel as safetensors alone.

Shapes: N rows, T tokens of a row, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from mariotte.compress.scope import in_scope
from mariotte.errors import ModelError
from mariotte.models.load import quiet_transformers
from mariotte.models.model import Model

VARIABLE = "MARIOTTE_LLM_COMPRESSOR"
"""Of the environment: path or name of the Python that has llm-compressor."""

WORKER = Path(__file__).with_name("llm_compressor_worker.py")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of it.

    Parameters
    ----------
    bits : of an integer
    group : weights that share a scale, None for a whole row
    symmetric, act_order, damp : as of `gptq`
    matrices : their paths from the model
    """

    bits: int
    group: int | None
    symmetric: bool
    act_order: bool
    damp: float
    matrices: list[str]


def interpreter() -> str | None:
    """The Python that `VARIABLE` names, as a path; None where there is no such program."""
    return shutil.which(os.environ.get(VARIABLE, ""))


def refuse(model: Model) -> str | None:
    """Why llm-compressor cannot be asked about a model, in a clause; None where it can."""
    if model.entry.irregular:
        return "by=llm-compressor needs a model of an ordinary class, and this one's is ours: leave by out"
    if reason := model.entry.lacking(["causal", "linear", "dense"]):
        return f"{reason}, which by=llm-compressor is not asked for here: leave by out"
    if interpreter() is None:
        named = os.environ.get(VARIABLE)
        came = f"{VARIABLE} is {named!r}, which is no program" if named else f"{VARIABLE} is not set"
        return (
            f"by=llm-compressor needs that program in a Python environment of its own, and {came}: make one, run "
            f"pip install llmcompressor in it and set {VARIABLE} to its python, or leave by out"
        )
    return None


def run(step: str, model: Model, asked: Asked, tokens_NT: Tensor) -> tuple[dict[str, Tensor], str]:
    """What llm-compressor's GPTQ makes of some matrices.

    Parameters
    ----------
    step : name of the step that asks, for errors
    model : stays as it is
    tokens_NT : calibration

    Returns
    -------
    (O, I) of every matrix by the name of its weight, in the model's dtype, and the program's version

    Raises
    ------
    ModelError
        When it fails, or leaves something else than rounded weights.
    """
    program = interpreter()
    assert program is not None, "refused before"
    with tempfile.TemporaryDirectory(prefix="mariotte-") as temporary:
        folder = Path(temporary)
        with quiet_transformers():
            model.hf.save_pretrained(folder / "model", safe_serialization=True)
        save_file({"tokens": tokens_NT.contiguous().cpu()}, folder / "calibration.safetensors")
        (folder / "asked.json").write_text(json.dumps(asdict(asked)), encoding="utf-8")
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [program, str(WORKER), str(folder)],
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            # Its packages are its own environment's alone.
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | quiet,
        )
        if done.returncode:
            last = next((line.strip() for line in reversed(done.stderr.split("\n")) if line.strip()), "it said nothing")
            raise ModelError(
                f"{step} needs llm-compressor to finish, and {program} ended with code {done.returncode} "
                f"({last[:300]}): see that `{program} -c 'import llmcompressor'` works, or leave by out"
            )
        try:
            return _read(folder / "rounded.safetensors", model, asked)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ModelError(
                f"{step} expects llm-compressor to leave the rounded weights of {len(asked.matrices)} matrices, and "
                f"{program} left something else ({' '.join(str(error).split())[:300]}): leave by out"
            ) from error


def _read(file: Path, model: Model, asked: Asked) -> tuple[dict[str, Tensor], str]:
    found: dict[str, Tensor] = {}
    with cast(Any, safe_open(file, framework="pt")) as rounded:
        version = cast("dict[str, str]", rounded.metadata() or {})["llmcompressor"]
        for name, matrix in in_scope(model, "all").items():
            if name.removesuffix(".weight") not in asked.matrices:
                continue
            weight_OI: Tensor = rounded.get_tensor(name)
            if weight_OI.shape != matrix.weight.shape or not bool(weight_OI.isfinite().all()):
                raise ValueError(f"{name} should be {tuple(matrix.weight.shape)} finite numbers")
            # Bytes will be counted as those of so many bits: it had better have rounded.
            levels = _most_levels(weight_OI.reshape(-1, asked.group or weight_OI.shape[1]))
            if levels > 2**asked.bits:
                raise ValueError(f"{name} has {levels} levels in a group, more than {asked.bits} bits have")
            found[name] = weight_OI.to(matrix.weight.dtype)
    return found, version


def _most_levels(weight_NG: Tensor) -> int:
    """The largest number of different weights in a group."""
    sorted_NG = weight_NG.sort(1).values
    return 1 + int((sorted_NG[:, 1:] != sorted_NG[:, :-1]).sum(1).max()) if sorted_NG.shape[1] > 1 else 1


__all__ = ["VARIABLE", "WORKER", "Asked", "interpreter", "refuse", "run"]
