"""The draws of a training: which photo, crop, timestep and noise each sample uses.

A draw is plain data that follows from the seed and its number alone. So the pass that precomputes features and the training
replay the same draws, a resumed run goes on with the same ones, and a phone can be given them as a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from torch import Tensor

from pocketune.recipe import Recipe

Kind = Literal["instance", "class"]


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
        index: its number; draw k belongs to optimizer step k // batch_size (modulo the pool).
        kind: a photo of the subject, or a class image for prior preservation.
        image: index among the photos, or among the class images.
        crop: the square that is cut out and resized to the training resolution.
        timestep_index: position in the scheduler's 1000 training timesteps, 0 the noisiest.
        noise_seed: of the noise and of the VAE's posterior sample.
    """

    index: int
    kind: Kind
    image: int
    crop: Crop
    timestep_index: int
    noise_seed: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def draw_samples(recipe: Recipe, sizes: Sequence[tuple[int, int]], *, kind: Kind, timesteps: int = 1000) -> tuple[Draw, ...]:
    """All draws of a run, one for every sample of every step unless the recipe bounds the pool.

    Photos come in shuffled rounds; timesteps as in diffusers' SD3 script (`weighting_scheme`, Esser et al. 2024, section 3.1).

    Args:
        recipe: seed, steps, batch size, pool size and timestep density.
        sizes: (width, height) of each image.
        kind: which images these are.
        timesteps: how many the scheduler trains on.
    """
    count = recipe.steps * recipe.batch_size
    if recipe.draws is not None:
        count = min(count, recipe.draws)
    stream = 0 if kind == "instance" else 1
    return tuple(_draw(recipe, index, sizes, kind, stream, timesteps) for index in range(count))


def centre_crop(size: tuple[int, int]) -> Crop:
    """The largest centred square of an image of (width, height)."""
    width, height = size
    side = min(width, height)
    return Crop(left=(width - side) // 2, top=(height - side) // 2, side=side)


def cut(image: Image.Image, crop: Crop, *, resolution: int) -> Tensor:
    """Cut and resize, (3, resolution, resolution) in [-1, 1]."""
    box = (crop.left, crop.top, crop.left + crop.side, crop.top + crop.side)
    patch = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(patch, dtype=np.float32))
    return pixels.permute(2, 0, 1).div(127.5).sub(1.0).contiguous()


def noise_for(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The draw's diffusion noise and its posterior noise, both float32 of the given shape, equal on every device."""
    generator = torch.Generator().manual_seed(draw.noise_seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _draw(recipe: Recipe, index: int, sizes: Sequence[tuple[int, int]], kind: Kind, stream: int, timesteps: int) -> Draw:
    round_number, place = divmod(index, len(sizes))
    image = int(np.random.default_rng([recipe.seed, stream, 0, round_number]).permutation(len(sizes))[place])
    noise_seed, time_seed = (
        int(s) >> 1 for s in np.random.SeedSequence([recipe.seed, stream, 1, index]).generate_state(2, np.uint64)
    )
    density = compute_density_for_timestep_sampling(
        weighting_scheme=recipe.weighting_scheme,
        batch_size=1,
        logit_mean=recipe.logit_mean,
        logit_std=recipe.logit_std,
        mode_scale=recipe.mode_scale,
        generator=torch.Generator().manual_seed(time_seed),
    )
    return Draw(
        index=index,
        kind=kind,
        image=image,
        crop=centre_crop(sizes[image]),
        timestep_index=min(int(density.item() * timesteps), timesteps - 1),
        noise_seed=noise_seed,
    )
