"""Timestep-aware dynamic patches: how much of a photo a draw sees, and where, by its noise. Nothing here needs torch.

Paper: DiT-BlockSkip (arXiv 2603.20755), equation 1: s(t) = s_min + (t / T) (s_max - s_min); an s(t) x s(t) patch of the
reference image is cropped and resized to s_min x s_min, so that tensors are small and have one shape.
Differs: the place of the crop is not stated in what could be read; here it is uniform. The patch is cut out of the photo and
resized once, not resized to the reference resolution first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketune.errors import PlanError
from pocketune.sampling.draws import Crop, centre_crop

Scheme = Literal["none", "dynamic", "resize", "high-to-low", "random"]


class Asked(Protocol):
    """The fields of a recipe that patches follow from."""

    @property
    def patches(self) -> Scheme:
        """How the size of a patch follows from the noise."""

    @property
    def patch_min(self) -> int | None:
        """Side of the smallest patch, and of all training images."""

    @property
    def patch_max(self) -> int | None:
        """Side of the largest patch."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Chooses the crop of each draw; `draw_samples` calls it. Sides are in pixels of the photo scaled to `reference`.

    Attributes:
        scheme: "dynamic" is the paper's: larger patches at more noise. Its ablations: "high-to-low" is the reverse, "random"
            has a uniform size whatever the noise, "resize" takes the whole square. "none" is no patches at all.
        smallest: s_min, the side of every training image.
        largest: s_max.
        reference: side to which the photo's centred square is thought to be scaled; s_max is at most that.
        unit: sides of patches are multiples of it.
        noise: t / T by timestep index, (timesteps,).
    """

    scheme: Scheme
    smallest: int
    largest: int
    reference: int
    unit: int
    noise: NDArray[np.float64]

    def __call__(self, size: tuple[int, int], timestep_index: int, numbers: NDArray[np.float64]) -> Crop:
        """The crop of one draw.

        Args:
            size: (width, height) of the photo in its pixels.
            timestep_index: of the draw.
            numbers: (3,) uniform in [0, 1), for the place and, where it is random, the size.
        """
        square = centre_crop(size)
        if self.scheme in ("none", "resize"):
            return square
        patch = self.side(float(self.noise[timestep_index]), uniform=float(numbers[2]))
        side = max(1, round(square.side * patch / self.reference))
        places = square.side - side + 1
        return Crop(left=square.left + int(numbers[0] * places), top=square.top + int(numbers[1] * places), side=side)

    def side(self, noise: float, *, uniform: float) -> int:
        """The side of a patch, a multiple of the unit.

        Paper: equation 1.

        Args:
            noise: t / T, from 0 to 1.
            uniform: a number in [0, 1), used by "random" alone.
        """
        steps = (self.largest - self.smallest) // self.unit
        if self.scheme == "random":
            return self.smallest + int(uniform * (steps + 1)) * self.unit
        share = 1.0 - noise if self.scheme == "high-to-low" else noise
        return self.smallest + round(share * steps) * self.unit

    def describe(self) -> str:
        """For the report."""
        if self.scheme == "none":
            return "none"
        if self.scheme == "resize":
            return f"whole photos at {self.smallest} pixels"
        how = {"dynamic": "larger at more noise", "high-to-low": "smaller at more noise", "random": "of random size"}
        return f"{self.smallest} to {self.largest} pixels, {how[self.scheme]}, at {self.smallest} pixels"


def patches_of(recipe: Asked, *, resolution: int, unit: int, noise: NDArray[np.float64]) -> Patches:
    """The patches that a recipe asks for.

    Args:
        recipe: scheme and sizes; s_min is half of the resolution and s_max all of it where it names none.
        resolution: side, in pixels, of images without patches.
        unit: sides must be multiples of this many pixels.
        noise: t / T by timestep index, (timesteps,).

    Raises:
        PlanError: the sizes do not fit the model or each other.
    """
    smallest, largest = patch_sides(recipe, resolution=resolution, unit=unit)
    return Patches(scheme=recipe.patches, smallest=smallest, largest=largest, reference=resolution, unit=unit, noise=noise)


def patch_sides(recipe: Asked, *, resolution: int, unit: int) -> tuple[int, int]:
    """Sides of the smallest patch, and of all training images, and of the largest; arguments as of `patches_of`.

    Raises:
        PlanError: the sizes do not fit the model or each other.
    """
    if recipe.patches == "none":
        return resolution, resolution
    smallest = recipe.patch_min or max(unit, resolution // 2 // unit * unit)
    largest = recipe.patch_max or resolution
    for name, side in (("patch_min", smallest), ("patch_max", largest)):
        if side % unit or not unit <= side <= resolution:
            msg = f"{name} {side} does not fit: expected a multiple of {unit} up to the resolution, {resolution}."
            raise PlanError(msg)
    if smallest >= largest:
        msg = (
            f"patches from {smallest} to {largest} pixels: there is nothing between. Set patch_min below {largest}, raise "
            'the resolution, or set patches = "none".'
        )
        raise PlanError(msg)
    return smallest, largest
