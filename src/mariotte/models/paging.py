"""Weights that stay on disk: read when something computes with them, written to scratch when they were changed.

A model whose parameters are `Stored` is walked, cut and saved by the same code as any other, and holds a few blocks of
itself in memory. Files are read with plain reads and never mapped, so that no page of them counts as the process'.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import math
import os
import struct
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from mariotte.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a safetensors header."""

_LONGEST_HEADER = 10**8
"""Bytes; the format's own bound."""

_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""

PIECE_BYTES = 1 << 22
"""Of what is copied or looked through a piece at a time."""

_numbers = itertools.count()
"""Of scratch files: of all of this process, since several models may have one folder."""

SHARD_BYTES = 5 * 10**9
"""Of one file of a checkpoint, as transformers writes them."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where the numbers of a tensor are in a file.

    Parameters
    ----------
    path, start : the file, and the first byte
    dtype, shape : of the tensor, row after row
    """

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it, on the CPU in its own dtype."""
        return self._read(self.start, math.prod(self.shape)).view(self.shape)

    def rows(self, wanted: Iterable[int]) -> Tensor:
        """Some of its rows, in the order asked for."""
        width = math.prod(self.shape[1:])
        size = width * self.dtype.itemsize
        found = [self._read(self.start + row * size, width).view(1, *self.shape[1:]) for row in wanted]
        return torch.cat(found) if found else torch.empty((0, *self.shape[1:]), dtype=self.dtype)

    def pieces(self) -> Iterator[Tensor]:
        """All of it, some rows at a time; a tensor without rows comes whole."""
        width = math.prod(self.shape[1:])
        at_once = max(1, PIECE_BYTES // max(1, width * self.dtype.itemsize))
        if not self.shape or self.shape[0] <= at_once:
            yield self.read()
            return
        for start in range(0, self.shape[0], at_once):
            rows = min(at_once, self.shape[0] - start)
            place = self.start + start * width * self.dtype.itemsize
            yield self._read(place, rows * width).view(rows, *self.shape[1:])

    def expert(self, number: int, start: int, stop: int) -> Source:
        """Some rows of one of the matrices that it holds one after another."""
        _, rows, *width = self.shape
        place = self.start + (number * rows + start) * math.prod(width) * self.dtype.itemsize
        return Part(self.path, place, self.dtype, (stop - start, *width), self)

    def _read(self, start: int, count: int) -> Tensor:
        found = torch.empty(count, dtype=self.dtype)
        # As bytes: numpy, through which a tensor's memory is reached, has no bfloat16.
        whole = found.view(torch.uint8).numpy().data if count else memoryview(b"")
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                done = 0
                while done < len(whole):
                    got = os.preadv(file, [whole[done:]], start + done)
                    if not got:
                        raise OSError(None, "it ends too early")
                    done += got
            finally:
                os.close(file)
        except OSError as error:
            raise ModelError(
                f"{self.path} should hold {count * self.dtype.itemsize:,} bytes from {start:,} on, and cannot be read "
                f"({error.strerror or error}): it was changed or removed while the model was in use"
            ) from error
        return found


@dataclass(frozen=True, eq=False)
class Part(Source):
    """A part of a tensor in a file.

    Parameters
    ----------
    of : the tensor, whose file is there as long as a part of it is
    """

    of: Source


@dataclass(frozen=True, eq=False)
class Joined:
    """A tensor that several in files make up: experts one after another, and of each its parts one below the other.

    Parameters
    ----------
    parts : of each expert, all of one dtype and one width; experts are alike
    """

    parts: tuple[tuple[Source, ...], ...]

    @property
    def path(self) -> Path:
        """A file that holds some of it."""
        return self.parts[0][0].path

    @property
    def dtype(self) -> torch.dtype:
        """Of all parts."""
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(experts, rows of all parts, ...)."""
        first = self.parts[0]
        return (len(self.parts), sum(part.shape[0] for part in first), *first[0].shape[1:])

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it, on the CPU in its own dtype."""
        found = torch.empty(self.shape, dtype=self.dtype)
        for expert, parts in zip(found, self.parts, strict=True):
            place = 0
            for part in parts:
                expert[place : place + part.shape[0]] = part.read()
                place += part.shape[0]
        return found

    def rows(self, wanted: Iterable[int]) -> Tensor:
        """Some of its experts, in the order asked for."""
        found = [torch.cat([part.read() for part in self.parts[expert]]).unsqueeze(0) for expert in wanted]
        return torch.cat(found) if found else torch.empty((0, *self.shape[1:]), dtype=self.dtype)

    def pieces(self) -> Iterator[Tensor]:
        """All of it, an expert at a time."""
        for expert in range(len(self.parts)):
            yield self.rows([expert])

    def expert(self, number: int, start: int, stop: int) -> Source:
        """Some rows of one expert: one of the parts that it is made of."""
        place = 0
        for part in self.parts[number]:
            if (place, place + part.shape[0]) == (start, stop):
                return part
            place += part.shape[0]
        raise AssertionError(f"rows {start} to {stop} of an expert are none of its parts")


def read_header(path: Path) -> dict[str, Source]:
    """What a safetensors file holds, by name; its numbers are not read.

    Raises
    ------
    ModelError
        When the file is damaged, or holds numbers of a kind that is not known here.
    """
    # By ourselves: safetensors' own reader maps the whole file as memory of the process.
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"its header should take {length:,} bytes of {size:,}")
            header = cast("dict[str, Any]", json.loads(file.read(length)))
        header.pop("__metadata__", None)
        found: dict[str, Source] = {}
        for name, stated in header.items():
            if stated["dtype"] not in DTYPES:
                raise ModelError(
                    f"{path} holds {name} as {stated['dtype']}, which cannot be read block by block: "
                    f"convert it to one of {', '.join(DTYPES)}"
                )
            shape = tuple(int(one) for one in stated["shape"])
            begin, end = (int(place) for place in stated["data_offsets"])
            source = Source(path, 8 + length + begin, DTYPES[stated["dtype"]], shape)
            if min(begin, *shape, 0) < 0 or end - begin != source.nbytes or 8 + length + end > size:
                raise ValueError(f"{name} should lie at {begin:,} to {end:,} of {size - 8 - length:,} bytes")
            found[name] = source
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} must be a safetensors file, and cannot be read: {error}") from error
    return found


class Pager:
    """Keeps of many stored tensors those that were used last.

    Parameters
    ----------
    folder : where changed tensors go; it holds only what some model still has
    device : where tensors are computed with
    limit : bytes of tensors held at once; a larger one is held alone

    Attributes
    ----------
    read_bytes : read until now
    """

    def __init__(self, folder: Path, device: torch.device, limit: int) -> None:
        self.folder, self.device, self.limit = folder, device, limit
        _give_back_what_is_freed()
        self.read_bytes = 0
        self._held: OrderedDict[int, weakref.ref[Cell]] = OrderedDict()

    def hold(self, cell: Cell) -> Tensor:
        """The numbers of a tensor; those used longest ago are let go to make room."""
        found = cell.numbers
        if found is None:
            self._make_room(cell.nbytes)
            self.read_bytes += cell.source.nbytes
            found = cell.numbers = cell.read()
        self._held[id(cell)] = weakref.ref(cell)
        self._held.move_to_end(id(cell))
        return found

    def keep(self, cell: Cell, numbers: Tensor) -> None:
        """Take back numbers that were written to, should they have been let go meanwhile."""
        cell.numbers = numbers
        cell.written()
        self._held[id(cell)] = weakref.ref(cell)

    def let_go(self) -> None:
        """Free the memory of all that is held."""
        for one in list(self._held.values()):
            if (cell := one()) is not None:
                cell.let_go()
        self._held.clear()

    def forget(self, cell_id: int) -> None:
        """A cell is gone."""
        self._held.pop(cell_id, None)

    def _make_room(self, wanted: int) -> None:
        held = [cell for one in list(self._held.values()) if (cell := one()) is not None]
        total = sum(cell.nbytes for cell in held)
        for cell in held:
            if total + wanted <= self.limit:
                break
            total -= cell.nbytes
            cell.let_go()
            self.forget(id(cell))

    def write(self, tensor: Tensor) -> Source:
        """Put a tensor into scratch; its file goes when nothing refers to it any more.

        Raises
        ------
        ModelError
            When it cannot be written.
        """
        path = self.folder / f"{os.getpid()}-{next(_numbers)}.bin"
        source = Source(path, 0, tensor.dtype, tuple(tensor.shape))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in _rows_of(tensor.detach()):
                    file.write(_bytes_of(piece))
        except OSError as error:
            with suppress(OSError):
                path.unlink()
            raise ModelError(
                f"{source.nbytes:,} bytes of weights cannot be kept in {self.folder}: {error.strerror or error}; "
                "name a folder with room for the model"
            ) from error
        weakref.finalize(source, path.unlink, missing_ok=True)
        return source

    def stored(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Stored:
        """A tensor put into scratch."""
        return Stored(Cell(self, self.write(tensor.detach().to(dtype or tensor.dtype)), dtype or tensor.dtype))


@functools.lru_cache(maxsize=1)
def _give_back_what_is_freed() -> None:
    """Have the C library return the memory of freed tensors to the machine.

    glibc keeps pieces of up to 32 MB for later once the first such piece was freed, in a heap that later small pieces
    pin: a 0.3 GB model cut with `slice` then took 0.2 GB, and 0.05 GB so. No setting of Python or torch reaches it.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _rows_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in memory, some rows at a time, so that no second copy of it is made to write it."""
    if tensor.ndim == 0:
        yield tensor
        return
    width = tensor[:1].numel() * tensor.dtype.itemsize
    yield from tensor.split(max(1, PIECE_BYTES // max(1, width)))


class Cell:
    """One tensor's place: on disk, and for a while in memory.

    Parameters
    ----------
    pager : who lets it go
    source : where it is on disk
    dtypes : through which it is cast, one after another, when it is read; it is computed with in the last
    """

    def __init__(self, pager: Pager, source: Source | Joined, *dtypes: torch.dtype) -> None:
        self.pager, self.source, self.dtypes = pager, source, dtypes
        self.shape = source.shape
        self.numbers: Tensor | None = None
        self._written = False
        self._viewed: dict[int, tuple[Tensor, int]] = {}

    def __del__(self) -> None:
        self.pager.forget(id(self))

    @property
    def dtype(self) -> torch.dtype:
        """In which it is computed with."""
        return self.dtypes[-1]

    def read(self) -> Tensor:
        """All of it, where and in the dtype in which it is computed with."""
        if not self.shape or (self.source.dtype == self.dtype and self.pager.device.type == "cpu"):
            return self.cast(self.source.read())
        # Neither here nor there is it whole in another form, even for a moment.
        found, place = torch.empty(self.shape, dtype=self.dtype, device=self.pager.device), 0
        for piece in self.source.pieces():
            found[place : place + len(piece)] = self.cast(piece)
            place += len(piece)
        return found

    def cast(self, numbers: Tensor) -> Tensor:
        """What was read, where and in the dtype in which it is computed with."""
        for dtype in self.dtypes:
            numbers = numbers.to(dtype)
        # Last: a device then never holds it in both dtypes.
        return numbers.to(self.pager.device)

    @property
    def nbytes(self) -> int:
        """In memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def viewed(self, handle: Tensor) -> None:
        """A view of the numbers was handed out, through which they may be written to."""
        # torch counts the writes to a tensor, those through its views among them; the handle must live to be asked.
        self._viewed.setdefault(id(handle), (handle, handle._version))

    def written(self) -> None:
        """The numbers in memory are no longer those on disk."""
        self._written = True

    def settle(self) -> Source | Joined:
        """Write to scratch what was changed since it was read; then the source says what the tensor is."""
        changed = self._written or any(handle._version != version for handle, version in self._viewed.values())
        if changed and self.numbers is not None:
            self.source, self.dtypes = self.pager.write(self.numbers), (self.dtype,)
        self._written = False
        self._viewed = {key: (handle, handle._version) for key, (handle, _) in self._viewed.items()}
        return self.source

    def let_go(self) -> None:
        """Free the memory."""
        self.settle()
        self.numbers, self._viewed = None, {}


class Stored(Tensor):
    """A tensor whose numbers are on disk; any operation reads them, and what it returns is an ordinary tensor.

    Operations in place write: the changed numbers are kept in scratch, never in the file that they came from. A view
    is of the numbers in memory, so write through it at once or not at all.

    Parameters
    ----------
    cell : where the numbers are; a copy has another one, an alias such as ``weight.data`` the same
    """

    cell: Cell

    @staticmethod
    def __new__(cls: type[Stored], cell: Cell) -> Stored:
        """A handle; nothing is read."""
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] how torch has subclasses made
            cls, cell.shape, dtype=cell.dtype, device=cell.pager.device
        )
        made.cell = cell
        return made

    def __init__(self, cell: Cell) -> None:
        """Nothing more than `__new__` does."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUnknownMemberType, reportAssignmentType, reportUnknownVariableType] as torch's own subclasses do

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Read the numbers, compute, and keep what was written."""
        if func is torch.ops.aten.detach.default:
            return Stored(args[0].cell)
        if func is torch.ops.aten.embedding.default and isinstance(args[0], Stored):
            return _embedded(args[0], args[1])
        used: list[tuple[Stored, Tensor]] = []

        def read(x: Any) -> Any:
            if not isinstance(x, Stored):
                return x
            numbers = x.cell.pager.hold(x.cell)
            used.append((x, numbers))
            return numbers

        real: Any = pytree.tree_map(read, (list(args), dict(kwargs or {})))
        found = func(*real[0], **real[1])
        if not func._schema.is_mutable:
            if any(returned.alias_info is not None for returned in func._schema.returns):
                for stored, _ in used:
                    stored.cell.viewed(stored)
            return found
        for stored, numbers in _written(func, args, kwargs or {}, used):
            stored.cell.pager.keep(stored.cell, numbers)

        def named(x: Any) -> Any:
            return next((stored for stored, numbers in used if numbers is x), x)

        return pytree.tree_map(named, found)

    @override
    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Stored({list(self.shape)}, {self.dtype}, {self.cell.source.path.name})"

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _like(self, self.another())

    @override
    def __reduce_ex__(self, proto: Any) -> Any:
        raise ModelError("a streamed model stays in its process: save it as a checkpoint and load that elsewhere")

    def expert(self, number: int, start: int, stop: int) -> Stored:
        """Some rows of one expert of those that it holds, (rows, width): a tensor of its own; nothing is read."""
        source = self.cell.settle().expert(number, start, stop)
        return Stored(Cell(self.cell.pager, source, *self.cell.dtypes))

    def another(self, dtype: torch.dtype | None = None) -> Stored:
        """A tensor of its own with the same numbers, perhaps in another dtype; nothing is read."""
        source = self.cell.settle()
        # Through the dtype that it had: numbers that were rounded once stay so.
        dtypes = self.cell.dtypes if dtype is None or dtype == self.dtype else (*self.cell.dtypes, dtype)
        return Stored(Cell(self.cell.pager, source, *dtypes))


def _written(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], used: Sequence[tuple[Stored, Tensor]]
) -> list[tuple[Stored, Tensor]]:
    """Those of the stored tensors in a call that its schema says are written to."""
    places = zip(func._schema.arguments, itertools.chain(args, itertools.repeat(None)), strict=False)
    targets = [
        kwargs.get(argument.name, given)
        for argument, given in places
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    found: list[Any] = pytree.tree_leaves(targets)
    return [(stored, numbers) for stored, numbers in used if any(stored is each for each in found)]


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _embedded(weight: Stored, ids: Tensor) -> Tensor:
    """Rows of a table, of which only those are read."""
    cell = weight.cell
    if cell.numbers is not None:
        return cell.pager.hold(cell)[ids]
    wanted, places = cast("tuple[Tensor, Tensor]", ids.unique(return_inverse=True))
    rows = cell.source.rows(cast("list[int]", wanted.tolist()))
    cell.pager.read_bytes += rows.nbytes
    return cell.cast(rows)[places]


def pager_of(tensor: Tensor) -> Pager | None:
    """Who keeps a tensor on disk; None for one in memory."""
    return tensor.cell.pager if isinstance(tensor, Stored) else None


def another(tensor: Tensor) -> Tensor:
    """A copy that does not change with the original: on disk when that is, else in memory."""
    return tensor.another() if isinstance(tensor, Stored) else tensor.detach().clone()


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """All of a tensor: itself, or if it is on disk some rows at a time in its dtype, which no cache then holds."""
    if not isinstance(tensor, Stored):
        yield tensor.detach()
        return
    yield from map(tensor.cell.cast, tensor.cell.settle().pieces())


class Spilled(MutableMapping[str, Tensor]):
    """Tensors by name that are written to scratch at once, and read when asked for.

    Parameters
    ----------
    pager : whose scratch
    dtypes : in which to keep those that it names; others are kept as they come
    """

    def __init__(self, pager: Pager, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self._pager, self._dtypes = pager, dtypes or {}
        self._sources: dict[str, Source] = {}

    def stored(self, name: str) -> Stored:
        """The tensor of that name, still on disk."""
        source = self._sources[name]
        return Stored(Cell(self._pager, source, source.dtype))

    @override
    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._sources[name] = self._pager.write(tensor.detach().to(self._dtypes.get(name, tensor.dtype)))

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._sources[name].read().to(self._pager.device)

    @override
    def __delitem__(self, name: str) -> None:
        del self._sources[name]

    def __ior__(self, others: Mapping[str, Tensor]) -> Spilled:
        self.update(others)
        return self

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    @override
    def __len__(self) -> int:
        return len(self._sources)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_file(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors as one safetensors file, holding a piece of one at a time besides them.

    Parameters
    ----------
    tensors : by name
    dtype : of floating ones; None keeps each as it is

    Raises
    ------
    OSError
        When it cannot be written.
    """
    dtypes = {name: (dtype or t.dtype) if t.is_floating_point() else t.dtype for name, t in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * dtypes[name].itemsize
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight bytes, as the format asks
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            for whole in pieces(tensor):
                for piece in _rows_of(whole):
                    file.write(_bytes_of(piece.to(dtypes[name])))


def write_shards(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write tensors as the safetensors files of a checkpoint, holding a piece of one at a time.

    Parameters
    ----------
    tensors : by name; floating ones are written in `dtype`
    folder : gets ``model.safetensors``, or shards of at most 5 GB and their index

    Raises
    ------
    OSError
        When they cannot be written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, shard in zip(names, shards, strict=True):
        write_file(shard, folder / file, dtype)
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
