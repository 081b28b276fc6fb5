"""Options that several commands have, and the recipe that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pocketune.errors import RecipeError
from pocketune.recipe import Recipe

DEFAULT_MODEL = "pocket-sd3"
MAX_SEED = 2**63 - 1
"""As of recipes; the seeds of further images, which count up from it, are still ones that torch takes."""

ModelOption = Annotated[str | None, typer.Option("--model", help="Built-in name, local diffusers folder, or hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and what --json asks for).")]
SkipOption = Annotated[
    str | None, typer.Option(help="Blocks not to train: none, auto, auto:0.3, first:0.3, last:0.3, hollow:0.3 or 0-3,8-11.")
]
BudgetOption = Annotated[
    str | None, typer.Option("--memory-budget", help="Main memory that the job may take, as 1GiB, 900MB or 1.5G.")
]


def recipe_of(file: Path | None, asked: dict[str, Any]) -> Recipe:
    """A recipe from a file and from options, which win over it.

    Raises:
        RecipeError: there is no instance prompt, or a value is not valid.
    """
    if file is not None:
        return Recipe.from_toml(file, **asked)
    if asked["instance_prompt"] is None:
        msg = 'no instance prompt: say what the photos show, as in --instance-prompt "a photo of sks toy", or give a --recipe.'
        raise RecipeError(msg)
    return Recipe.create(**{name: value for name, value in asked.items() if value is not None})
