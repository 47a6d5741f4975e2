from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mariotte.errors import MariotteError, ModelError, UnknownNameError
from mariotte.models.load import fingerprint, load


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_folder_is_loaded_with_tokenizer_and_entry(model_folder: Path) -> None:
    model = load(model_folder)
    assert model.entry.model_type == "qwen2"
    assert model.tokenizer is not None
    assert model.tokenizer.bos_token == "<bos>"
    assert not model.hf.training
    assert model.measured_params() == model.counts.n_params


def test_dtype_and_where_it_is_stored_are_two_things(model_folder: Path) -> None:
    model = load(model_folder, dtype="bfloat16")
    assert model.hf.dtype == torch.bfloat16
    assert model.stored_dtype == torch.float32


def test_the_fingerprint_is_of_the_content(model_folder: Path, copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(model_folder) == load(copy).fingerprint
    edit_config(copy, rms_norm_eps=1e-3)
    assert fingerprint(copy) != fingerprint(model_folder)


def refused(name: str | Path, said: str, kind: type[MariotteError] = ModelError) -> None:
    with pytest.raises(kind) as caught:
        load(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_model_type(copy: Path) -> None:
    edit_config(copy, model_type="qwen9")
    refused(copy, "no model type named 'qwen9'; did you mean 'qwen3' or 'qwen2'?", UnknownNameError)


def test_no_model_type(copy: Path) -> None:
    edit_config(copy, model_type="")
    refused(copy, "must state a model_type")


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, "no weights: expected model.safetensors")


def test_a_pickle_is_never_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    refused(copy, "pytorch_model.bin, a pickle, which can run code")


def test_damaged_weights(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(copy, "cannot be loaded")


def test_missing_weights_are_not_filled_with_noise(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(copy, "lacks weights that its config asks for, such as model.layers.2.")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "holds no config.json")


def test_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    refused(copy, "must be a JSON object")


def test_no_such_folder() -> None:
    refused("./nowhere", "no model folder at ./nowhere")


def test_no_such_testbed_model() -> None:
    refused("testbed/qwen3-1m", "no testbed model named 'testbed/qwen3-1m'", UnknownNameError)


def test_a_hub_name_without_a_network() -> None:
    refused("nobody/has-this-model", "it is no folder here and the hub did not give it")


def test_unknown_dtype(model_folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="dtype must be one of float32, bfloat16"):
        load(model_folder, dtype="int3")


def test_a_model_type_that_is_no_name(copy: Path) -> None:
    edit_config(copy, model_type=["qwen2"])
    refused(copy, "no model type named", UnknownNameError)


def test_an_unknown_activation(copy: Path) -> None:
    edit_config(copy, hidden_act="wish")
    refused(copy, "cannot be loaded")


def test_weights_of_other_shapes(copy: Path) -> None:
    edit_config(copy, intermediate_size=56)
    refused(copy, "its weights have other shapes than its config says")


def test_a_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    refused(copy, "the tokenizer in")


def test_an_empty_name() -> None:
    refused("", "a model must be named")


@pytest.mark.parametrize("device", ["nonsense", "cuda:77", ""])
def test_a_device_that_is_not_here(device: str, model_folder: Path) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used"):
        load(model_folder, device)
