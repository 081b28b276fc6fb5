"""A frozen weight on disk, read in parts: as its model stores it, or packed to few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pocketune.weights.mapped import Place
from pocketune.weights.quant import SLICE_VALUES, Packed, unpack


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


def _rows(place: Place, rows: range, dtype: torch.dtype, values: int, *, slot: int = 0) -> Tensor:
    """Rows of a stored matrix with so many values a row, until the slot is used again."""
    size = values * dtype.itemsize
    return place.file.read(place.start + rows.start * size, len(rows) * size, slot=slot).view(dtype).view(len(rows), values)


def _slices(rows: range, row_values: int) -> Iterator[range]:
    step = max(1, SLICE_VALUES // max(row_values, 1))
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))
