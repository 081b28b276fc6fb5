"""A .safetensors file of unknown origin: its header, checked, and its tensors one at a time, with numpy only."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pocketune.errors import FileFormatError

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
    "BF16": "<u2",  # the upper half of a float32
}


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor: type by safetensors' name ("F16", "BF16"), and where in the file its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorStatistics:
    """Of the values of one tensor.

    Attributes:
        zero: all values are zero.
        finite: no value is infinite or not a number; true for types that numpy cannot read.
        largest: largest magnitude among finite values; None for types that numpy cannot read.
    """

    zero: bool
    finite: bool
    largest: float | None


@dataclass(frozen=True)
class TensorFile:
    """A checked header: entries by name in order of position, and the free text stored beside them."""

    path: Path
    size_bytes: int
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(entry.count for entry in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Types that occur, the one with the most values first."""
        counts: dict[str, int] = {}
        for entry in self.tensors.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.count
        return tuple(sorted(counts, key=lambda dtype: (-counts[dtype], dtype)))

    def statistics(self, name: str) -> TensorStatistics:
        """Read one tensor, and nothing else, and say whether it is zero and finite.

        Raises:
            FileFormatError: the file changed since it was opened.
        """
        entry = self.tensors[name]
        raw = self._raw(entry)
        values = _decoded(raw, entry.dtype)
        if values is None:
            return TensorStatistics(zero=not raw.any(), finite=True, largest=None)
        finite = np.isfinite(values)
        sound = values[finite]
        largest = max(float(sound.max()), -float(sound.min())) if sound.size else 0.0
        return TensorStatistics(zero=bool(finite.all()) and largest == 0, finite=bool(finite.all()), largest=largest)

    def scalar(self, name: str) -> float | None:
        """Read a tensor of a single value; None if it has more or a type that numpy cannot read.

        Raises:
            FileFormatError: the file changed since it was opened.
        """
        entry = self.tensors[name]
        values = _decoded(self._raw(entry), entry.dtype) if entry.count == 1 else None
        return None if values is None else float(values[0])

    def _raw(self, entry: TensorEntry) -> NDArray[np.uint8]:
        try:
            with self.path.open("rb") as file:
                file.seek(entry.start)
                content = file.read(entry.end - entry.start)
        except OSError as error:
            raise FileFormatError(_unreadable(self.path, error)) from error
        if len(content) != entry.end - entry.start:
            msg = f"{self.path} became shorter while it was read. Copy it again."
            raise FileFormatError(msg)
        return np.frombuffer(content, np.uint8)


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of a .safetensors file; no tensor is read.

    Raises:
        FileFormatError: the file is missing or unreadable, or its header is damaged or hostile: a length beyond the file or
            100 MB, no JSON, unknown types, offsets that overlap, leave holes, or do not match the shapes.
    """
    try:
        # The library does all checks; the offsets that it does not hand out are read from the header that it has accepted.
        with safe_open(path, framework="np") as checked:
            metadata = dict(checked.metadata() or {})
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        entries: dict[str, TensorEntry] = {}
        for name, value in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + int(offset) for offset in value["data_offsets"])
            shape = tuple(int(side) for side in value["shape"])
            entries[name] = TensorEntry(dtype=str(value["dtype"]), shape=shape, start=start, end=end)
    except OSError as error:
        raise FileFormatError(_unreadable(path, error)) from error
    except (SafetensorError, ValueError, TypeError) as error:  # TypeError: an entry that is a list, which the library takes
        reason = str(error).removeprefix("Error while deserializing header: ")[:200]
        msg = f"{path} is not a sound .safetensors file: {reason}. Copy or export it again."
        raise FileFormatError(msg) from error
    entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
    return TensorFile(path=path, size_bytes=size, tensors=entries, metadata=metadata)


def _decoded(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.generic] | None:
    if dtype not in _NUMPY:
        return None
    values = raw.view(_NUMPY[dtype])
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def _unreadable(path: Path, error: OSError) -> str:
    return f"cannot read {path}: {error.strerror or error}. Check the path and its permissions."
