"""The eight backgrounds, each painted over a whole canvas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from pocketune.pocket.figures import Rgb


def _gradient(canvas: Image.Image, top: Rgb, bottom: Rgb, *, start: float = 0.0, stop: float = 1.0) -> None:
    side = canvas.width
    rows = max(1, round((stop - start) * side))
    ramp = np.linspace(np.array(top, dtype=np.float32), np.array(bottom, dtype=np.float32), rows)
    strip = Image.fromarray(ramp.round().astype(np.uint8)[:, None, :])
    canvas.paste(strip.resize((side, rows)), (0, round(start * side)))


def _vary(rng: np.random.Generator, rgb: Rgb, amount: int = 10) -> Rgb:
    shift = int(rng.integers(-amount, amount + 1))
    return tuple(int(np.clip(c + shift, 0, 255)) for c in rgb)  # type: ignore[return-value]


def _grass(canvas: Image.Image, rng: np.random.Generator) -> None:
    side = canvas.width
    horizon = float(rng.uniform(0.36, 0.48))
    _gradient(canvas, _vary(rng, (140, 200, 245)), (205, 232, 250), stop=horizon)
    _gradient(canvas, _vary(rng, (110, 190, 80)), (70, 150, 55), start=horizon)
    brush = ImageDraw.Draw(canvas)
    for x, y in rng.random((14, 2)):
        x0, y0 = x * side, (horizon + 0.04 + y * (0.96 - horizon)) * side
        blade = side * 0.035
        brush.line(
            [x0 - blade / 2, y0 - blade, x0, y0, x0 + blade / 2, y0 - blade], fill=(48, 120, 44), width=max(2, side // 110)
        )


def _beach(canvas: Image.Image, rng: np.random.Generator) -> None:
    shore = float(rng.uniform(0.52, 0.62))
    _gradient(canvas, _vary(rng, (120, 205, 240)), (215, 240, 250), stop=0.34)
    _gradient(canvas, _vary(rng, (30, 130, 190)), (70, 180, 205), start=0.34, stop=shore)
    _gradient(canvas, _vary(rng, (245, 225, 165)), (228, 198, 130), start=shore)
    side = canvas.width
    x, y = float(rng.uniform(0.12, 0.88)) * side, 0.14 * side
    ImageDraw.Draw(canvas).ellipse([x - 0.08 * side, y - 0.08 * side, x + 0.08 * side, y + 0.08 * side], fill=(255, 244, 170))


def _night(canvas: Image.Image, rng: np.random.Generator) -> None:
    _gradient(canvas, _vary(rng, (14, 16, 48), 6), (44, 44, 96))
    brush = ImageDraw.Draw(canvas)
    side = canvas.width
    for x, y in rng.random((12, 2)):
        r = side * 0.008
        brush.ellipse([x * side - r, y * side - r, x * side + r, y * side + r], fill=(240, 240, 220))
    x, y, r = float(rng.choice((0.14, 0.86))) * side, 0.15 * side, 0.09 * side
    brush.ellipse([x - r, y - r, x + r, y + r], fill=(250, 245, 210))


def _snow(canvas: Image.Image, rng: np.random.Generator) -> None:
    horizon = float(rng.uniform(0.42, 0.54))
    _gradient(canvas, _vary(rng, (165, 180, 200)), (200, 212, 226), stop=horizon)
    _gradient(canvas, (238, 243, 250), _vary(rng, (220, 230, 242), 6), start=horizon)
    brush = ImageDraw.Draw(canvas)
    side = canvas.width
    for x, y in rng.random((16, 2)):
        r = side * 0.012
        brush.ellipse([x * side - r, y * side - r, x * side + r, y * side + r], fill=(255, 255, 255))


def _brick(canvas: Image.Image, rng: np.random.Generator) -> None:
    side = canvas.width
    canvas.paste((205, 195, 185), (0, 0, side, side))
    brush = ImageDraw.Draw(canvas)
    height, width = side / 8, side / 4
    offset = float(rng.choice((0.0, 0.5))) * width
    base = _vary(rng, (165, 75, 55))
    for row in range(8):
        for column in range(-1, 6):
            x = column * width + (width / 2 if row % 2 else 0.0) - offset
            rgb = _vary(rng, base, 9)
            brush.rectangle([x + 3, row * height + 3, x + width - 3, (row + 1) * height - 3], fill=rgb)


def _table(canvas: Image.Image, rng: np.random.Generator) -> None:
    side = canvas.width
    edge = float(rng.uniform(0.54, 0.64))
    _gradient(canvas, _vary(rng, (222, 212, 240)), (236, 228, 246), stop=edge)
    brush = ImageDraw.Draw(canvas)
    base = _vary(rng, (176, 122, 70))
    brush.rectangle([0, edge * side, side, side], fill=base)
    for y in (edge, edge + 0.12, edge + 0.25, edge + 0.39):
        brush.line([0, y * side, side, y * side], fill=tuple(int(c * 0.65) for c in base), width=max(2, side // 90))


def _sunset(canvas: Image.Image, rng: np.random.Generator) -> None:
    _gradient(canvas, _vary(rng, (110, 50, 120)), (240, 110, 70), stop=0.45)
    _gradient(canvas, (240, 110, 70), (255, 200, 90), start=0.45, stop=0.72)
    _gradient(canvas, _vary(rng, (80, 40, 70), 6), (50, 25, 55), start=0.72)
    side = canvas.width
    x, y, r = float(rng.uniform(0.15, 0.85)) * side, 0.62 * side, 0.11 * side
    ImageDraw.Draw(canvas).pieslice([x - r, y - r, x + r, y + r], 180, 360, fill=(255, 240, 150))


def _gray(canvas: Image.Image, rng: np.random.Generator) -> None:
    canvas.paste(_vary(rng, (150, 150, 152), 14), (0, 0, canvas.width, canvas.width))


BACKDROPS: dict[str, Callable[[Image.Image, np.random.Generator], None]] = {
    "grass": _grass,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "brick": _brick,
    "table": _table,
    "sunset": _sunset,
    "gray": _gray,
}
