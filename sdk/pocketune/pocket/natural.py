"""Images that are not renders: what keeps the small VAE honest on real photographs.

Dead leaves (Lee, Mumford and Huang 2001) share the edge and scale statistics of natural images, and the photographs
that scikit-image carries (public domain or CC0) add texture and light. The cat among them is left out: the demo trains on it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "ihc.png")


def dead_leaves(rng: np.random.Generator, *, size: int) -> Image.Image:
    """Overlapping discs and boxes, radii by a power law, colours softly correlated, RGB of size x size."""
    side = size * 2
    base = rng.uniform(0, 255, size=3)
    canvas = Image.new("RGB", (side, side), tuple(int(c) for c in base))
    brush = ImageDraw.Draw(canvas)
    radii = np.sort(side * 0.02 * (1 - rng.random(60)) ** -0.8)[::-1]
    for radius in np.minimum(radii, side * 0.5):
        x, y = rng.uniform(0, side, size=2)
        rgb = tuple(int(c) for c in np.clip(base + rng.normal(0, 70, size=3), 0, 255))
        box = [x - radius, y - radius, x + radius, y + radius]
        (brush.ellipse if rng.random() < 0.7 else brush.rectangle)(box, fill=rgb)
    return canvas.reduce(2)


def photographs() -> list[Image.Image]:
    """The photographs of the scikit-image package, RGB; empty where it is not installed."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS if (folder / name).exists()]


def random_view(rng: np.random.Generator, photo: Image.Image, *, size: int) -> Image.Image:
    """A square cut of a photograph at a random place and scale, resized to size x size, flipped half of the time."""
    shorter = min(photo.size)
    side = int(rng.uniform(min(size, shorter), shorter))
    x, y = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    view = photo.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view
