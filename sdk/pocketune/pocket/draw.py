"""Draw scenes: flat-shaded figures on backgrounds, anti-aliased by supersampling twice."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pocketune.pocket.backdrops import BACKDROPS
from pocketune.pocket.figures import CLASS_FIGURES, Points, Rgb, Shape, toy_figure
from pocketune.pocket.scenes import Scene, Subject

SUPERSAMPLING = 2


def render(scene: Scene, *, size: int = 128) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels; equal scenes give equal pixels."""
    side = size * SUPERSAMPLING
    rng = np.random.default_rng(scene.detail_seed)
    canvas = Image.new("RGB", (side, side))
    BACKDROPS[scene.background](canvas, rng)
    for subject in scene.subjects:
        _draw_subject(canvas, subject)
    return canvas.reduce(SUPERSAMPLING)


def _draw_subject(canvas: Image.Image, subject: Subject) -> None:
    body, details = toy_figure(subject.toy) if subject.toy else CLASS_FIGURES[subject.noun]()
    rgb = subject.toy.main_rgb if subject.toy else subject.rgb
    pattern = subject.toy.pattern if subject.toy else subject.pattern
    second = subject.toy.second_rgb if subject.toy else _contrast(rgb)
    side = canvas.width
    angle = np.deg2rad(subject.tilt)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    flip = np.array([-1.0 if subject.flip else 1.0, 1.0])

    def place(points: Points) -> list[tuple[float, float]]:
        moved = (points * flip) @ turn.T * subject.extent + np.array(subject.centre)
        return [(float(x), float(y)) for x, y in moved * side]

    brush = ImageDraw.Draw(canvas)
    outline = max(2, round(side * 0.016))
    edge = _shade(rgb, 0.3) if sum(rgb) > 150 else (150, 150, 158)
    for shape in body:
        corners = place(shape.points)
        brush.line([*corners, corners[0], corners[1]], fill=edge, width=outline, joint="curve")
    paints: dict[str, Rgb] = {"body": rgb, "dark": _shade(rgb, 0.68), "second": second}
    for shape in body:
        brush.polygon(place(shape.points), fill=_paint(shape, paints))
    if pattern != "plain":
        mask = Image.new("L", canvas.size)
        stencil = ImageDraw.Draw(mask)
        for shape in body:
            stencil.polygon(place(shape.points), fill=255 if shape.paint == "body" else 0)
        canvas.paste(_pattern_tile(canvas.size, pattern, rgb, second, subject), mask=mask)
    for shape in details:
        brush.polygon(place(shape.points), fill=_paint(shape, paints))


def _pattern_tile(size: tuple[int, int], pattern: str, rgb: Rgb, second: Rgb, subject: Subject) -> Image.Image:
    tile = Image.new("RGB", size, rgb)
    brush = ImageDraw.Draw(tile)
    side = size[0]
    step = subject.extent * side * 0.17
    x0 = (subject.centre[0] - subject.extent / 2) * side
    y0 = (subject.centre[1] - subject.extent / 2) * side
    for i in range(-1, 8):
        if pattern == "striped":
            brush.rectangle([0, y0 + i * step, side, y0 + (i + 0.45) * step], fill=second)
            continue
        for j in range(-1, 8):
            x, y = x0 + j * step, y0 + i * step
            if pattern == "dotted":
                shift = step / 2 if i % 2 else 0.0
                brush.ellipse([x + shift, y, x + shift + step * 0.55, y + step * 0.55], fill=second)
            elif (i + j) % 2:
                brush.rectangle([x, y, x + step, y + step], fill=second)
    return tile


def _paint(shape: Shape, paints: dict[str, Rgb]) -> Rgb:
    return paints[shape.paint] if isinstance(shape.paint, str) else shape.paint


def _shade(rgb: Rgb, factor: float) -> Rgb:
    return int(rgb[0] * factor), int(rgb[1] * factor), int(rgb[2] * factor)


def _contrast(rgb: Rgb) -> Rgb:
    luminance = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
    target = 255 if luminance < 150 else 30
    return tuple(int(c * 0.45 + target * 0.55) for c in rgb)  # type: ignore[return-value]
