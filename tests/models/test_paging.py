"""Tensors that stay on disk: read when used, written to scratch when changed, gone when nobody has them."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mariotte.errors import ModelError
from mariotte.models import paging
from mariotte.models.paging import Cell, Pager, Spilled, Stored, another, pager_of, pieces, read_header, write_shards

A = torch.arange(100.0).view(10, 10)


@pytest.fixture
def pager(tmp_path: Path) -> Pager:
    """Holds two and a half of the tensors of these tests."""
    return Pager(tmp_path / "scratch", torch.device("cpu"), 1000)


def crowd_out(pager: Pager) -> None:
    """Use so much else that nothing of before is held."""
    pager.stored(torch.zeros(20, 20)).sum()


def files(pager: Pager) -> int:
    gc.collect()
    return len(list(pager.folder.iterdir()))


def test_computes_as_any_tensor(pager: Pager) -> None:
    stored = pager.stored(A)
    assert type(stored.double()) is Tensor
    assert torch.equal(stored, A)
    assert torch.equal(stored.double() @ stored.T.double(), A.double() @ A.T.double())
    assert torch.equal(stored[[1, 5], 2:], A[[1, 5], 2:])
    assert (stored.shape, stored.dtype, stored.numel(), stored.device) == (A.shape, A.dtype, 100, A.device)
    assert pager_of(stored) is pager
    assert pager_of(A) is None


def test_a_layer_with_stored_weights(pager: Pager) -> None:
    layer = nn.Linear(10, 10, bias=False)
    x = torch.randn(2, 3, 10)
    layer.weight = nn.Parameter(pager.stored(A), requires_grad=False)
    assert torch.equal(layer(x), nn.functional.linear(x, A))
    assert [type(parameter) for parameter in layer.parameters()] == [Stored]


def test_holds_no_more_than_its_limit(pager: Pager) -> None:
    many = [pager.stored(A + number) for number in range(5)]
    for number, stored in enumerate(many):
        assert torch.equal(stored, A + number)
        assert sum(one.cell.numbers is not None for one in many) <= 2
    # Those that were used last are held: they cost no second read.
    before = pager.read_bytes
    _ = many[4] + many[3]
    assert pager.read_bytes == before
    many[0].sum()
    assert pager.read_bytes == before + 400


def test_what_is_written_stays_when_it_is_let_go(pager: Pager) -> None:
    stored, expected = pager.stored(torch.zeros(10, 10)), torch.zeros(10, 10)
    for tensor in (stored, expected):
        tensor.fill_(1.0)
        tensor[:, [1, 2]] = 3.0
        tensor[0, :4].fill_(7.0)
        tensor.data[3].add_(2.0)
        tensor.t()[5].copy_(A[0])
        tensor += 1
    crowd_out(pager)
    assert stored.cell.numbers is None
    assert torch.equal(stored, expected)


def test_in_place_gives_the_tensor_itself(pager: Pager) -> None:
    stored = pager.stored(A)
    assert stored.zero_() is stored
    assert stored.copy_(A) is stored


def test_what_is_only_read_is_not_written_again(pager: Pager) -> None:
    stored = pager.stored(A)
    source = stored.cell.source
    _ = stored[3].sum() + stored.t().sum()
    other = pager.stored(A)
    other += stored
    crowd_out(pager)
    assert stored.cell.source is source


def test_a_copy_is_of_its_own(pager: Pager) -> None:
    parameter = nn.Parameter(pager.stored(A), requires_grad=False)
    copied = copy.deepcopy({"one": parameter, "other": parameter})
    assert copied["one"] is copied["other"]
    assert isinstance(copied["one"], nn.Parameter)
    with torch.no_grad():
        copied["one"].zero_()
    assert torch.equal(parameter, A)
    with torch.no_grad():
        parameter[0] = -1.0
    again = another(parameter)
    crowd_out(pager)
    assert float(again[0, 0]) == float(parameter[0, 0]) == -1.0


def test_scratch_holds_what_is_in_use(pager: Pager) -> None:
    stored = pager.stored(A)
    copied = another(stored)
    assert files(pager) == 1
    copied.zero_()
    crowd_out(pager)
    assert files(pager) == 2
    del copied
    assert files(pager) == 1
    del stored
    assert files(pager) == 0


def test_the_file_that_it_came_from_is_never_written(pager: Pager, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": A}, path)
    before = path.read_bytes()
    stored = Stored(Cell(pager, read_header(path)["a"], torch.float32))
    stored.zero_()
    crowd_out(pager)
    assert not stored.any()
    assert path.read_bytes() == before


def test_a_table_is_read_row_by_row(pager: Pager) -> None:
    ids = torch.tensor([[1, 5, 1], [5, 2, 9]])
    table = nn.Embedding(10, 10)
    table.weight = nn.Parameter(pager.stored(A), requires_grad=False)
    assert torch.equal(table(ids), A[ids])
    assert pager.read_bytes == 4 * 40
    _ = table.weight.sum()
    assert torch.equal(table(ids), A[ids])


def test_pieces_are_all_of_it(pager: Pager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "PIECE_BYTES", 120)
    stored = pager.stored(A.bfloat16()).another(torch.float32)
    found = list(pieces(stored))
    assert [len(piece) for piece in found] == [6, 4]
    assert torch.equal(torch.cat(found), A)
    assert [id(piece.untyped_storage()) for piece in pieces(A)]
    assert torch.equal(next(pieces(pager.stored(torch.tensor(2.0)))), torch.tensor(2.0))


def test_spilled_tensors(pager: Pager) -> None:
    spilled = Spilled(pager, {"a": torch.bfloat16})
    spilled.update({"a": A, "b": A.double()})
    assert spilled["a"].dtype == torch.bfloat16
    assert torch.equal(spilled.stored("a"), A.bfloat16())
    assert torch.equal(spilled.pop("b"), A.double())
    assert list(spilled) == ["a"]


@pytest.mark.parametrize("shard", [10**9, 300])
def test_shards_are_safetensors(pager: Pager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    monkeypatch.setattr(paging, "SHARD_BYTES", shard)
    monkeypatch.setattr(paging, "PIECE_BYTES", 120)
    tensors = {"a": pager.stored(A), "b": A.T, "c": torch.arange(3), "d": torch.tensor(1.5)}
    write_shards(tensors, tmp_path, torch.bfloat16)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == (1 if shard > 300 else 2)
    found = {name: tensor for path in written for name, tensor in load_file(path).items()}
    assert {name: tensor.dtype for name, tensor in found.items()}["c"] == torch.int64
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


def test_a_damaged_file_is_refused_in_a_sentence(pager: Pager, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"12345678 not a header")
    with pytest.raises(ModelError, match="must be a safetensors file"):
        read_header(path)
    save_file({"a": A}, path)
    source = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError, match="changed or removed while the model was in use"):
        source.read()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ModelError, match="name a folder with room"):
        Pager(tmp_path / "file", torch.device("cpu"), 1000).stored(A)


def test_does_not_leave_its_process(pager: Pager) -> None:
    with pytest.raises(ModelError, match="save it as a checkpoint"):
        pickle.dumps(pager.stored(A))
