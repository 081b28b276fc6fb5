"""What makes the images that are judged: a training for each method, subject and seed, then the prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from benchmarks.quality.methods import Method
from benchmarks.quality.subjects import AskedPrompt, BoothSubject, asked_scene
from pocketune.pocket.draw import render
from pocketune.recipe import Recipe
from pocketune.runfolder import RECORD_FILE


class Painter(Protocol):
    """Makes images of a subject by one method."""

    def paint(self, method: Method, subject: BoothSubject, prompts: Sequence[AskedPrompt], seed: int) -> list[Image.Image]:
        """One image a prompt."""


class PocketunePainter:
    """Trains with `pocketune.personalize`, each subject, method and seed once, and samples with `pocketune.sample.generate`."""

    def __init__(self, model: str, recipe: dict[str, Any], work: Path) -> None:
        """Name the model, the recipe's changes from the defaults, and the folder for photos and runs."""
        self._model, self._recipe, self._work = model, recipe, work
        self._untrained: dict[tuple[tuple[str, ...], int], list[Image.Image]] = {}

    def paint(self, method: Method, subject: BoothSubject, prompts: Sequence[AskedPrompt], seed: int) -> list[Image.Image]:
        """One image a prompt, image i from seed `seed` * 1000 + i."""
        if method.source == "renderer":
            if subject.toy is None:
                return []
            return [render(asked_scene(subject.toy, prompt, seed * 1000 + i)) for i, prompt in enumerate(prompts)]
        texts = tuple(prompt.text for prompt in prompts)
        if method.source == "lora":
            return self._generate(texts, seed, self._trained(method, subject, seed))
        # Without training nothing depends on the subject but the prompts, which rendered subjects share.
        if (texts, seed) not in self._untrained:
            self._untrained[texts, seed] = self._generate(texts, seed, None)
        return self._untrained[texts, seed]

    def _generate(self, texts: Sequence[str], seed: int, lora: Path | None) -> list[Image.Image]:
        from pocketune.sample import generate

        defaults = Recipe.create(**Recipe.relevant({"instance_prompt": "a photo"} | self._recipe))
        return generate(
            self._model,
            list(texts),
            lora=lora,
            seeds=[seed * 1000 + index for index in range(len(texts))],
            steps=defaults.sample_steps,
            guidance=defaults.guidance_scale,
        )

    def _trained(self, method: Method, subject: BoothSubject, seed: int) -> Path:
        import pocketune
        from pocketune import tuning

        changes = hashlib.sha256(method.changes_text(self._recipe).encode()).hexdigest()[:8]
        run = self._work / f"{method.name}-{changes}" / f"{subject.name}-{seed}"
        weights = run / tuning.METHODS[method.changes.get("method", "lora")].result
        if (run / RECORD_FILE).exists() and weights.exists():
            return weights
        recipe = method_recipe(method, subject_recipe(subject, self._recipe) | {"seed": seed})
        pocketune.personalize(
            save_photos(subject, self._work / "photos" / subject.name),
            model=self._model,
            recipe=recipe,
            out=run,
            resume=run.exists(),
        )
        return weights


def subject_recipe(subject: BoothSubject, recipe: dict[str, Any]) -> dict[str, Any]:
    """A base recipe for one subject."""
    return {"instance_prompt": subject.instance_prompt, "sample_prompts": (subject.instance_prompt,), **recipe}


def method_recipe(method: Method, base: dict[str, Any]) -> Recipe:
    """A base recipe with a method's changes, less what the method does not take."""
    return Recipe.create(**method.changed(base))


def save_photos(subject: BoothSubject, folder: Path) -> list[Path]:
    """The subject's photos as files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(len(subject.photos))]
    for path, photo in zip(paths, subject.photos, strict=True):
        photo.save(path)
    return paths
