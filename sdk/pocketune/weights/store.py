"""Weights in memory-mapped safetensors files: nothing is read before it is used, and what was used can be dropped."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pocketune.errors import FileFormatError, ModelError
from pocketune.tensorfile import TensorEntry, open_tensor_file
from pocketune.weights.quant import Packed, unpack

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SLICE_VALUES = 2**18
"""Values read and converted at a time; they fit a processor's cache."""

_FAULT_AROUND = 2**16

CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"
"""Endings of the tensors that hold a packed weight."""
BITS_KEY, SHAPES_KEY = "pocketune.bits", "pocketune.shapes"
"""Metadata of a file of packed weights: the bits of a value, and the shapes that the weights had, as JSON by name."""


class Matrix(Protocol):
    """A frozen weight of (rows, columns, taps) on disk; taps are the pixels of a convolution's kernel, 1 for a Linear."""

    rows: int
    columns: int
    taps: int

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its bytes lie."""

    def read(self, rows: range, columns: range, out: Tensor) -> None:
        """Write a part of it into `out`, (rows, columns, taps) in any floating-point type."""


@dataclass(frozen=True)
class Place:
    """Bytes `start` to `stop` of a mapped file."""

    file: MappedFile
    start: int
    stop: int

    def drop(self) -> None:
        """Give the pages back to the system; they are read again when they are touched again."""
        self.file.drop(self.start, self.stop)


class MappedFile:
    """One safetensors file, mapped; its header is checked."""

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            ModelError: it cannot be read, or is damaged.
        """
        try:
            self._header = open_tensor_file(path)
            self._file = path.open("rb")
            # A private mapping: torch wants memory that could be written, and nobody writes it.
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (FileFormatError, OSError, ValueError) as error:
            msg = f"the weights {path} are damaged or cannot be read ({error}). Download the model again."
            raise ModelError(msg) from error
        self.path = path
        self._buffers: dict[int, Tensor] = {}
        unknown = {entry.dtype for entry in self._header.tensors.values()} - set(DTYPES)
        if unknown:
            msg = f"{path} holds values of type {min(unknown)}, which cannot be read. Convert the model with diffusers."
            raise ModelError(msg)

        try:
            self.packed_bits = int(self._header.metadata.get(BITS_KEY, "0"))
            self._shapes: dict[str, list[int]] = json.loads(self._header.metadata.get(SHAPES_KEY, "{}"))
        except ValueError as error:
            msg = f"the packed weights {path} are damaged ({error}). Delete the file; it will be made again."
            raise ModelError(msg) from error

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The tensors by name."""
        return self._header.tensors

    def view(self, name: str) -> Tensor:
        """A tensor in the mapped memory, which must not be written."""
        entry = self.entries[name]
        if not entry.count:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        flat = torch.frombuffer(self._map, dtype=DTYPES[entry.dtype], count=entry.count, offset=entry.start)
        return flat.view(entry.shape)

    def packed_shape(self, name: str) -> tuple[int, ...]:
        """The shape that a packed weight had."""
        return tuple(self._shapes[name])

    def place(self, name: str) -> Place:
        """Where a tensor lies."""
        return Place(self, self.entries[name].start, self.entries[name].end)

    def read(self, start: int, size: int, *, slot: int = 0) -> Tensor:
        """Bytes of the file as uint8, in a buffer that the next read of the same slot uses again.

        Unlike the mapped memory this maps no pages, of which the system would map some more around each that is touched.

        Raises:
            ModelError: the file became shorter.
        """
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[slot] = torch.empty(size, dtype=torch.uint8)
        target, done = buffer[:size].numpy().data, 0
        while done < size:
            got = os.preadv(self._file.fileno(), [target[done:]], start + done)
            if got == 0:
                msg = f"the weights {self.path} became shorter while they were used. Download the model again."
                raise ModelError(msg)
            done += got
        return buffer[:size]

    def expect(self, start: int, stop: int) -> None:
        """Ask the system to read a range of bytes ahead into its page cache, which is not memory of this process."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def drop(self, start: int, stop: int) -> None:
        """Drop the pages of a range of bytes."""
        if hasattr(mmap, "MADV_DONTNEED"):
            # A page fault maps the pages around it too, unasked.
            first = max(start - _FAULT_AROUND, 0) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, min(stop + _FAULT_AROUND, len(self._map)) - first)


class WeightStore:
    """The weights of one model by name, over all its files."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Map files; no weight is read.

        Raises:
            ModelError: a file is damaged, or two hold the same tensor.
        """
        self._files = [MappedFile(path) for path in files]
        self._owner: dict[str, MappedFile] = {}
        for file in self._files:
            for name in file.entries:
                if name in self._owner:
                    msg = f"{file.path} and {self._owner[name].path} both hold {name}. Keep one set of weights in the folder."
                    raise ModelError(msg)
                self._owner[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._owner or name + CODES in self._owner

    @property
    def names(self) -> Collection[str]:
        """Of all weights; a packed one is named as it was before."""
        return {name.removesuffix(CODES) for name in self._owner if not name.endswith((SCALES, ZEROS))}

    @property
    def tensor_names(self) -> Collection[str]:
        """Of all tensors as they are stored."""
        return self._owner.keys()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.end - entry.start for file in self._files for entry in file.entries.values())

    def view(self, name: str) -> Tensor:
        """A stored tensor in mapped memory, which must not be written."""
        return self._owner[name].view(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight before it was packed."""
        if name + CODES in self._owner:
            return self._owner[name + CODES].packed_shape(name)
        return self._owner[name].entries[name].shape

    def load(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a weight in memory; floating-point weights in `dtype` if one is given."""
        if name + CODES in self._owner:
            matrix = self.matrix(name)
            out = torch.empty(matrix.rows, matrix.columns, matrix.taps, dtype=dtype or torch.float32)
            matrix.read(range(matrix.rows), range(matrix.columns), out)
            return out.view(self.shape(name))
        view = self.view(name)
        copy = torch.empty(view.shape, dtype=dtype if dtype and view.is_floating_point() else view.dtype)
        copy.copy_(view)
        self.drop(name)
        return copy

    def drop(self, name: str) -> None:
        """Give the pages of a stored tensor back to the system."""
        self._owner[name].place(name).drop()

    def matrix(self, name: str) -> Matrix:
        """A weight of two or more dimensions, to be read in parts."""
        file = self._owner.get(name + CODES)
        if file is None:
            file = self._owner[name]
            return PlainMatrix(file.place(name), file.entries[name].shape, DTYPES[file.entries[name].dtype])
        places = [file.place(name + end) for end in (CODES, SCALES, ZEROS)]
        groups = file.entries[name + SCALES].shape[1]
        return PackedMatrix(places, file.packed_shape(name), bits=file.packed_bits, groups=groups)


class PlainMatrix:
    """A weight in its own floating-point type."""

    def __init__(self, place: Place, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Take a weight of (rows, columns) or (rows, columns, height, width)."""
        self.rows, self.columns, self.taps = shape[0], shape[1], math.prod(shape[2:])
        self._place, self._dtype = place, dtype

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its bytes lie."""
        return (self._place,)

    def read(self, rows: range, columns: range, out: Tensor) -> None:
        """Copy a part, converting it."""
        for some in _slices(rows, self.columns * self.taps):
            stored = _rows(self._place, some, self._dtype, self.columns * self.taps)
            part = stored.view(len(some), self.columns, self.taps)[:, columns.start : columns.stop]
            out[some.start - rows.start : some.stop - rows.start].copy_(part)


class PackedMatrix:
    """A weight in few bits."""

    def __init__(self, places: Sequence[Place], shape: Sequence[int], *, bits: int, groups: int) -> None:
        """Take where codes, scales and zeros lie, the shape of the weight before it was packed, and the groups of a row."""
        self.rows, self.columns, self.taps = shape[0], shape[1], math.prod(shape[2:])
        self._places, self._bits, self._groups = tuple(places), bits, groups

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its bytes lie."""
        return self._places

    def read(self, rows: range, columns: range, out: Tensor) -> None:
        """Unpack a part; with several groups to a row, `columns` must begin and end where groups do."""
        codes, scales, zeros = self._places
        width = self.columns * self.taps
        group, per_byte = width // self._groups, 8 // self._bits
        first, last = columns.start * self.taps, columns.stop * self.taps
        wanted = slice(first // group, -(-last // group))
        for some in _slices(rows, width):
            unpack(
                Packed(
                    codes=_rows(codes, some, torch.uint8, width // per_byte)[:, first // per_byte : last // per_byte],
                    scales=_rows(scales, some, torch.float32, self._groups, slot=1)[:, wanted],
                    zeros=_rows(zeros, some, torch.uint8, self._groups, slot=2)[:, wanted],
                    bits=self._bits,
                ),
                out[some.start - rows.start : some.stop - rows.start].view(len(some), last - first),
            )


def weight_files(folder: Path, *, name: str) -> list[Path]:
    """The safetensors files of a model's part: the shards that an index names, else all but half-precision variants.

    Args:
        folder: of the part.
        name: of the model, for the message.

    Raises:
        ModelError: there are none, or a shard is missing.
    """
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if ".fp16." not in file.name and ".bf16." not in file.name]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if ".fp16." in index.name or ".bf16." in index.name:
            continue
        shards = _indexed_shards(index)
        missing = sorted(shards - {file.name for file in found})
        if missing:
            msg = (
                f"{name} lacks {len(missing)} of {len(shards)} weight files in {folder}, first {missing[0]}. Download it again."
            )
            raise ModelError(msg)
        return [folder / shard for shard in sorted(shards)]
    if not found:
        msg = f"{name} has no safetensors weights in {folder}. Other formats are not read; convert the model with diffusers."
        raise ModelError(msg)
    return plain or found


def weights_digest(path: Path) -> str:
    """Hash a safetensors file's header and the first KiB of each tensor: retraining changes every tensor from its start."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 2**27))
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    file.seek(8 + length + start)
                    digest.update(file.read(min(end - start, 1024)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the weights {path} are damaged ({str(error)[:100]}). Download the model again."
        raise ModelError(msg) from error
    return digest.hexdigest()


def _indexed_shards(index: Path) -> set[str]:
    try:
        shards = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the index {index} is damaged ({error}). Download the model again."
        raise ModelError(msg) from error
    if any(Path(shard).name != shard for shard in shards):
        msg = f"the index {index} names files outside of its folder. Download the model from its publisher."
        raise ModelError(msg)
    return shards


def _rows(place: Place, rows: range, dtype: torch.dtype, values: int, *, slot: int = 0) -> Tensor:
    """Rows of a stored matrix with so many values a row, until the slot is used again."""
    size = values * dtype.itemsize
    return place.file.read(place.start + rows.start * size, len(rows) * size, slot=slot).view(dtype).view(len(rows), values)


def _slices(rows: range, row_values: int) -> Iterator[range]:
    step = max(1, SLICE_VALUES // max(row_values, 1))
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))
