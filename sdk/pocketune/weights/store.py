"""Weights in memory-mapped safetensors files: nothing is read before it is used, and what was used can be dropped."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pocketune.errors import ModelError
from pocketune.weights.mapped import DTYPES, MappedFile
from pocketune.weights.matrix import Matrix, PackedMatrix, PlainMatrix

CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"
"""Endings of the tensors that hold a packed weight."""
_PART_BYTES = 2**22


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

    def stored(self, name: str) -> Iterator[Tensor]:
        """The bytes of a stored tensor in parts, uint8; each is good until the next. No page of the file is mapped."""
        place = self._owner[name].place(name)
        for start in range(place.start, place.stop, _PART_BYTES):
            yield place.file.read(start, min(_PART_BYTES, place.stop - start))

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
