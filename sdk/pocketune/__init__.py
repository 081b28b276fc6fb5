"""Pocketune: personalize a text-to-image diffusion model on the device that holds the photos."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketune.job import personalize
    from pocketune.progress import Progress
    from pocketune.recipe import Recipe
    from pocketune.sample import generate

__all__ = ["Progress", "Recipe", "generate", "personalize"]

_HOMES = {"Progress": "progress", "Recipe": "recipe", "generate": "sample", "personalize": "job"}


def __getattr__(name: str) -> Any:
    """Import torch only when a job is asked for: small commands start at once, and the edge runtime does without it."""
    if name in _HOMES:
        return getattr(import_module(f"pocketune.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
