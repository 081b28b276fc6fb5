"""Renders that the judges learn from and are measured on: many subjects, several scenes of each, sharp and softened."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pocketune.pocket.draw import render
from pocketune.pocket.judges import HEADS, RESERVED_TOYS, SIDE, to_pixels
from pocketune.pocket.scenes import CLASSES, COLOURS, PATTERNS, TOY, Scene, Toy, random_scene, toy_identity

VIEWS = 4
"""Photographs of every subject in the pool."""
FAMILY = 6
"""Subjects that stand together in the pool: two toys, the second in the first one's colours, and three of named classes."""
IGNORED = -100
"""Label of the colour of a toy: `F.cross_entropy` leaves it out."""


@dataclass(frozen=True)
class RenderPool:
    """Renders of many subjects, four of each in a row, families in a row.

    Attributes:
        pixels: uint8 (subjects * 4, 3, 64, 64).
        labels: by attribute, int64 (subjects * 4,), indices into `HEADS`.
        subjects: int64 (subjects * 4,); equal for renders of what counts as the same subject.
    """

    pixels: Tensor
    labels: dict[str, Tensor]
    subjects: Tensor


def colour_twin(toy: Toy, colours_of: Toy) -> Toy:
    """A toy of the first one's shape in the second one's colours."""
    return replace(toy, main_rgb=colours_of.main_rgb, second_rgb=colours_of.second_rgb)


def render_pool(*, families: int, seed: int, mostly_small: bool = False) -> RenderPool:
    """Draw `families` times six subjects, four scenes each (about 2 ms a render).

    Args:
        families: how many.
        seed: decides everything.
        mostly_small: six in ten scenes hold a small subject, the hardest to judge, instead of one in eight.
    """
    pixels: list[Tensor] = []
    labels: dict[str, list[int]] = {name: [] for name in HEADS}
    subjects: list[int] = []
    for number in range(families):
        scenes: list[Scene] = []
        rng = np.random.default_rng([seed, 24 if mostly_small else 21, number])
        first, second = (toy_identity(int(rng.integers(RESERVED_TOYS))) for _ in range(2))
        for index, toy in enumerate((first, second, colour_twin(second, first))):
            scenes += [_pool_scene(rng, mostly_small, toy=toy) for _ in range(VIEWS)]
            subjects += [number * 3 + index] * VIEWS
        for _ in range(3):
            noun, colour, pattern = (int(rng.integers(n)) for n in (len(CLASSES), len(COLOURS), len(PATTERNS)))
            given: dict[str, Any] = {"noun": CLASSES[noun], "colour": tuple(COLOURS)[colour]}
            scenes += [with_pattern(_pool_scene(rng, mostly_small, **given), PATTERNS[pattern]) for _ in range(VIEWS)]
            subjects += [-1 - ((noun * len(COLOURS) + colour) * len(PATTERNS) + pattern)] * VIEWS
        pixels.append(to_bytes([render(scene) for scene in scenes]))
        for name, column in scene_labels(scenes).items():
            labels[name] += column
    return RenderPool(
        torch.cat(pixels), {name: torch.tensor(column) for name, column in labels.items()}, torch.tensor(subjects)
    )


def with_pattern(scene: Scene, pattern: str) -> Scene:
    """The scene with another pattern on its first subject."""
    return replace(scene, subjects=(replace(scene.subjects[0], pattern=pattern),))


def to_bytes(images: list[Image.Image]) -> Tensor:
    """Images as the judges see them, in a quarter of the memory: uint8 (batch, 3, 64, 64)."""
    return to_pixels(images).add(1.0).mul(127.5).round().byte()


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1], any shape."""
    return pixels.float().div_(127.5).sub_(1.0)


def scene_labels(scenes: list[Scene]) -> dict[str, list[int]]:
    """Indices into `HEADS` of what the first subject of each scene looks like."""
    columns: dict[str, list[int]] = {name: [] for name in HEADS}
    for scene in scenes:
        subject = scene.subjects[0]
        pattern = subject.toy.pattern if subject.toy else subject.pattern
        truth = {"noun": subject.noun, "pattern": pattern, "background": scene.background}
        truth |= {"size": subject.size, "place": subject.place}
        for name, value in truth.items():
            columns[name].append(HEADS[name].index(value))
        columns["colour"].append(IGNORED if subject.noun == TOY else HEADS["colour"].index(subject.colour))
    return columns


def soften(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What a small diffusion model does to a render: blur, lost detail, noise, a shift of light.

    A random quarter is blurred, a quarter is shrunk and enlarged, half keeps its edges; half of all gets noise; all get another
    brightness and contrast.

    Args:
        pixels: (batch, 3, 64, 64) in [-1, 1].
        generator: a CPU generator; it decides everything.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    order = torch.randperm(len(pixels), generator=generator)
    quarters = order.chunk(4)
    changed = pixels.clone()
    if len(quarters) > 1:
        changed[quarters[0]] = gaussian_blur(pixels[quarters[0]], sigma=float(uniform(0.3, 1.0)))
        side = round(SIDE * float(uniform(0.5, 0.9)))
        small = F.interpolate(pixels[quarters[1]], size=side, mode="bilinear", antialias=True)
        changed[quarters[1]] = F.interpolate(small, size=SIDE, mode="bilinear")
    one = (len(pixels), 1, 1, 1)
    noisy = (uniform(0.0, 1.0, *one) < 0.5).float() * uniform(0.0, 0.12, *one)
    changed = changed + noisy * torch.randn(pixels.shape, generator=generator)
    return (changed * uniform(0.88, 1.12, *one) + uniform(-0.08, 0.08, *one)).clamp(-1.0, 1.0)


def gaussian_blur(pixels: Tensor, *, sigma: float) -> Tensor:
    """Convolve (batch, 3, height, width) with a Gaussian of `sigma` pixels, edges repeated."""
    radius = max(1, math.ceil(2.5 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (weights / weights.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = F.pad(pixels, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _pool_scene(
    rng: np.random.Generator, mostly_small: bool, *, toy: Toy | None = None, noun: str | None = None, colour: str | None = None
) -> Scene:
    while True:
        scene = random_scene(rng, toy=toy, noun=noun, colour=colour)
        # Kept one time in eleven, the larger ones, which are seven in eight, come down to four in ten.
        if not mostly_small or scene.subjects[0].size == "small" or rng.random() < 1 / 11:
            return scene
