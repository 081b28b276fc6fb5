"""Features on disk: safetensors shards, memory-mapped, checksummed, and keyed by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketune.atomic import replacing, write_text
from pocketune.errors import CacheError
from pocketune.features.storage import SCALE, pack, unpack
from pocketune.models.base import Streams
from pocketune.plan.blocks import Span

SHARD_BYTES = 16_000_000


def cache_key(parts: dict[str, Any]) -> str:
    """A name for a cache: the hash of everything that its content follows from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def remove_other_caches(root: Path, *, keep: str) -> None:
    """Remove all caches in a folder but the named one; indices go first, so that a stop in between leaves none damaged."""
    for folder in sorted(root.glob("*/")):
        if folder.name != keep:
            (folder / "index.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


class FeatureCache:
    """Streams of the skipped spans, by draw.

    `FOLDER/index.json` lists the finished shards with their sha256; `shard-NNNN.safetensors` holds "DRAW.SPAN.STREAM" tensors,
    each (1, tokens, width), and for int8 their scales. A shard is written whole, so an interrupted pass goes on where it
    stopped. The index also sums up what storing changed, for `relative_error`.
    """

    def __init__(self, folder: Path, *, spans: Sequence[Span], dtype: torch.dtype) -> None:
        """Open a cache folder, which may not exist yet.

        Raises:
            CacheError: the index is not readable.
        """
        self._folder = folder
        self._spans = tuple(spans)
        self._dtype = dtype
        self._pending: dict[str, Tensor] = {}
        self._pending_error = (0.0, 0.0)
        self._open: dict[str, Any] = {}
        self._index: dict[str, Any] = {"shards": {}, "draws": {}, "squared_error": 0.0, "squared": 0.0}
        if self._index_path.exists():
            try:
                self._index |= json.loads(self._index_path.read_text(encoding="utf-8"))
                self._verify()
            except (ValueError, KeyError, OSError) as error:
                msg = f"the feature cache {folder} is damaged ({error}). Delete that folder; it will be made again."
                raise CacheError(msg) from error

    @property
    def _index_path(self) -> Path:
        return self._folder / "index.json"

    def __contains__(self, draw: int) -> bool:
        return str(draw) in self._index["draws"] or any(key.startswith(f"{draw}.") for key in self._pending)

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(shard["bytes"] for shard in self._index["shards"].values())

    @property
    def relative_error(self) -> float:
        """What storing changed: the root of the mean squared error over that of the mean square, of all finished shards."""
        squared: float = self._index["squared"]
        return math.sqrt(self._index["squared_error"] / squared) if squared else 0.0

    def put(self, draw: int, features: dict[Span, Streams]) -> None:
        """Store one draw's features, each tensor (1, tokens, width); a shard is written as soon as it is full."""
        for number, span in enumerate(self._spans):
            for stream, tensor in enumerate(features[span]):
                name = f"{draw}.{number}.{stream}"
                packed = pack(name, tensor, self._dtype)
                self._pending |= packed
                if self._dtype != torch.float32:
                    whole = tensor.double().cpu()
                    error = float((unpack(name, packed).double() - whole).square().sum())
                    self._pending_error = (self._pending_error[0] + error, self._pending_error[1] + float(whole.square().sum()))
        if sum(tensor.nbytes for tensor in self._pending.values()) >= SHARD_BYTES:
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
        self._index["draws"] |= {key.split(".")[0]: name for key in self._pending}
        self._index["squared_error"] += self._pending_error[0]
        self._index["squared"] += self._pending_error[1]
        self._pending.clear()
        self._pending_error = (0.0, 0.0)
        write_text(self._index_path, json.dumps(self._index))

    def get(self, draws: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> dict[Span, Streams]:
        """The features of some draws, batched in that order.

        Raises:
            CacheError: a draw is not in the cache.
        """
        return {span: self._streams(draws, number, device, dtype) for number, span in enumerate(self._spans)}

    def _streams(self, draws: Sequence[int], number: int, device: torch.device, dtype: torch.dtype) -> Streams:
        rows = [self._row(draw, number) for draw in draws]
        return tuple(torch.cat(parts).to(device=device, dtype=dtype) for parts in zip(*rows, strict=True))

    def _row(self, draw: int, number: int) -> list[Tensor]:
        name = self._index["draws"].get(str(draw))
        if name is None:
            msg = f"the feature cache {self._folder} has no draw {draw}: it is incomplete. Delete it and start again."
            raise CacheError(msg)
        if name not in self._open:
            self._open[name] = safe_open(self._folder / name, framework="pt")
        shard = self._open[name]
        names = [f"{draw}.{number}.{stream}" for stream in range(4)]
        stored = {key: shard.get_tensor(key) for name in names for key in (name, name + SCALE) if key in shard.keys()}  # noqa: SIM118
        return [unpack(name, stored) for name in names if name in stored]

    def _verify(self) -> None:
        for name, shard in self._index["shards"].items():
            path = self._folder / name
            if Path(name).name != name or not path.exists() or _sha256(path) != shard["sha256"]:
                msg = f"{name} is missing or does not match its checksum"
                raise ValueError(msg)
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(str(error)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
