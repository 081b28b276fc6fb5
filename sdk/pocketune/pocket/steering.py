"""Do prompts steer a model? Held-out prompts through a stock diffusers pipeline, judged by the attribute classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from pocketune.pocket.judges import AttributeClassifier, load_attribute_classifier
from pocketune.pocket.scenes import BACKGROUNDS, held_out_combinations, held_out_stream

ATTRIBUTES = ("noun", "colour", "background")


@dataclass(frozen=True, kw_only=True)
class SteeringPrompt:
    """A prompt that names a class, a colour and a background, and the seed of its image."""

    text: str
    noun: str
    colour: str
    background: str
    seed: int


Row = dict[str, Any]
"""One judged image: prompt, seed, size, steps, guidance, and for each attribute what was asked and seen, and if they agree."""


def steering_prompts(count: int, *, seed: int = 0) -> list[SteeringPrompt]:
    """The first `count` of the held-out combinations, and again from the first when there are no more.

    Args:
        count: how many.
        seed: added to the seed of every image.
    """
    stream = held_out_stream()
    combinations = held_out_combinations(stream)
    prompts = []
    for noun, colour, background in islice(cycle(combinations), count):
        article = "an" if colour == "orange" else "a"
        text = f"a photo of {article} {colour} {noun} {BACKGROUNDS[background]}"
        image_seed = int(stream.integers(2**31)) + seed
        prompts.append(SteeringPrompt(text=text, noun=noun, colour=colour, background=background, seed=image_seed))
    return prompts


def judged_rows(
    pipeline: Any,
    prompts: list[SteeringPrompt],
    *,
    guidance: float = 4.0,
    steps: int = 28,
    size: int | None = None,
    batch_size: int = 20,
    text: Mapping[str, Any] | None = None,
    classifier: AttributeClassifier | None = None,
) -> Iterator[Row]:
    """Generate an image for each prompt, from its own seed, and judge it.

    Args:
        pipeline: a stock diffusers pipeline.
        prompts: what to ask.
        guidance: classifier-free guidance scale.
        steps: sampling steps.
        size: image side in pixels; default: the model's own.
        batch_size: images generated together.
        text: further arguments of the pipeline's call, which say how long its text is.
        classifier: default: the shipped one.
    """
    classifier = classifier or load_attribute_classifier()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        images = pipeline(
            prompt=[prompt.text for prompt in batch],
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
            **(text or {}),
        ).images
        for prompt, image, seen in zip(batch, images, classifier.classify(images), strict=True):
            asked = {name: getattr(prompt, name) for name in ATTRIBUTES}
            settings = {"prompt": prompt.text, "seed": prompt.seed, "size": image.width, "steps": steps, "guidance": guidance}
            right = {name: seen[name] == value for name, value in asked.items()}
            yield {
                **settings,
                "asked": asked,
                "seen": {name: seen[name] for name in ATTRIBUTES},
                "right": {**right, "all": all(right.values())},
            }


def summarize(rows: list[Row]) -> dict[str, float]:
    """Share of images that are right, by attribute and for "all" three; and their "count"."""
    shares = {name: sum(row["right"][name] for row in rows) / len(rows) for name in (*ATTRIBUTES, "all")} if rows else {}
    return {"count": len(rows), **shares}


def measure_steering(
    pipeline: Any,
    count: int = 200,
    *,
    guidance: float = 4.0,
    steps: int = 28,
    seed: int = 0,
    size: int | None = None,
    batch_size: int = 20,
    text: Mapping[str, Any] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[list[Row], dict[str, float]]:
    """Judge `count` held-out prompts; returns the rows and their summary.

    Args:
        pipeline: as for `judged_rows`.
        count: how many prompts.
        guidance: classifier-free guidance scale.
        steps: sampling steps.
        seed: added to the seed of every image.
        size: image side in pixels; default: the model's own.
        batch_size: images generated together.
        text: as for `judged_rows`.
        on_row: called with every row as soon as it is there.
    """
    rows = []
    prompts = steering_prompts(count, seed=seed)
    settings: dict[str, Any] = {"guidance": guidance, "steps": steps, "size": size, "batch_size": batch_size, "text": text}
    for row in judged_rows(pipeline, prompts, **settings):
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows, summarize(rows)
