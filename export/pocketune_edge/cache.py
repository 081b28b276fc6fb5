"""Features of draws on disk, as shards that both runtimes check alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pocketune.features.shards import Shards
from pocketune_edge.session import Array


class FeatureCache:
    """Graph inputs that stand for skipped spans, by draw, as float32, or bfloat16 in the form of 16-bit integers."""

    def __init__(self, folder: Path, *, bfloat16: bool) -> None:
        """Open a cache folder, which may not exist yet.

        Raises:
            CacheError: it is damaged.
        """
        self._shards: Shards[Array] = Shards(folder, framework="np", save=save_file)
        self._bfloat16 = bfloat16

    def __contains__(self, draw: int) -> bool:
        return draw in self._shards

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished shards."""
        return self._shards.size_bytes

    def put(self, draw: int, features: Mapping[str, Array]) -> None:
        """Store one draw's features, each (1, tokens, width); a shard is written as soon as it is full."""
        floats = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in features.items()}
        self._shards.put(draw, {name: to_bfloat16(value) for name, value in floats.items()} if self._bfloat16 else floats)

    def flush(self) -> None:
        """Write what is pending as one shard."""
        self._shards.flush()

    def get(self, draw: int) -> dict[str, Array]:
        """The features of a draw, float32.

        Raises:
            CacheError: it is not in the cache.
        """
        values = self._shards.get(draw)
        return {name: from_bfloat16(value) for name, value in values.items()} if self._bfloat16 else values


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, as the upper halves of float32 numbers."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint32] = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 numbers that bfloat16 numbers stand for."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
