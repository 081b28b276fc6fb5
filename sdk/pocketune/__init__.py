"""Pocketune: personalize a text-to-image diffusion model on the device that holds the photos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pocketune.progress import Progress
from pocketune.recipe import Recipe

if TYPE_CHECKING:
    from pocketune.job import personalize
    from pocketune.sample import generate

__all__ = ["Progress", "Recipe", "generate", "personalize"]


def __getattr__(name: str) -> Any:
    """Import torch only when a job is asked for, so that small commands start at once."""
    if name == "personalize":
        from pocketune.job import personalize

        return personalize
    if name == "generate":
        from pocketune.sample import generate

        return generate
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
