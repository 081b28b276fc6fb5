"""Tensors of draws on disk: safetensors shards with checksums, written whole, so that an interrupted pass goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from safetensors import SafetensorError, safe_open

from pocketune.atomic import replacing, write_text
from pocketune.errors import CacheError
from pocketune.weights.files import file_sha256

SHARD_BYTES = 16_000_000
INDEX_FILE = "index.json"


def remove_other_caches(root: Path, *, keep: str) -> None:
    """Remove all caches in a folder but the named one; indices go first, so that a stop in between leaves none damaged."""
    for folder in sorted(root.glob("*/")):
        if folder.name != keep:
            (folder / INDEX_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


class Sized(Protocol):
    """A tensor of any library."""

    @property
    def nbytes(self) -> int:
        """Of its values."""


Tensor = TypeVar("Tensor", bound=Sized)


class Shards(Generic[Tensor]):
    """Named tensors of each draw.

    `FOLDER/index.json` lists the finished shards with their sha256 and the shard of each draw;
    `shard-NNNN.safetensors` holds "DRAW.NAME" tensors. A draw lies in one shard. The index also adds up figures of the draws.
    """

    def __init__(
        self, folder: Path, *, framework: Literal["np", "pt"], save: Callable[[dict[str, Tensor], Path], None]
    ) -> None:
        """Open a folder, which may not exist yet.

        Args:
            folder: of this cache alone.
            framework: in whose tensors shards are read.
            save: writes such tensors as a safetensors file.

        Raises:
            CacheError: it is damaged.
        """
        self._folder = folder
        self._framework = framework
        self._save = save
        self._pending: dict[str, Tensor] = {}
        self._pending_sums: dict[str, float] = {}
        self._index: dict[str, dict[str, Any]] = {"shards": {}, "draws": {}, "sums": {}}
        if self._index_path.exists():
            try:
                self._index = json.loads(self._index_path.read_text(encoding="utf-8"))
                self._verify()
            except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
                msg = f"the feature cache {folder} is damaged ({error}). Delete that folder; it will be made again."
                raise CacheError(msg) from error

    @property
    def _index_path(self) -> Path:
        return self._folder / INDEX_FILE

    def __contains__(self, draw: int) -> bool:
        return str(draw) in self._index["draws"] or any(name.startswith(f"{draw}.") for name in self._pending)

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(shard["bytes"] for shard in self._index["shards"].values())

    def total(self, name: str) -> float:
        """The sum of a figure over all draws of finished shards; 0 if none gave it."""
        return float(self._index["sums"].get(name, 0.0))

    def put(self, draw: int, tensors: Mapping[str, Tensor], *, sums: Mapping[str, float] | None = None) -> None:
        """Store one draw's tensors by name; a shard is written as soon as it is full. sums: figures to add up."""
        self._pending |= {f"{draw}.{name}": tensor for name, tensor in tensors.items()}
        for name, figure in (sums or {}).items():
            self._pending_sums[name] = self._pending_sums.get(name, 0.0) + figure
        if sum(tensor.nbytes for tensor in self._pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard and list it in the index."""
        if not self._pending:
            return
        name = f"shard-{len(self._index['shards']):04d}.safetensors"
        with replacing(self._folder / name) as partial:
            self._save(self._pending, partial)
            digest, size = file_sha256(partial), partial.stat().st_size
        self._index["shards"][name] = {"sha256": digest, "bytes": size}
        self._index["draws"] |= {key.split(".")[0]: name for key in self._pending}
        self._index["sums"] |= {figure: self.total(figure) + added for figure, added in self._pending_sums.items()}
        self._pending.clear()
        self._pending_sums.clear()
        write_text(self._index_path, json.dumps(self._index))

    def get(self, draw: int) -> dict[str, Tensor]:
        """The tensors of a draw, by name.

        Its shard is opened for this alone: mapped for good, the whole cache would come to lie in memory.

        Raises:
            CacheError: it is in no finished shard.
        """
        name = self._index["draws"].get(str(draw))
        if name is None:
            msg = f"the feature cache {self._folder} has no draw {draw}: it is incomplete. Delete it and start again."
            raise CacheError(msg)
        prefix = f"{draw}."
        with safe_open(self._folder / name, framework=self._framework) as shard:
            return {key.removeprefix(prefix): shard.get_tensor(key) for key in shard.keys() if key.startswith(prefix)}  # noqa: SIM118

    def _verify(self) -> None:
        if set(self._index) != {"shards", "draws", "sums"}:
            msg = "its index has other parts than shards, draws and sums"
            raise ValueError(msg)
        stored: set[tuple[str, str]] = set()
        for name, shard in self._index["shards"].items():
            path = self._folder / name
            sound = Path(name).name == name and path.is_file() and path.stat().st_size == shard["bytes"]
            if not sound or file_sha256(path) != shard["sha256"]:
                msg = f"{name} is missing or does not match its checksum"
                raise ValueError(msg)
            with safe_open(path, framework=self._framework) as file:
                stored |= {(key.split(".")[0], name) for key in file.keys()}  # noqa: SIM118
        if set(self._index["draws"].items()) != stored:
            msg = "its index names other draws than the shards hold"
            raise ValueError(msg)
        if not all(isinstance(total, float) for total in self._index["sums"].values()):
            msg = "its index has sums that are no numbers"
            raise ValueError(msg)
