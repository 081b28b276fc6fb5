"""How a stream is stored: as it is, in half of the bits, or as int8 with a scale for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCALE = ".scale"
"""Ends the name of the scales that belong to int8 values."""
_LEVELS = 127


def pack(name: str, stream: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, by name, that stand for a stream on disk.

    int8 values are the stream divided by its token's largest magnitude / 127, rounded to the nearest; a token of zeros stays
    zeros. The scales are float32.

    Args:
        name: of the stream.
        stream: (1, tokens, width), or an image (1, channels, rows, columns), whose tokens are its pixels.
        dtype: float32, bfloat16 or int8.
    """
    stream = stream.cpu()
    if dtype != torch.int8:
        return {name: stream.to(dtype).contiguous()}
    scale = stream.float().abs().amax(dim=_width_axis(stream.dim()), keepdim=True) / _LEVELS
    levels = torch.where(scale > 0, stream.float() / scale, torch.zeros(())).round()
    return {name: levels.to(torch.int8).contiguous(), name + SCALE: scale.contiguous()}


def unpack(name: str, stored: dict[str, Tensor]) -> Tensor:
    """The stream that `pack` was given, up to rounding; int8 comes back as float32."""
    values = stored[name]
    return values if name + SCALE not in stored else values.float() * stored[name + SCALE]


def stored_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that `pack` makes of a stream of some shape."""
    count = 1
    for side in shape:
        count *= side
    scales = count // shape[_width_axis(len(shape))] * torch.float32.itemsize if dtype == torch.int8 else 0
    return count * dtype.itemsize + scales


def _width_axis(dimensions: int) -> int:
    return 1 if dimensions == 4 else dimensions - 1
