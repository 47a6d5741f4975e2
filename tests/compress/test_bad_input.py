"""What cannot be compressed is refused as a user meets it: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mariotte import architectures
from mariotte import chain as chains
from mariotte.cli.main import app
from mariotte.errors import ChainError
from mariotte.experiments import identity
from mariotte.testing.methods import run
from mariotte.testing.tiny import random_tokens, tiny

TEXT = ("--calibration", "testbed/all", "--rows", "4")


def refused(model: Path | str, chain: str, folder: Path, *options: str) -> str:
    """What is said when a model is to be compressed; fails when it is more than a sentence, or something is written."""
    there = set(folder.rglob("*"))
    done = CliRunner().invoke(app, ["compress", str(model), chain, "--out", str(folder / "out"), *options])
    assert done.exit_code == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert set(folder.rglob("*")) == there
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("mariotte: ")]
    return sentence


def changed(model_folder: Path, folder: Path, **factors: float) -> Path:
    """A copy of the model with each entry of some parameters multiplied; the first one alone where that is NaN."""
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        (found,) = (weight for key, weight in weights.items() if key.endswith(name.replace("__", ".")))
        if factor == factor:
            found.mul_(factor)
        else:
            found.view(-1)[0] = factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("chain", ["slice@0.3", "prunenet-random@0.3", "magnitude@0.5", "ffn@0.3 | lora@1k"])
def test_weights_that_are_not_finite(chain: str, model_folder: Path, tmp_path: Path) -> None:
    model = changed(model_folder, tmp_path / "nan", **{"layers__1__mlp__up_proj__weight": float("nan")})
    said = refused(model, chain, tmp_path, *TEXT)
    assert "layers.1.mlp.up_proj.weight holds NaN or infinity: check its files" in said


@pytest.mark.parametrize("chain", ["slice@0.3", "slicegpt@0.3", "ffn@0.3", "heads@0.5", "shortgpt@0.5", "wanda@0.5"])
def test_activations_that_are_not_finite(chain: str, model_folder: Path, tmp_path: Path) -> None:
    large = {f"layers__0__self_attn__{name}_proj__weight": 1e30 for name in "vo"}
    said = refused(changed(model_folder, tmp_path / "large", **large), chain, tmp_path, *TEXT)
    assert " found activations that are not finite in " in said
    assert said.endswith("check the checkpoint, or compute in a wider dtype")


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ("shortgpt@1", "the share of blocks to remove must be in [0, 1), got 1"),
        ("heads@1.0", "the share of heads to remove must be in [0, 1), got 1"),
        ("heads@0.99(of=model)", "heads can remove at most"),
        ("wanda@0.3(nm=2:4)", "nm=2:4 sets 0.5 of the weights to zero, got 0.3: write wanda@0.5(nm=2:4), or leave nm"),
    ],
)
def test_amounts_that_cannot_be_had(chain: str, words: str, model_folder: Path, tmp_path: Path) -> None:
    assert words in refused(model_folder, chain, tmp_path, *TEXT)


def test_a_contradiction_is_said_before_anything_is_read(tmp_path: Path) -> None:
    assert "nm=2:4 sets 0.5" in refused(tmp_path / "no such model", "sparsegpt@0.3(nm=2:4)", tmp_path)


@pytest.mark.parametrize("text", ["", "one"])
@pytest.mark.parametrize("chain", ["slice@0.3", "shortgpt@0.5"])
def test_calibration_text_of_no_token_or_one(chain: str, text: str, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(text)
    said = refused(model_folder, chain, tmp_path, "--calibration", f"file:{tmp_path / 'text'}")
    assert "tokens, fewer than 128 blocks of 128: " in said
    assert "needs calibration text, got none: name a corpus" in refused(model_folder, chain, tmp_path)


@pytest.mark.parametrize(
    "chain",
    [
        "ffn@0.5(ridge=1e-300)",
        "ffn@0.5(ridge=1e-300, sequential=true)",
        "heads@0.5(ridge=1e-300)",
        "slice@0.5(ridge=1e-300)",
        "sparsegpt@0.5(damp=1e-300)",
    ],
)
def test_a_ridge_that_holds_nothing_up(chain: str, tmp_path: Path) -> None:
    (part,) = identity.resolve(chains.parse(chain))
    with pytest.raises(ChainError, match=r"that can be inverted, and got one that cannot: ask for a larger ridge"):
        run(part.step, tiny("llama"), part.amount, tmp_path, random_tokens(1, 4))  # of fewer tokens than inputs


def test_a_family_whose_head_size_hangs_on_its_width(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = dataclasses.replace(architectures.find("qwen2"), head_dim="")
    monkeypatch.setattr(architectures, "FAMILIES", {**architectures.FAMILIES, "qwen2": tied})
    said = refused(model_folder, "slice@0.3", tmp_path, *TEXT)
    assert "needs a config that states head_dim, and qwen2 ties the head size to the hidden size: take ffn" in said
