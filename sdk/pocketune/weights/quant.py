"""Weights in few bits: affine integers of 8 bits a value, or of 4 bits with two values to a byte.

    W = scale * (code - zero),  one scale and one zero for each row, or for each group of neighbouring values in a row

The zero is a whole code, so that a weight of 0 comes back as 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketune.errors import PlanError

BITS = (4, 8)
SLICE_VALUES = 2**18
"""Values read and converted at a time; they fit a processor's cache."""


@dataclass(frozen=True)
class Packed:
    """A matrix in few bits.

    Attributes:
        codes: uint8, (rows, columns) with 8 bits; (rows, columns / 2) with 4 bits, even columns in the lower halves.
        scales: float32, (rows, groups).
        zeros: (rows, groups), uint8, or floating point where a quantizer fits them.
        bits: 4 or 8.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int


def pack(matrix: Tensor, *, bits: int, group: int | None = None) -> Packed:
    """Round a matrix to few bits, from the least to the largest value of each group.

    Args:
        matrix: (rows, columns), floating point.
        bits: 4 or 8.
        group: values that share a scale; default: a whole row.

    Raises:
        PlanError: the columns cannot be divided into such groups, or 4-bit values not into bytes.
    """
    rows, columns = matrix.shape
    group = group or columns
    if bits not in BITS or columns % group or (bits == 4 and group % 2):
        msg = f"cannot pack {columns} columns to {bits} bits in groups of {group}: expected 4 or 8 bits and even, whole groups."
        raise PlanError(msg)
    groups = columns // group
    packed = Packed(
        codes=torch.empty(rows, columns * bits // 8, dtype=torch.uint8, device=matrix.device),
        scales=torch.empty(rows, groups, device=matrix.device),
        zeros=torch.empty(rows, groups, dtype=torch.uint8, device=matrix.device),
        bits=bits,
    )
    step = max(1, SLICE_VALUES // columns)
    for start in range(0, rows, step):  # a few rows at a time, so that no float copy of the whole is made
        some = slice(start, start + step)
        _pack_rows(matrix[some].float().reshape(-1, groups, group), packed, some)
    return packed


def _pack_rows(values: Tensor, packed: Packed, rows: slice) -> None:
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    largest = 2**packed.bits - 1
    scales = (high - low) / largest
    safe = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = (-low / safe).round().clamp(0, largest)
    codes = (values / safe[..., None] + zeros[..., None]).round().clamp(0, largest).to(torch.uint8).flatten(1)
    packed.codes[rows] = codes[:, 0::2] | (codes[:, 1::2] << 4) if packed.bits == 4 else codes
    packed.scales[rows], packed.zeros[rows] = scales, zeros.to(torch.uint8)


def unpack(packed: Packed, out: Tensor) -> Tensor:
    """Write the values of a packed matrix into `out`, (rows, columns), and return it."""
    rows, columns = out.shape
    if packed.bits == 4:
        out[:, 0::2].copy_(packed.codes & 15)
        out[:, 1::2].copy_(packed.codes >> 4)
    else:
        out.copy_(packed.codes)
    groups = packed.scales.shape[1]
    grouped = out.view(rows, groups, columns // groups)
    grouped.sub_(packed.zeros[..., None]).mul_(packed.scales[..., None].to(out.dtype))
    return out


def packed_bytes(rows: int, columns: int, *, bits: int, group: int | None = None) -> int:
    """Bytes of a packed matrix: codes, and 5 bytes a group."""
    return rows * (columns * bits // 8 + columns // (group or columns) * 5)
