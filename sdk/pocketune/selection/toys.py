"""Personalized models of rendered toys, for the search of blocks that a built-in model can go without.

The toys are of those that trainings may see, so that none is a subject of PocketBooth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketune.atomic import replacing
from pocketune.errors import Interrupted
from pocketune.job import personalize
from pocketune.pocket.draw import render
from pocketune.pocket.scenes import BACKGROUNDS, TOY, random_scene, toy_identity
from pocketune.progress import OnProgress, ignore
from pocketune.recipe import Recipe
from pocketune.runfolder import LORA_FILE, RECORD_FILE
from pocketune.selection.search import Personalized

SUBJECTS = 4
PHOTOS = 4
STEPS = 200
_PROMPT = f"a photo of sks {TOY}"
_WHERE = 3
_FIRST_TOY = 900_000  # any number below those that PocketBooth holds out
_STREAM = 38


def personalized_toys(
    model: str, work: Path, *, count: int = SUBJECTS, steps: int = STEPS, on_progress: OnProgress = ignore
) -> list[Personalized]:
    """Train a LoRA of each of some toys, with every block; those that are finished in `work` already are not trained again.

    Args:
        model: a built-in model.
        work: folder of the photos and runs.
        count: how many toys.
        steps: of each training.
        on_progress: called with every bit of progress.

    Raises:
        Interrupted: on Ctrl-C; what is trained is kept.
    """
    found = []
    for number in range(count):
        run = work / f"toy{number:02d}"
        prompts = _prompts(number)
        if not (run / RECORD_FILE).exists():
            recipe = Recipe.create(
                instance_prompt=_PROMPT,
                sample_prompts=(_PROMPT,),
                steps=steps,
                learning_rate=4e-3,
                rank=8,
                guidance_scale=4.0,
                seed=number,
            )
            photos = _photos(number, work / "photos" / run.name)
            try:
                personalize(photos, recipe=recipe, out=run, model=model, resume=run.exists(), on_progress=on_progress)
            except (Interrupted, KeyboardInterrupt) as error:  # which would speak of the command that trains
                msg = f"stopped while training {run.name}; what is done is kept. Give the same command to go on."
                raise Interrupted(msg) from error
        found.append(Personalized(name=run.name, lora=run / LORA_FILE, prompts=prompts))
    return found


def _prompts(number: int) -> tuple[str, ...]:
    """The toy alone, and in places that differ from toy to toy."""
    phrases = list(BACKGROUNDS.values())
    return (_PROMPT, *(f"{_PROMPT} {phrases[(_WHERE * number + place) % len(phrases)]}" for place in range(_WHERE)))


def _photos(number: int, folder: Path) -> list[Path]:
    rng = np.random.default_rng([_STREAM, number])
    toy = toy_identity(_FIRST_TOY + number)
    paths = []
    for index, background in enumerate(rng.permutation(list(BACKGROUNDS))[:PHOTOS]):
        while (scene := random_scene(rng, toy=toy, background=str(background))).subjects[0].size == "small":
            pass
        paths.append(folder / f"{index}.png")
        with replacing(paths[-1]) as partial:
            render(scene).save(partial, format="PNG")
    return paths
