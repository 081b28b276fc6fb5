"""One safetensors file of weights: mapped for a look at whole tensors, read for parts of them."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketune.errors import FileFormatError, ModelError
from pocketune.tensorfile import TensorEntry, open_tensor_file

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
_FAULT_AROUND = 2**16
BITS_KEY, SHAPES_KEY = "pocketune.bits", "pocketune.shapes"
"""Metadata of a file of packed weights: the bits of a value, and the shapes that the weights had, as JSON by name."""


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
