"""Settings from fastest to cheapest. None of them changes what is asked for: what is learned, from what, and how long.

Two change results a little: with `optimizer_in_backward` gradients are clipped block by block, and a VAE that works in tiles
gives slightly other latents and images.

Packing weights to few bits is not among them: streamed weights need less memory than packed ones and keep their numbers. Nor
are packed weights streamed: on disk 4 bits share scales in groups and small weights stay whole, which are other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pocketune.recipe import Recipe

VAE_TILE = 256
_ACTIVATIONS = ("kept", "recomputed", "on_disk")
_STEPS: tuple[dict[str, Any], ...] = (
    {},
    {"activations": "recomputed"},
    {"weights": "streamed"},
    {"activations": "recomputed", "weights": "streamed"},
    {"activations": "on_disk", "weights": "streamed"},
    {"activations": "on_disk", "weights": "streamed", "optimizer_in_backward": True},
)


def rungs(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe as it is, then with ever cheaper settings; what it saves already, it goes on saving."""
    seen: list[Recipe] = []
    for step in _STEPS:
        for tile in ({}, {"vae_tile": VAE_TILE}):
            candidate = _with(recipe, step | tile)
            if candidate not in seen:
                seen.append(candidate)
                yield candidate


def changes(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with both values."""
    first, second = before.model_dump(), after.model_dump()
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def _with(recipe: Recipe, step: dict[str, Any]) -> Recipe:
    values = dict(step)
    if recipe.gradient == "zeroth_order":  # it has no backward, for which activations would be kept
        values.pop("activations", None)
        values.pop("optimizer_in_backward", None)
    if recipe.weight_bits is not None:
        values.pop("weights", None)
    kept = values.get("activations")
    if kept is not None and _ACTIVATIONS.index(recipe.activations) > _ACTIVATIONS.index(kept):
        del values["activations"]
    if recipe.vae_tile is not None:
        values.pop("vae_tile", None)
    return recipe.changed(**values)
