"""Positions of image tokens: those of an image's place on the canvas, and how little of a table of positions that takes.

Stable Diffusion 3's table is for 384 x 384 tokens, of which an image uses a square in the middle. In float32 that of a
1536-wide model takes 906 MB, and computing it takes twice that; a 512-pixel image uses 6 MB of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
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


def token_places(place: Tensor, side: int, *, patch: int) -> tuple[Tensor, Tensor]:
    """Rows and columns on the canvas of the centres of an image's tokens, counted in tokens of the canvas, each (batch, side).

    Args:
        place: (batch, 4), as `Prompt.place`.
        side: of the image in tokens.
        patch: latent pixels along a token's side.
    """
    top, left, covered, _ = (place / patch).unsqueeze(1).unbind(-1)
    centres = torch.arange(side, device=place.device) + 0.5
    step = covered / side
    return top + centres * step - 0.5, left + centres * step - 0.5


def embed_patches(patches: Any, latents: Tensor, place: Tensor | None) -> Tensor:
    """Tokens of latents with their positions, (batch, tokens, width).

    Args:
        patches: diffusers' `PatchEmbed`, with a table as Stable Diffusion 3's or with sines and cosines as PixArt's.
        latents: (batch, channels, height, width); square where they have a place.
        place: (batch, 4), as `Prompt.place`; None: positions are those of an image of its own, as diffusers gives them.
    """
    if place is None:
        tokens: Tensor = patches(latents)
        return tokens
    tokens = patches.proj(latents).flatten(2).transpose(1, 2)
    rows, columns = token_places(place, latents.shape[-1] // patches.patch_size, patch=patches.patch_size)
    canvas = place[:, 3:] / patches.patch_size
    where = _from_table if patches.pos_embed_max_size else _from_waves
    return tokens + where(patches, rows, columns, canvas).flatten(1, 2).to(tokens.dtype)


def _from_table(patches: Any, rows: Tensor, columns: Tensor, canvas: Tensor) -> Tensor:
    """(batch, rows, columns, width): interpolated linearly in the table; on an entry, that entry bit for bit."""
    side = patches.pos_embed_max_size
    table = patches.pos_embed.view(side, side, -1).float()
    middle = torch.floor((side - canvas) / 2)
    entries = torch.arange(side, device=rows.device)
    by_row, by_column = ((1 - (along + middle).unsqueeze(-1).sub(entries).abs()).clamp(min=0) for along in (rows, columns))
    return torch.einsum("bjc,bicd->bijd", by_column, torch.einsum("bir,rcd->bicd", by_row, table))


def _from_waves(patches: Any, rows: Tensor, columns: Tensor, canvas: Tensor) -> Tensor:
    """(batch, rows, columns, width): the sines and cosines that diffusers computes for a canvas of that size, at each place."""
    half = patches.proj.out_channels // 2
    unit = canvas / patches.base_size
    of_columns, of_rows = (
        get_1d_sincos_pos_embed_from_grid(half, along / unit / patches.interpolation_scale).view(*along.shape, half)
        for along in (columns, rows)
    )
    shape = (*rows.shape, columns.shape[1], half)
    return torch.cat((of_columns.unsqueeze(1).expand(shape), of_rows.unsqueeze(2).expand(shape)), dim=-1)


def _resize(model: Any, side: int) -> None:
    patches = model.pos_embed
    patches.pos_embed_max_size = side
    patches.pos_embed = torch.empty(1, side * side, patches.pos_embed.shape[-1], device="meta")
