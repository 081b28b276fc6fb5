"""The frozen weights of a bundle: each is written once, at the first graph that uses it, and found again by every other."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketune.errors import ModelError
from pocketune.weights.quantizers import Quantization
from pocketune_export.passes import Derived
from pocketune_export.quantize import Storage, group_length, packed_parts, quantize, storage_of

INLINE_BYTES = 1024
"""Smaller tensors stay inside the graphs; ONNX Runtime does not load tiny external data."""
ALIGNMENT = 64
"""Bytes; where a tensor starts in its file."""
FP16_MAX = float(np.finfo(np.float16).max)

Loader = Callable[[str], Tensor]
PackedStorage = Literal["packed8", "packed4"]


@dataclass(frozen=True)
class Stored:
    """How one weight lies in the bundle: tensors by role ("weight", "scale", "zero"), and the shape they stand for."""

    storage: Storage | PackedStorage
    shape: tuple[int, ...]
    tensors: Mapping[str, ir.TensorProtocol]
    bytes: int
    file: str | None


@dataclass(frozen=True)
class Packing:
    """The weights of a component that the recipe packs, by plain name."""

    quantization: Quantization
    names: frozenset[str]


class WeightStore:
    """Appends weights to the files of a bundle folder."""

    def __init__(self, folder: Path, *, wanted: Storage, block: int | None) -> None:
        """Write below `folder`; `wanted` and `block` say how matrices are stored."""
        self._folder = folder
        self.wanted: Storage = wanted
        self.block = block
        self.blocked = False
        """Whether a matrix has a scale for each block; rows that blocks do not divide have one scale."""
        self._files: dict[str, _WeightFile] = {}
        self._stored: dict[str, Stored] = {}

    def put(self, key: str, file: str, load: Callable[[], NDArray[np.float32]], *, matmul: bool) -> Stored:
        """The stored weight of a key; it is loaded and appended to `file` if no graph used it before.

        Raises:
            ModelError: it does not fit fp16.
        """
        if key not in self._stored:
            array = load()
            storage = storage_of(array.shape, wanted=self.wanted, matmul=matmul, block=self.block)
            self._stored[key] = self._write(key, file, array, storage)
        return self._stored[key]

    def put_packed(self, key: str, file: str, load: Callable[[], Tensor], quantization: Quantization) -> Stored:
        """The stored weight of a key that the recipe packs; like `put`."""
        if key not in self._stored:
            weight = load()
            parts = packed_parts(quantization.pack(weight))
            storage: PackedStorage = "packed4" if quantization.bits == 4 else "packed8"
            self._stored[key] = self._store_parts(key, file, parts, storage, tuple(weight.shape))
        return self._stored[key]

    def close(self) -> dict[str, tuple[int, str]]:
        """Finish all files; size and sha256 of each."""
        return {name: file.close() for name, file in sorted(self._files.items())}

    def _write(self, key: str, file: str, array: NDArray[np.float32], storage: Storage) -> Stored:
        parts: dict[str, NDArray[np.generic]] = {}
        if storage in ("int8", "int4") and array.dtype == np.float32:
            quantized = quantize(array, storage=storage, block=self.block)
            self.blocked |= group_length(array.shape, self.block) == self.block
            parts = {"weight": quantized.values, "scale": quantized.scales}
        elif storage == "fp16" and array.dtype == np.float32 and array.nbytes >= INLINE_BYTES:
            if np.abs(array).max() > FP16_MAX:
                msg = f"the weight {key} has values beyond the range of fp16. Export with --weights fp32."
                raise ModelError(msg)
            parts = {"weight": array.astype(np.float16)}
        else:
            storage, parts = "fp32", {"weight": array}
        return self._store_parts(key, file, parts, storage, array.shape)

    def _store_parts(
        self,
        key: str,
        file: str,
        parts: Mapping[str, NDArray[np.generic]],
        storage: Storage | PackedStorage,
        shape: tuple[int, ...],
    ) -> Stored:
        tensors = {role: self._tensor(key, role, storage, file, part) for role, part in parts.items()}
        outside = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors.values())
        size = sum(part.nbytes for part in parts.values())
        return Stored(storage, shape, tensors, size, file if outside else None)

    def _tensor(self, key: str, role: str, storage: str, file: str, array: NDArray[np.generic]) -> ir.TensorProtocol:
        name = key if role == "weight" and storage in ("fp32", "fp16") else f"{key}.{storage}.{role}"
        if array.nbytes < INLINE_BYTES:
            return ir.tensor(np.ascontiguousarray(array), name=name)
        if file not in self._files:
            self._files[file] = _WeightFile(self._folder / file)
        offset = self._files[file].append(array)
        dtype = ir.DataType.from_numpy(array.dtype)
        shape = ir.Shape(array.shape)
        return ir.ExternalTensor(file, offset, array.nbytes, dtype, shape=shape, name=name, base_dir=self._folder)


class WeightPart:
    """The weights of one component of the model: how they are loaded and named."""

    def __init__(self, store: WeightStore, prefix: str, load: Loader, packing: Packing | None = None) -> None:
        """Use a store.

        Args:
            store: shared by all parts.
            prefix: put before every name, as "transformer.".
            load: the tensor of a name.
            packing: which weights are packed, and how.

        Names are those in the model, with a LoRA's ".base_layer".
        """
        self._store = store
        self._prefix = prefix
        self._load = load
        self._packing = packing
        self._derived: dict[str, Derived] = {}

    def add_derived(self, derived: Mapping[str, Derived]) -> None:
        """Make weights known that are cut out of others."""
        self._derived |= derived

    def stored(self, name: str, *, file: str, matmul: bool) -> Stored:
        """The stored weight of a name; it goes to `file`, a bundle path, if no graph used it before."""
        packing = self._packing
        if packing is not None and plain_name(name) in packing.names:
            return self._store.put_packed(self._prefix + plain_name(name), file, lambda: self._load(name), packing.quantization)
        return self._store.put(self._prefix + plain_name(name), file, lambda: self._array(name), matmul=matmul)

    def _array(self, name: str) -> NDArray[np.float32]:
        derived = self._derived.get(name)
        tensor = derived.make(self._load(derived.base)) if derived else self._load(name)
        tensor = tensor.detach().cpu()
        array: NDArray[np.float32] = (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).contiguous().numpy()
        return array


def plain_name(name: str) -> str:
    """A weight's name as it is without a LoRA around its layer."""
    return name.replace(".base_layer.", ".")


class _WeightFile:
    """A file that grows by aligned tensors and is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: io.BufferedWriter = path.open("wb")
        self._hash = hashlib.sha256()
        self._length = 0

    def append(self, array: NDArray[np.generic]) -> int:
        """Write an array; its offset."""
        self._put(b"\0" * (-self._length % ALIGNMENT))
        offset = self._length
        self._put(np.ascontiguousarray(array).data.cast("B"))
        return offset

    def close(self) -> tuple[int, str]:
        """Finish; the size and sha256."""
        self._file.close()
        return self._length, self._hash.hexdigest()

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._length += len(content)
