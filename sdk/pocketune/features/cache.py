"""Features on disk: safetensors shards, memory-mapped, checksummed, and keyed by all that they depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pocketune.features.shards import Shards
from pocketune.features.storage import pack, unpack
from pocketune.models.base import Streams
from pocketune.plan.blocks import Span


class FeatureCache:
    """Streams of the skipped spans, by draw.

    Shards hold "DRAW.SPAN.STREAM" tensors, each (1, tokens, width), and for int8 their scales. What storing changed is
    summed up for `relative_error`.
    """

    def __init__(self, folder: Path, *, spans: Sequence[Span], dtype: torch.dtype) -> None:
        """Open a cache folder, which may not exist yet.

        Raises:
            CacheError: it is damaged.
        """
        self._shards: Shards[Tensor] = Shards(folder, framework="pt", save=save_file)
        self._spans = tuple(spans)
        self._dtype = dtype

    def __contains__(self, draw: int) -> bool:
        return draw in self._shards

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished shards."""
        return self._shards.size_bytes

    @property
    def relative_error(self) -> float:
        """What storing changed: the root of the mean squared error over that of the mean square, of all finished shards."""
        squared = self._shards.total("squared")
        return math.sqrt(self._shards.total("squared_error") / squared) if squared else 0.0

    def put(self, draw: int, features: dict[Span, Streams]) -> None:
        """Store one draw's features, each tensor (1, tokens, width); a shard is written as soon as it is full."""
        stored: dict[str, Tensor] = {}
        squared_error = squared = 0.0
        for number, span in enumerate(self._spans):
            for stream, tensor in enumerate(features[span]):
                name = f"{number}.{stream}"
                packed = pack(name, tensor, self._dtype)
                stored |= packed
                if self._dtype != torch.float32:
                    whole = tensor.double().cpu()
                    squared_error += float((unpack(name, packed).double() - whole).square().sum())
                    squared += float(whole.square().sum())
        self._shards.put(draw, stored, sums={"squared_error": squared_error, "squared": squared})

    def flush(self) -> None:
        """Write what is pending as one shard."""
        self._shards.flush()

    def get(self, draws: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> dict[Span, Streams]:
        """The features of some draws, batched in that order.

        Raises:
            CacheError: a draw is not in the cache.
        """
        stored = [self._shards.get(draw) for draw in draws]
        return {span: _batched(stored, number, device, dtype) for number, span in enumerate(self._spans)}


def _batched(stored: Sequence[dict[str, Tensor]], number: int, device: torch.device, dtype: torch.dtype) -> Streams:
    """The streams of a span, from all that is stored of each draw."""
    names = [f"{number}.{stream}" for stream in range(4)]
    rows = [[unpack(name, tensors) for name in names if name in tensors] for tensors in stored]
    return tuple(torch.cat(parts).to(device=device, dtype=dtype) for parts in zip(*rows, strict=True))
