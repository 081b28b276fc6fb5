"""Images that the model makes: those of the class beforehand, and those before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pocketune.atomic import replacing
from pocketune.errors import NoEffectError
from pocketune.phases.state import Job
from pocketune.photos import load_made_images
from pocketune.record import SamplePair
from pocketune.runfolder import class_image_paths
from pocketune.sample import run_pipeline, shown_prompts

SAMPLE_SEED = 1000


def make_class_images(job: Job) -> list[Image.Image]:
    """Images of the class by the base model, kept in RUN/class_images for a resumed run."""
    prompt, count = job.recipe.class_prompt, job.recipe.class_images
    if prompt is None:
        return []
    paths = class_image_paths(job.run, count)
    with job.watch.phase("class images"):
        if not all(path.exists() for path in paths):
            _sample_class_images(job, prompt, paths)
        return load_made_images(paths)


def _sample_class_images(job: Job, prompt: str, paths: Sequence[Path]) -> None:
    """They are read back from disk, by every run alike; those made here are gone then."""
    images = run_pipeline(
        job.pipeline(),
        job.folder,
        [prompt] * len(paths),
        seeds=[job.recipe.seed + number for number in range(len(paths))],
        steps=job.recipe.sample_steps,
        guidance=job.recipe.guidance_scale,
        resolution=job.resolution,
        batch=job.sampling_batch,
        on_image=lambda done, total: job.watch.tell("class images", done, total, "image"),
    )
    for image, path in zip(images, paths, strict=True):
        _save_png(image, path)


def sample_pairs(job: Job) -> tuple[tuple[SamplePair, ...], float]:
    """Same-seed images without and with the result, and how much it changes them (mean absolute difference, 0 to 1)."""
    prompts = shown_prompts(job.recipe)
    seeds = [SAMPLE_SEED + number for number in range(len(prompts))]
    with job.watch.phase("samples"):
        pipeline = job.pipeline(packed=job.recipe.method == "scales")
        total = 2 * len(prompts)

        def render(already: int) -> list[Image.Image]:
            return run_pipeline(
                pipeline,
                job.folder,
                prompts,
                seeds=seeds,
                steps=job.recipe.sample_steps,
                guidance=job.recipe.guidance_scale,
                resolution=job.resolution,
                batch=job.sampling_batch,
                on_image=lambda done, _: job.watch.tell("samples", already + done, total, "image"),
            )

        result = job.run / job.method.result
        job.method.prepare(pipeline, result, job.folder)
        before = render(0)
        job.method.check(pipeline, result, job.folder)
        after = render(len(prompts))
    change = float(np.mean([_difference(a, b) for a, b in zip(before, after, strict=True)]))
    if change == 0.0:
        msg = "the result loads but changes no image. Train for more steps or with a higher learning_rate."
        raise NoEffectError(msg)
    pairs = []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        names = [Path("samples") / f"{number:02d}-{when}.png" for when in ("before", "after")]
        _save_png(before[number], job.run / names[0])
        _save_png(after[number], job.run / names[1])
        pairs.append(SamplePair(prompt=prompt, seed=seed, before=names[0], after=names[1]))
    return tuple(pairs), change


def _difference(first: Image.Image, second: Image.Image) -> float:
    a, b = np.asarray(first, dtype=np.float32), np.asarray(second, dtype=np.float32)
    return float(np.abs(a - b).mean() / 255)


def _save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        image.save(partial, format="PNG")
