"""Stable Diffusion 3's table of positions: for 384 x 384 tokens, of which an image uses a square in the middle.

In float32 the table of a 1536-wide model takes 906 MB, and computing it takes twice that; a 512-pixel image uses 6 MB of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocketune.weights.fill import Windows

_KEY = "pos_embed_max_size"
_TABLE = "pos_embed.pos_embed"


def without_table(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a table of one token, so that building the model computes none."""
    return dict(config) | ({_KEY: 1} if config.get(_KEY) else {})


def promise_table(model: Any, config: Mapping[str, Any]) -> None:
    """Give a model that was built `without_table` its configuration and a table on the meta device."""
    side = config.get(_KEY)
    if side:
        model.register_to_config(**{_KEY: side})
        _resize(model, int(side))


def crop_table(model: Any, side: int) -> Windows:
    """Shrink the table on the meta device to the middle `side` x `side` tokens, and say how to cut it from the stored one.

    The model then works with the numbers that it had at that size, and at those smaller ones that `table_side` allows.
    """
    whole = model.config.get(_KEY)
    if not whole or side >= whole:
        return {}
    _resize(model, side)
    first = (whole - side) // 2

    def cut(table: Tensor) -> Tensor:
        square = table.view(whole, whole, -1)[first : first + side, first : first + side]
        return square.reshape(1, side * side, -1).clone()

    return {_TABLE: cut}


def table_side(side: int, low_side: int | None, *, patch: int) -> int | None:
    """The side to which the table can be cropped for all images of a training; None: it stays whole.

    The middle of the middle is that of the whole table, where each is rounded down, if the sides differ by an even number of
    tokens.

    Args:
        side: of the larger latents.
        low_side: of the smaller ones; None: there are none.
        patch: latent pixels along a token's side.
    """
    return side if low_side is None or (side - low_side) // patch % 2 == 0 else None


def _resize(model: Any, side: int) -> None:
    patches = model.pos_embed
    patches.pos_embed_max_size = side
    patches.pos_embed = torch.empty(1, side * side, patches.pos_embed.shape[-1], device="meta")
