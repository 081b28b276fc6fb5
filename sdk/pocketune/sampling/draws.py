"""The draws of a training: which photo, crop, timestep and noise each sample uses.

A draw is plain data that follows from the seed and its number alone. So the pass that precomputes features and the training
replay the same draws, a resumed run goes on with the same ones, and another runtime makes the same. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketune.sampling.philox import Stream, normals, uniforms, words

Kind = Literal["instance", "class"]


# Second word of the counter, see `philox.words`.
_ORDER, _SEEDS, _TIMESTEP, _POSTERIOR, _CROP = range(5)


class Asked(Protocol):
    """The fields of a recipe that draws follow from."""

    @property
    def seed(self) -> int:
        """Of all random numbers."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def batch_size(self) -> int:
        """Photos a step."""

    @property
    def draws(self) -> int | None:
        """Bound of the pool of distinct draws."""

    @property
    def refresh_every(self) -> int | None:
        """Steps after which the pool is drawn anew."""

    @property
    def weighting_scheme(self) -> str:
        """Density of the timesteps."""

    @property
    def logit_mean(self) -> float:
        """Of the logit-normal density."""

    @property
    def logit_std(self) -> float:
        """Of the logit-normal density."""

    @property
    def mode_scale(self) -> float:
        """Of the mode density."""


@dataclass(frozen=True)
class Crop:
    """A square of a photo in its pixels: left, top and side."""

    left: int
    top: int
    side: int


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One training sample before any tensor is made.

    Attributes:
        index: its number; with a draw for each sample, draw k belongs to optimizer step k // batch_size.
        kind: a photo of the subject, or a class image for prior preservation.
        image: index among the photos, or among the class images.
        crop: the square that is cut out and resized to the training resolution.
        timestep_index: position in the scheduler's 1000 training timesteps, 0 the noisiest.
        noise_seed: of the noise and of the VAE's posterior sample.
        low: whether the crop is resized to the low resolution of a mixed training, not to the training resolution.
    """

    index: int
    kind: Kind
    image: int
    crop: Crop
    timestep_index: int
    noise_seed: int
    low: bool = False

    @property
    def cache_number(self) -> int:
        """Its number in a feature cache: photos even, class images odd, and the same below zero at low resolution."""
        number = 2 * self.index + (self.kind == "class")
        return -1 - number if self.low else number

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


ChooseCrop = Callable[[tuple[int, int], int, NDArray[np.float64]], Crop]
"""Gives the crop of a photo of (width, height) for a timestep index, from three uniform random numbers."""


def whole_square(size: tuple[int, int], timestep_index: int, numbers: NDArray[np.float64]) -> Crop:  # noqa: ARG001
    """The crop of a draw without patches: the largest centred square, whatever the noise."""
    return centre_crop(size)


def draw_samples(
    recipe: Asked,
    sizes: Sequence[tuple[int, int]],
    *,
    kind: Kind,
    timesteps: int = 1000,
    choose_crop: ChooseCrop = whole_square,
    positions: tuple[float, float] = (0.0, 1.0),
) -> tuple[Draw, ...]:
    """All draws of a run, one for every sample of every step unless the recipe bounds the pool; pools follow one another.

    Photos come in shuffled rounds; timesteps as in diffusers' SD3 script (`weighting_scheme`, Esser et al. 2024, section 3.1).

    Args:
        recipe: seed, steps, batch size, pool size and timestep density.
        sizes: (width, height) of each image.
        kind: which images these are.
        timesteps: how many the scheduler trains on.
        choose_crop: `patches.Patches`, where patches are wanted.
        positions: the part of the timesteps that is drawn from, 0 the noisiest; the density is squeezed into it.
    """
    count = sum(pool_size(recipe, steps) for steps in refresh_periods(recipe))
    return tuple(_draw(recipe, index, sizes, kind, timesteps, choose_crop, positions) for index in range(count))


def refresh_periods(recipe: Asked) -> tuple[range, ...]:
    """The optimizer steps of each pool: all steps, or runs of `refresh_every`."""
    every = recipe.refresh_every or recipe.steps
    return tuple(range(start, min(start + every, recipe.steps)) for start in range(0, recipe.steps, every))


def pool_size(recipe: Asked, steps: range) -> int:
    """Distinct draws of the pool that serves some steps, of photos and of class images each."""
    needed = len(steps) * recipe.batch_size
    return needed if recipe.draws is None else min(needed, recipe.draws)


def step_draws(recipe: Asked, photos: Sequence[Draw], class_images: Sequence[Draw] = ()) -> list[tuple[Draw, ...]]:
    """The draws of each optimizer step: `batch_size` photos, then as many class images if there are any.

    A pool that is smaller than what its steps need is replayed in its order.
    """
    size, first = recipe.batch_size, 0
    chosen: list[tuple[Draw, ...]] = []
    for steps in refresh_periods(recipe):
        pool = pool_size(recipe, steps)
        for start in range(0, len(steps) * size, size):
            numbers = [first + place % pool for place in range(start, start + size)]
            chosen.append(tuple(draws[number] for draws in (photos, class_images) if draws for number in numbers))
        first += pool
    return chosen


def centre_crop(size: tuple[int, int]) -> Crop:
    """The largest centred square of an image of (width, height)."""
    width, height = size
    side = min(width, height)
    return Crop(left=(width - side) // 2, top=(height - side) // 2, side=side)


def crop_sizes(size: tuple[int, int], crop: Crop, *, resolution: int) -> tuple[int, int, int, int, int, int]:
    """Height and width of an image; top and left of a crop in the resized image; height and width of the result, in pixels.

    Paper: Podell et al. 2023 (SDXL), section 2.2.
    """
    scale, (width, height) = resolution / crop.side, size
    return height, width, round(crop.top * scale), round(crop.left * scale), resolution, resolution


def cut(image: Image.Image, crop: Crop, *, resolution: int) -> NDArray[np.float32]:
    """Cut and resize, (3, resolution, resolution) in [-1, 1]."""
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    patch = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(patch, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / np.float32(127.5) - np.float32(1.0))


def noise_for(draw: Draw, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The draw's diffusion noise and its posterior noise, both float32 of the given shape, equal on every device."""
    noise = normals(draw.noise_seed, Stream.NOISE, shape)
    posterior = normals(draw.noise_seed, Stream.NOISE, shape, purpose=_POSTERIOR)
    return noise.astype(np.float32), posterior.astype(np.float32)


def timestep_density(recipe: Asked, *, uniform: float, normal: float) -> float:
    """A position from 0 (noisiest) to 1, as diffusers' `compute_density_for_timestep_sampling` makes it of a random number.

    Paper: Esser et al. 2024 (SD3), section 3.1.

    Args:
        recipe: scheme and its constants.
        uniform: a number in [0, 1), used by the schemes that are not logit-normal.
        normal: a standard normal number.
    """
    if recipe.weighting_scheme == "logit_normal":
        logit = recipe.logit_mean + recipe.logit_std * normal
        return 0.5 * (1.0 + math.tanh(0.5 * logit))  # the sigmoid, without overflow
    if recipe.weighting_scheme == "mode":
        return 1.0 - uniform - recipe.mode_scale * (math.cos(math.pi * uniform / 2) ** 2 - 1.0 + uniform)
    return uniform


def _draw(
    recipe: Asked,
    index: int,
    sizes: Sequence[tuple[int, int]],
    kind: Kind,
    timesteps: int,
    choose_crop: ChooseCrop,
    positions: tuple[float, float],
) -> Draw:
    stream = Stream.PHOTOS if kind == "instance" else Stream.CLASS_IMAGES
    round_number, place = divmod(index, len(sizes))
    shuffled = np.argsort(words(recipe.seed, stream, len(sizes), purpose=_ORDER, index=round_number), kind="stable")
    image = int(shuffled[place])
    raw = words(recipe.seed, stream, 2, purpose=_SEEDS, index=index)
    density = timestep_density(
        recipe,
        uniform=float(uniforms(raw)[1]),
        normal=float(normals(recipe.seed, stream, (1,), purpose=_TIMESTEP, index=index)[0]),
    )
    position = positions[0] + density * (positions[1] - positions[0])
    timestep_index = min(max(int(position * timesteps), 0), timesteps - 1)
    return Draw(
        index=index,
        kind=kind,
        image=image,
        crop=choose_crop(sizes[image], timestep_index, uniforms(words(recipe.seed, stream, 3, purpose=_CROP, index=index))),
        timestep_index=timestep_index,
        noise_seed=int(raw[0]) >> 1,
    )
