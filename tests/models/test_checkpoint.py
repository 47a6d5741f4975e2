from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mariotte.errors import ModelError
from mariotte.models import checkpoint
from mariotte.models.load import load
from mariotte.models.model import Model
from mariotte.testing.tiny import random_tokens, tiny


@pytest.fixture
def model() -> Model:
    return tiny("llama")


def test_saved_and_loaded_back_it_computes_the_same(model: Model, tmp_path: Path) -> None:
    folder = checkpoint.save(model, tmp_path / "out")
    tokens_BT = random_tokens()
    with torch.no_grad():
        assert torch.equal(load(folder).logits(tokens_BT), model.logits(tokens_BT))
    assert not list(tmp_path.glob(".out-*"))


def test_weights_can_be_stored_rounded_and_memory_stays_unrounded(tmp_path: Path) -> None:
    model = tiny("llama")
    before = model.embeddings.weight.clone()
    folder = checkpoint.save(model, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(model.embeddings.weight, before)
    assert model.hf.dtype == torch.float32
    assert torch.equal(load(folder).embeddings.weight, before.bfloat16().float())
    assert load(folder).stored_dtype == torch.bfloat16


def test_the_card_says_what_was_done(model: Model, tmp_path: Path) -> None:
    folder = checkpoint.save(model, tmp_path / "out", dense_params=2 * model.counts.n_params)
    assert "50.0% removed" in (folder / "README.md").read_text()
    assert json.loads((folder / checkpoint.SIDECAR).read_text())["base_fingerprint"] == model.fingerprint


def test_a_checkpoint_that_loads_back_to_other_logits_is_not_kept(model: Model, tmp_path: Path) -> None:
    model.hf.config.rms_norm_eps = 0.5  # the config now tells another model than the one in memory
    with pytest.raises(ModelError, match="loads back to other logits"):
        checkpoint.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_load_is_not_kept(model: Model, tmp_path: Path) -> None:
    model.hf.config.intermediate_size = 56
    with pytest.raises(ModelError, match="does not load back"):
        checkpoint.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(model: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not empty"):
        checkpoint.save(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_will_do(model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert checkpoint.save(model, tmp_path / "out").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder(model: Model, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ModelError, match="cannot be written"):
        checkpoint.save(model, tmp_path / "out")


def test_a_path_below_a_file(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        checkpoint.save(model, tmp_path / "file" / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_and_leaves_nothing(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        Path("/dev/full").write_text("x" * 1_000_000)

    monkeypatch.setattr(type(model.hf), "save_pretrained", full)
    with pytest.raises(ModelError, match="No space left on device; nothing was left there"):
        checkpoint.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_card_names_the_class_that_reads_the_tokenizer(model_folder: Path, shared: Path, tmp_path: Path) -> None:
    # Qwen2's AutoTokenizer would put byte-level rules in place of whole words; Llama's takes the file as it is.
    folder = checkpoint.save(load(model_folder), tmp_path / "qwen2")
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained" in (folder / "README.md").read_text()
    folder = checkpoint.save(load(shared / "data/models/stories260K"), tmp_path / "llama")
    assert "tokenizer = AutoTokenizer.from_pretrained" in (folder / "README.md").read_text()


def test_what_is_stored_is_what_was_computed_whatever_the_base_was_stored_in(tmp_path: Path) -> None:
    model = tiny("llama")
    model.stored_dtype = torch.bfloat16
    folder = checkpoint.save(model, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert torch.equal(load(folder).embeddings.weight, model.embeddings.weight)


def test_others_may_read_it(model: Model, tmp_path: Path) -> None:
    folder = checkpoint.save(model, tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~mask}


def test_its_history_comes_back(model_folder: Path, tmp_path: Path) -> None:
    from mariotte import compress_model

    zeroed = compress_model(str(model_folder), "magnitude@0.5")
    again = load(checkpoint.save(zeroed, tmp_path / "out"))
    assert again.done == zeroed.done
    assert not again.derived
    assert zeroed.derived


def test_saving_says_nothing(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(load(model_folder), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
