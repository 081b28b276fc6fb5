"""Makes the demo photos: views of one real cat, and renders of one toy.

    python demo/make_photos.py

The files are committed, so nobody needs to run this; it shows where they come from. It needs the extra [benchmark], for the
photograph that scikit-image carries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from skimage import data

from pocketune.pocket.draw import render
from pocketune.pocket.scenes import random_scene, toy_identity

PHOTOS = Path(__file__).parent / "photos"
TOY_NUMBER = 900001
TOY_SCENES = (("grass", 6), ("table", 10), ("snow", 3), ("brick", 11))
"""Background and seed of each toy photo; these seeds place the toy large and in the middle, as a person would."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One way of looking at the photograph.

    Attributes:
        box: left, top, right, bottom in pixels of the turned photograph.
        degrees: turn of the camera, counter-clockwise.
        brightness: 1 keeps the light as it is.
        mirrored: seen in a mirror.
        side: longer side of the result in pixels.
    """

    box: tuple[int, int, int, int]
    degrees: float = 0.0
    brightness: float = 1.0
    mirrored: bool = False
    side: int = 400


CAT_VIEWS = (
    View(box=(0, 0, 451, 300), side=450),
    View(box=(40, 0, 340, 300), side=360),
    View(box=(90, 20, 380, 265), degrees=6, brightness=1.12),
    View(box=(70, 15, 400, 285), degrees=-5, brightness=0.9, side=420),
    View(box=(30, 0, 330, 300), mirrored=True, brightness=1.06, side=384),
)


def cat_view(photograph: Image.Image, view: View) -> Image.Image:
    """Cut one view out of the photograph."""
    turned = photograph.rotate(view.degrees, resample=Image.Resampling.BICUBIC)
    cut = ImageEnhance.Brightness(turned.crop(view.box)).enhance(view.brightness)
    scale = view.side / max(cut.size)
    grown = cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.Resampling.LANCZOS)
    return ImageOps.mirror(grown) if view.mirrored else grown


def toy_photo(background: str, seed: int) -> Image.Image:
    """Render the demo toy in front of a background, 256 pixels square."""
    scene = random_scene(np.random.default_rng([TOY_NUMBER, seed]), toy=toy_identity(TOY_NUMBER), background=background)
    return render(scene, size=256)


def main() -> None:
    """Write all demo photos."""
    photograph = Image.fromarray(data.chelsea())
    images = {PHOTOS / "cat" / f"cat-{n}.jpg": cat_view(photograph, view) for n, view in enumerate(CAT_VIEWS, start=1)}
    images |= {PHOTOS / "toy" / f"toy-{n}.jpg": toy_photo(*scene) for n, scene in enumerate(TOY_SCENES, start=1)}
    for path, image in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)


if __name__ == "__main__":
    main()
