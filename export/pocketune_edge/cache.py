"""Features of draws on disk: safetensors shards with checksums, written whole, so that an interrupted pass goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pocketune.atomic import replacing, write_text
from pocketune.errors import CacheError
from pocketune_edge.session import Array

SHARD_BYTES = 16_000_000


class FeatureCache:
    """Graph inputs that stand for skipped spans, by draw.

    `FOLDER/index.json` lists the finished shards with their sha256; `shard-NNNN.safetensors` holds "DRAW.INPUT" tensors, each
    (1, tokens, width), as float32, or bfloat16 in the form of 16-bit integers.
    """

    def __init__(self, folder: Path, *, bfloat16: bool) -> None:
        """Open a cache folder, which may not exist yet.

        Raises:
            CacheError: it is damaged.
        """
        self._folder = folder
        self._bfloat16 = bfloat16
        self._pending: dict[str, Array] = {}
        self._open: dict[str, Any] = {}
        self._index: dict[str, Any] = {"shards": {}, "draws": {}}
        if self._index_path.exists():
            try:
                self._index = json.loads(self._index_path.read_text(encoding="utf-8"))
                self._verify()
            except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
                msg = f"the feature cache {folder} is damaged ({error}). Delete that folder; it will be made again."
                raise CacheError(msg) from error

    @property
    def _index_path(self) -> Path:
        return self._folder / "index.json"

    def __contains__(self, draw: int) -> bool:
        return str(draw) in self._index["draws"] or any(name.startswith(f"{draw}.") for name in self._pending)

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(shard["bytes"] for shard in self._index["shards"].values())

    def put(self, draw: int, features: Mapping[str, Array]) -> None:
        """Store one draw's features, each (1, tokens, width); a shard is written as soon as it is full."""
        for name, value in features.items():
            floats = np.ascontiguousarray(value, dtype=np.float32)
            self._pending[f"{draw}.{name}"] = to_bfloat16(floats) if self._bfloat16 else floats
        if sum(value.nbytes for value in self._pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard and list it in the index."""
        if not self._pending:
            return
        name = f"shard-{len(self._index['shards']):04d}.safetensors"
        with replacing(self._folder / name) as partial:
            save_file(self._pending, partial)
            digest, size = _sha256(partial), partial.stat().st_size
        self._index["shards"][name] = {"sha256": digest, "bytes": size}
        for key in self._pending:
            draw, feature = key.split(".", 1)
            self._index["draws"].setdefault(draw, {"shard": name, "features": []})["features"].append(feature)
        self._pending.clear()
        write_text(self._index_path, json.dumps(self._index))

    def get(self, draw: int) -> dict[str, Array]:
        """The features of a draw, float32.

        Raises:
            CacheError: it is not in the cache.
        """
        entry = self._index["draws"].get(str(draw))
        if entry is None:
            msg = f"the feature cache {self._folder} has no draw {draw}: it is incomplete. Delete it and start again."
            raise CacheError(msg)
        shard = entry["shard"]
        if shard not in self._open:
            self._open[shard] = safe_open(self._folder / shard, framework="np")
        values = {name: self._open[shard].get_tensor(f"{draw}.{name}") for name in entry["features"]}
        return {name: from_bfloat16(value) if self._bfloat16 else value for name, value in values.items()}

    def _verify(self) -> None:
        for name, shard in self._index["shards"].items():
            path = self._folder / name
            if Path(name).name != name or not path.is_file() or _sha256(path) != shard["sha256"]:
                msg = f"{name} is missing or does not match its checksum"
                raise ValueError(msg)
        if not {entry["shard"] for entry in self._index["draws"].values()} <= set(self._index["shards"]):
            msg = "the index names a shard that it does not list"
            raise ValueError(msg)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, as the upper halves of float32 numbers."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint32] = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 numbers that bfloat16 numbers stand for."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
