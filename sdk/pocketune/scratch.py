"""A scratch file for activations: written in forward, read back in backward, gone with the process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pocketune.errors import RunError

SMALLEST = 2**17
"""Bytes of the smallest tensor that is worth a write."""


class Scratch:
    """Tensors in an unlinked file; the place of one that is no longer wanted is used again.

    A storage that several tensors share, or that is stored several times, is written once.
    """

    def __init__(self, folder: Path) -> None:
        """Open a scratch file in a folder.

        Raises:
            RunError: nothing can be written there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as this object
        except OSError as error:
            msg = f"cannot make a scratch file in {folder}: {error.strerror}. Choose another --out."
            raise RunError(msg) from error
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._written: dict[int, tuple[StorageWeakRef, int, _Extent]] = {}
        self.written_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self._end

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is large enough to be worth a write, and dense."""
        return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() >= SMALLEST

    def put(self, tensor: Tensor) -> Stored:
        """Write a tensor's storage, unless it is there already."""
        storage = tensor.untyped_storage()
        known = self._written.get(storage._cdata)
        # A weak reference keeps the address from being used again, so equal addresses are the same storage.
        if known is not None and not known[0].expired() and known[1] == tensor._version:
            return Stored(known[2], tensor)
        self._written = {key: entry for key, entry in self._written.items() if not entry[0].expired()}
        extent = _Extent(self, storage.nbytes())
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self._write(flat, extent.offset)
        self._written[storage._cdata] = (StorageWeakRef(storage), tensor._version, extent)
        return Stored(extent, tensor)

    def read(self, offset: int, size: int) -> Tensor:
        """Bytes of the file as uint8."""
        flat = torch.empty(size, dtype=torch.uint8)
        target, done = flat.numpy().data, 0
        while done < size:
            got = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            if got == 0:
                msg = "the scratch file became shorter while it was used. Start again with --resume."
                raise RunError(msg)
            done += got
        return flat

    def reserve(self, size: int) -> int:
        """A free place of so many bytes."""
        places = self._free.get(size)
        if places:
            return places.pop()
        self._end += size
        return self._end - size

    def release(self, offset: int, size: int) -> None:
        """Let a place be used again."""
        self._free.setdefault(size, []).append(offset)

    def _write(self, flat: Tensor, offset: int) -> None:
        source, done = flat.cpu().numpy().data, 0
        try:
            while done < len(source):
                done += os.pwrite(self._file.fileno(), source[done:], offset + done)
        except OSError as error:
            msg = f"cannot write activations to disk: {error.strerror}. Free some space, or keep activations in memory."
            raise RunError(msg) from error
        self.written_bytes += done


class Stored:
    """A tensor in a scratch file."""

    def __init__(self, extent: _Extent, like: Tensor) -> None:
        """Remember how the tensor lies in its storage."""
        self._extent = extent
        self._dtype, self._device = like.dtype, like.device
        self._size, self._stride = like.size(), like.stride()
        steps = zip(self._size, self._stride, strict=True)
        last = sum((int(side) - 1) * int(step) for side, step in steps) if like.numel() else -1
        self._start = int(like.storage_offset()) * like.element_size()
        self._bytes = (last + 1) * like.element_size()

    def take(self) -> Tensor:
        """Read it back: of a storage that is shared, the part where the tensor lies."""
        flat = self._extent.read(self._start, self._bytes).to(self._device).view(self._dtype)
        return flat.as_strided(self._size, self._stride)


class _Extent:
    """A place in the file, free again when nothing refers to it."""

    def __init__(self, scratch: Scratch, size: int) -> None:
        self.offset = scratch.reserve(size)
        self._scratch = scratch
        finalize(self, scratch.release, self.offset, size)

    def read(self, start: int, size: int) -> Tensor:
        return self._scratch.read(self.offset + start, size)
