"""Places: where on the canvas the crop of a draw lies, so that its tokens get the positions they have there.

The canvas is the picture that is sampled. A crop that enters the model as an image of its own teaches the subject's parts at
positions and in sizes that they do not have on the canvas, and pictures then repeat them. Nothing here needs torch.

Paper: Patch Diffusion (Wang et al. 2023, arXiv 2304.12526) gives a denoiser the coordinates of its patch.
Differs: in the model's own positions, not in channels that would have to be learned; and DiT-BlockSkip (arXiv 2603.20755), from
which patches come, mentions no positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from pocketune.errors import PlanError
from pocketune.sampling.draws import Crop, centre_crop


class Asked(Protocol):
    """The fields of a recipe that places follow from."""

    @property
    def positions(self) -> Literal["canvas", "own"] | None:
        """Whose positions training images get; None: the canvas' where each image has its own."""

    @property
    def patches(self) -> str:
        """How crops are chosen."""

    @property
    def gradient(self) -> str:
        """How the gradient is had; mixed training has smaller images."""

    @property
    def batch_size(self) -> int:
        """Photos a step."""

    @property
    def class_prompt(self) -> str | None:
        """With which a step has as many class images."""


class Place(NamedTuple):
    """A crop's top, left and side on the canvas, and the canvas' side, all in latent pixels of the canvas."""

    top: float
    left: float
    side: float
    canvas: float


def canvas_of(recipe: Asked, *, positions_for: Literal["image", "batch"] | None, side: int) -> int | None:
    """The side of the canvas on which training images have their place; None: each has the positions of an image of its own.

    Where the recipe leaves it open, images are placed if the model adds a position to each token, which it can be between those
    it knows. Rotary positions turn tokens by how far they lie apart, and wider steps than a model was made with are new to it.

    Args:
        recipe: what is asked.
        positions_for: what the model gives positions to: each image, all of a batch in common, or nothing.
        side: of sampled images in latent pixels.

    Raises:
        PlanError: places are asked for and the model cannot give them.
    """
    samples = recipe.batch_size * (1 if recipe.class_prompt is None else 2)
    possible = positions_for == "image" or (positions_for == "batch" and samples == 1)
    if recipe.positions == "canvas" and not possible:
        why = (
            f"this model has one set of positions for the {samples} images of a step, of which each has its own place"
            if positions_for
            else "this model has no positions"
        )
        msg = f'positions = "canvas" does not work: {why}. Leave positions out.'
        raise PlanError(msg)
    smaller = recipe.patches != "none" or recipe.gradient == "mixed"
    wanted = positions_for == "image" if recipe.positions is None else recipe.positions == "canvas"
    return side if smaller and wanted else None


def place_of(size: tuple[int, int], crop: Crop, *, canvas: int) -> Place:
    """Where a crop of an image of (width, height) lies, if the image's largest centred square is the canvas."""
    square = centre_crop(size)
    top, left, side = (pixels * canvas / square.side for pixels in (crop.top - square.top, crop.left - square.left, crop.side))
    return Place(top, left, side, canvas)
