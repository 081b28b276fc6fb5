"""A packed copy of a model's weights: made once, whole or not at all, and found again by what it was made from."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pocketune.atomic import replacing
from pocketune.weights.mapped import BITS_KEY, DTYPES, SHAPES_KEY
from pocketune.weights.quant import SLICE_VALUES, pack, packed_bytes
from pocketune.weights.store import CODES, SCALES, ZEROS, WeightStore

GROUP = 64
"""Values that share a scale in 4 bits; with 8 bits it is a whole row."""
SMALLEST = 2**14
"""Weights with fewer values stay as they are."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def cache_folder() -> Path:
    """Where packed copies are kept: $POCKETUNE_CACHE, else a folder in the user's cache."""
    chosen = os.environ.get("POCKETUNE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pocketune"


def packed_copy(
    store: WeightStore,
    names: Collection[str],
    *,
    bits: int,
    fingerprint: str,
    folder: Path | None = None,
) -> Path:
    """The packed copy of some weights, made if it is not there yet; all other weights are in it as they were.

    Memory holds a slice of one weight at a time, and the scales of that weight.

    Args:
        store: the weights.
        names: of those to pack, matrices and kernels; ones that are small or do not divide into groups stay as they are.
        bits: 4, in groups of `GROUP`, or 8, by row.
        fingerprint: of the model; another one is another copy.
        folder: where it is kept; default: `cache_folder()`.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    chosen = sorted(name for name in names if _fits(store.shape(name)))
    key = hashlib.sha256(json.dumps([fingerprint, bits, GROUP, chosen]).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / "weights" / f"{key}-int{bits}.safetensors"
    if path.exists():
        return path
    group = GROUP if bits == 4 else None
    shapes = {name: store.shape(name) for name in chosen}
    header = _header(store, shapes, bits=bits, group=group)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(store.names):
            if name in shapes:
                for part in _packed_parts(store, name, bits=bits, group=group):
                    file.write(_bytes(part))
            else:
                for part in store.stored(name):
                    file.write(_bytes(part))
    return path


def _fits(shape: tuple[int, ...]) -> bool:
    # Rows by eights keep whatever follows in the file aligned.
    return len(shape) >= 2 and math.prod(shape) >= SMALLEST and shape[1] % GROUP == 0 and shape[0] % 8 == 0


def _header(store: WeightStore, shapes: dict[str, tuple[int, ...]], *, bits: int, group: int | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": {BITS_KEY: str(bits), SHAPES_KEY: json.dumps(shapes)}}
    offset = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], size: int) -> None:
        nonlocal offset
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size

    for name in sorted(store.names):
        shape = store.shape(name)
        if name in shapes:
            rows, columns = shape[0], math.prod(shape[1:])
            groups = columns // (group or columns)
            codes = packed_bytes(rows, columns, bits=bits, group=group) - rows * groups * 5
            add(name + CODES, "U8", (rows, codes // rows), codes)
            add(name + SCALES, "F32", (rows, groups), rows * groups * 4)
            add(name + ZEROS, "U8", (rows, groups), rows * groups)
        else:
            view = store.view(name)
            add(name, _DTYPE_NAMES[view.dtype], shape, view.nbytes)
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _packed_parts(store: WeightStore, name: str, *, bits: int, group: int | None) -> Iterator[Tensor]:
    """A packed weight as `_header` lays it out: its codes, some rows after the other, then all scales, then all zeros."""
    matrix = store.matrix(name)
    step = max(1, SLICE_VALUES // (matrix.columns * matrix.taps))
    scales, zeros = [], []
    for start in range(0, matrix.rows, step):
        rows = range(start, min(start + step, matrix.rows))
        values = torch.empty(len(rows), matrix.columns, matrix.taps)
        matrix.read(rows, range(matrix.columns), values)
        packed = pack(values.view(len(rows), -1), bits=bits, group=group)
        scales.append(packed.scales)
        zeros.append(packed.zeros)
        yield packed.codes
    yield from scales
    yield from zeros


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
