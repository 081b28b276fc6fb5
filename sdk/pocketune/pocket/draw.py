"""Draw scenes: flat-shaded subjects on eight backgrounds, anti-aliased by supersampling twice.

Every shape is a polygon in a unit frame (x right, y down, both from -0.5 to 0.5), so that one affine map
places, turns, flips and scales a whole subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pocketune.pocket.scenes import Scene, Subject, Toy

Points = np.ndarray
Rgb = tuple[int, int, int]
INK: Rgb = (30, 28, 34)
PAPER: Rgb = (250, 250, 250)
SUPERSAMPLING = 2


class Shape(NamedTuple):
    """A polygon of the unit frame, points: (n, 2), and its paint: a role name or a colour."""

    points: Points
    paint: str | Rgb


def render(scene: Scene, *, size: int = 128) -> Image.Image:
    """Draw a scene as an RGB image of size x size pixels; equal scenes give equal pixels."""
    side = size * SUPERSAMPLING
    rng = np.random.default_rng(scene.detail_seed)
    canvas = Image.new("RGB", (side, side))
    _BACKGROUNDS[scene.background](canvas, rng)
    for subject in scene.subjects:
        _draw_subject(canvas, subject)
    return canvas.reduce(SUPERSAMPLING)


def _draw_subject(canvas: Image.Image, subject: Subject) -> None:
    body, details = _toy_shapes(subject.toy) if subject.toy else _CLASS_SHAPES[subject.noun]()
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


def _ellipse(x: float, y: float, rx: float, ry: float, *, start: float = 0.0, stop: float = 360.0) -> Points:
    angle = np.deg2rad(np.linspace(start, stop, 29)[: 28 if stop - start == 360 else 29])
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _box(x0: float, y0: float, x1: float, y1: float) -> Points:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners)


Drawing = tuple[Sequence[Shape], Sequence[Shape]]


def _cat() -> Drawing:
    tail = _polygon((0.2, 0.42), (0.42, 0.3), (0.46, 0.02), (0.38, 0.0), (0.35, 0.22), (0.16, 0.32))
    body = [
        Shape(tail, "body"),
        Shape(_ellipse(0.0, 0.27, 0.25, 0.23), "body"),
        Shape(_polygon((-0.28, -0.12), (-0.27, -0.5), (-0.04, -0.3)), "body"),
        Shape(_polygon((0.28, -0.12), (0.27, -0.5), (0.04, -0.3)), "body"),
        Shape(_ellipse(0.0, -0.13, 0.3, 0.25), "body"),
    ]
    details = [
        Shape(_ellipse(-0.12, -0.16, 0.06, 0.08), PAPER),
        Shape(_ellipse(0.12, -0.16, 0.06, 0.08), PAPER),
        Shape(_ellipse(-0.12, -0.15, 0.03, 0.06), INK),
        Shape(_ellipse(0.12, -0.15, 0.03, 0.06), INK),
        Shape(_polygon((-0.05, -0.05), (0.05, -0.05), (0.0, 0.01)), (235, 120, 140)),
    ]
    return body, details


def _car() -> Drawing:
    body = [
        Shape(_polygon((-0.3, -0.02), (-0.2, -0.26), (0.16, -0.26), (0.3, -0.02)), "body"),
        Shape(_box(-0.5, -0.04, 0.5, 0.18), "body"),
    ]
    details = [
        Shape(_polygon((-0.23, -0.04), (-0.16, -0.2), (-0.03, -0.2), (-0.03, -0.04)), (190, 225, 240)),
        Shape(_polygon((0.03, -0.04), (0.03, -0.2), (0.13, -0.2), (0.22, -0.04)), (190, 225, 240)),
        *(Shape(_ellipse(x, 0.19, 0.12, 0.12), INK) for x in (-0.27, 0.27)),
        *(Shape(_ellipse(x, 0.19, 0.055, 0.055), (200, 200, 205)) for x in (-0.27, 0.27)),
    ]
    return body, details


def _house() -> Drawing:
    body = [
        Shape(_box(0.16, -0.45, 0.28, -0.15), "dark"),
        Shape(_polygon((-0.5, -0.06), (0.0, -0.5), (0.5, -0.06)), "dark"),
        Shape(_box(-0.38, -0.06, 0.38, 0.45), "body"),
    ]
    details = [
        Shape(_box(-0.09, 0.14, 0.11, 0.45), (95, 60, 35)),
        Shape(_box(-0.3, 0.04, -0.15, 0.2), (250, 235, 150)),
        Shape(_box(0.17, 0.04, 0.32, 0.2), (250, 235, 150)),
    ]
    return body, details


def _tree() -> Drawing:
    body = [
        Shape(_box(-0.08, 0.1, 0.08, 0.5), (110, 72, 42)),
        Shape(_ellipse(-0.2, -0.02, 0.22, 0.2), "body"),
        Shape(_ellipse(0.2, -0.02, 0.22, 0.2), "body"),
        Shape(_ellipse(0.0, -0.22, 0.28, 0.26), "body"),
    ]
    return body, []


def _fish() -> Drawing:
    body = [
        Shape(_polygon((0.22, 0.0), (0.5, -0.24), (0.44, 0.0), (0.5, 0.24)), "dark"),
        Shape(_polygon((-0.12, -0.16), (0.02, -0.36), (0.14, -0.14)), "dark"),
        Shape(_ellipse(-0.1, 0.0, 0.38, 0.23), "body"),
    ]
    details = [
        Shape(_ellipse(-0.3, -0.05, 0.06, 0.06), PAPER),
        Shape(_ellipse(-0.31, -0.05, 0.03, 0.03), INK),
        Shape(_polygon((-0.06, 0.02), (0.1, -0.04), (0.1, 0.12)), "dark"),
    ]
    return body, details


def _mug() -> Drawing:
    body = [
        Shape(_ellipse(0.25, 0.06, 0.2, 0.2), "body"),
        Shape(_box(-0.38, -0.3, 0.26, 0.38), "body"),
    ]
    details = [
        Shape(_ellipse(0.31, 0.06, 0.075, 0.095), PAPER),
        Shape(_ellipse(-0.06, -0.3, 0.32, 0.075), "dark"),
        Shape(_ellipse(-0.06, -0.29, 0.26, 0.05), (90, 55, 35)),
    ]
    return body, details


def _robot() -> Drawing:
    body = [
        Shape(_box(-0.02, -0.5, 0.02, -0.36), "dark"),
        Shape(_ellipse(0.0, -0.47, 0.045, 0.045), "dark"),
        Shape(_box(-0.4, -0.02, -0.27, 0.24), "dark"),
        Shape(_box(0.27, -0.02, 0.4, 0.24), "dark"),
        Shape(_box(-0.2, 0.28, -0.06, 0.5), "dark"),
        Shape(_box(0.06, 0.28, 0.2, 0.5), "dark"),
        Shape(_box(-0.26, -0.05, 0.26, 0.3), "body"),
        Shape(_box(-0.2, -0.38, 0.2, -0.08), "body"),
    ]
    details = [
        Shape(_box(-0.14, -0.3, -0.03, -0.2), (120, 240, 250)),
        Shape(_box(0.03, -0.3, 0.14, -0.2), (120, 240, 250)),
        Shape(_box(-0.1, -0.15, 0.1, -0.12), INK),
        Shape(_box(-0.13, 0.05, 0.13, 0.18), (225, 225, 230)),
    ]
    return body, details


def _star() -> Drawing:
    angle = np.deg2rad(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    return [Shape(np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.03], axis=1), "body")], []


def _boat() -> Drawing:
    body = [
        Shape(_box(-0.02, -0.48, 0.03, 0.16), (110, 72, 42)),
        Shape(_polygon((0.05, -0.44), (0.05, 0.08), (0.42, 0.08)), PAPER),
        Shape(_polygon((-0.04, -0.34), (-0.04, 0.08), (-0.32, 0.08)), PAPER),
        Shape(_polygon((-0.48, 0.14), (0.48, 0.14), (0.3, 0.42), (-0.3, 0.42)), "body"),
    ]
    return body, []


def _mushroom() -> Drawing:
    body = [
        Shape(_polygon((-0.13, 0.0), (0.13, 0.0), (0.18, 0.45), (-0.18, 0.45)), (240, 228, 205)),
        Shape(_ellipse(0.0, 0.06, 0.46, 0.48, start=180.0, stop=360.0), "body"),
    ]
    details = [Shape(_ellipse(x, y, 0.07, 0.055), PAPER) for x, y in ((-0.22, -0.1), (0.05, -0.24), (0.26, -0.06))]
    return body, details


def _rocket() -> Drawing:
    body = [
        Shape(_polygon((-0.1, 0.32), (0.1, 0.32), (0.0, 0.5)), (250, 170, 40)),
        Shape(_polygon((-0.14, 0.08), (-0.34, 0.36), (-0.12, 0.32)), "dark"),
        Shape(_polygon((0.14, 0.08), (0.34, 0.36), (0.12, 0.32)), "dark"),
        Shape(_polygon((-0.16, 0.34), (-0.18, -0.15), (0.0, -0.5), (0.18, -0.15), (0.16, 0.34)), "body"),
    ]
    details = [Shape(_ellipse(0.0, -0.1, 0.09, 0.09), INK), Shape(_ellipse(0.0, -0.1, 0.065, 0.065), (160, 220, 245))]
    return body, details


def _duck() -> Drawing:
    body = [
        Shape(_polygon((-0.34, -0.26), (-0.5, -0.18), (-0.32, -0.12)), (245, 150, 30)),
        Shape(_polygon((0.2, 0.1), (0.5, -0.08), (0.4, 0.28)), "body"),
        Shape(_ellipse(0.06, 0.2, 0.36, 0.22), "body"),
        Shape(_ellipse(-0.18, -0.18, 0.2, 0.2), "body"),
    ]
    details = [
        Shape(_ellipse(-0.24, -0.23, 0.045, 0.045), PAPER),
        Shape(_ellipse(-0.25, -0.23, 0.025, 0.025), INK),
        Shape(_ellipse(0.12, 0.18, 0.17, 0.1), "dark"),
    ]
    return body, details


_CLASS_SHAPES: dict[str, Callable[[], Drawing]] = {
    "cat": _cat,
    "car": _car,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "mug": _mug,
    "robot": _robot,
    "star": _star,
    "boat": _boat,
    "mushroom": _mushroom,
    "rocket": _rocket,
    "duck": _duck,
}


def _toy_shapes(toy: Toy) -> Drawing:
    w = toy.width
    outlines = {
        "round": _ellipse(0.0, 0.05, 0.33 * w, 0.33),
        "box": _box(-0.3 * w, -0.24, 0.3 * w, 0.36),
        "drop": np.concatenate([_ellipse(0.0, 0.14, 0.33 * w, 0.25, start=-10.0, stop=190.0), _polygon((0.0, -0.34))]),
        "tall": np.concatenate(
            [
                _ellipse(0.0, -0.12, 0.24 * w, 0.22, start=180.0, stop=360.0),
                _ellipse(0.0, 0.22, 0.24 * w, 0.16, start=0.0, stop=180.0),
            ]
        ),
        "hexagon": np.stack(
            [0.36 * w * np.cos(np.arange(6) * np.pi / 3), 0.34 * np.sin(np.arange(6) * np.pi / 3) + 0.05], axis=1
        ),
        "bean": np.concatenate(
            [
                _ellipse(-0.06, -0.1, 0.26 * w, 0.22, start=150.0, stop=380.0),
                _ellipse(0.08, 0.18, 0.28 * w, 0.2, start=-20.0, stop=170.0),
            ]
        ),
    }
    body = [*_toy_limbs(toy), *_toy_ears(toy), Shape(outlines[toy.body], "body")]
    details: list[Shape] = []
    if toy.belly:
        details.append(Shape(_ellipse(0.0, 0.22, 0.15 * w, 0.12), "second"))
    spread = {1: (0.0,), 2: (-0.11, 0.11), 3: (-0.17, 0.0, 0.17)}[toy.eyes]
    radius = toy.eye_radius * (1.2 if toy.eyes == 1 else 0.75 if toy.eyes == 3 else 1.0)
    for x in spread:
        details.append(Shape(_ellipse(x * w, -0.06, radius, radius), PAPER))
        details.append(Shape(_ellipse(x * w, -0.05, radius * 0.55, radius * 0.55), INK))
    mouths = {
        "smile": _ellipse(0.0, 0.09, 0.11, 0.07, start=0.0, stop=180.0),
        "flat": _box(-0.09, 0.1, 0.09, 0.13),
        "open": _ellipse(0.0, 0.13, 0.05, 0.06),
        "beak": _polygon((-0.08, 0.06), (0.08, 0.06), (0.0, 0.17)),
    }
    details.append(Shape(mouths[toy.mouth], (245, 160, 40) if toy.mouth == "beak" else INK))
    return body, details


def _toy_ears(toy: Toy) -> list[Shape]:
    w = toy.width
    shapes: list[Shape] = []
    for side in (-1.0, 1.0):
        x = side * 0.2 * w
        if toy.ears == "round":
            shapes.append(Shape(_ellipse(x * 1.15, -0.27, 0.12, 0.12), "second"))
        elif toy.ears == "pointed":
            shapes.append(Shape(_polygon((x * 0.5, -0.2), (x * 1.35, -0.48), (x * 1.5, -0.1)), "second"))
        elif toy.ears == "long":
            shapes.append(Shape(_ellipse(x * 0.8, -0.34, 0.065, 0.17), "second"))
        elif toy.ears == "antenna":
            shapes.append(Shape(_box(x * 0.7 - 0.018, -0.44, x * 0.7 + 0.018, -0.1), "second"))
            shapes.append(Shape(_ellipse(x * 0.7, -0.44, 0.055, 0.055), "second"))
        elif toy.ears == "horns":
            shapes.append(Shape(_polygon((x * 0.6, -0.2), (x * 1.9, -0.42), (x * 1.3, -0.08)), (245, 235, 205)))
    return shapes


def _toy_limbs(toy: Toy) -> list[Shape]:
    w = toy.width
    shapes: list[Shape] = []
    for side in (-1.0, 1.0):
        if toy.limbs in ("feet", "both"):
            shapes.append(Shape(_ellipse(side * 0.15 * w, 0.41, 0.11, 0.07), "second"))
        if toy.limbs in ("arms", "both"):
            shapes.append(Shape(_ellipse(side * 0.38 * w, 0.12, 0.09, 0.09), "second"))
        if toy.limbs == "wings":
            shapes.append(
                Shape(_polygon((side * 0.2 * w, 0.0), (side * 0.5, -0.18), (side * 0.46, 0.2), (side * 0.2 * w, 0.2)), "second")
            )
    return shapes


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
        brush.line([0, y * side, side, y * side], fill=_shade(base, 0.65), width=max(2, side // 90))


def _sunset(canvas: Image.Image, rng: np.random.Generator) -> None:
    _gradient(canvas, _vary(rng, (110, 50, 120)), (240, 110, 70), stop=0.45)
    _gradient(canvas, (240, 110, 70), (255, 200, 90), start=0.45, stop=0.72)
    _gradient(canvas, _vary(rng, (80, 40, 70), 6), (50, 25, 55), start=0.72)
    side = canvas.width
    x, y, r = float(rng.uniform(0.15, 0.85)) * side, 0.62 * side, 0.11 * side
    ImageDraw.Draw(canvas).pieslice([x - r, y - r, x + r, y + r], 180, 360, fill=(255, 240, 150))


def _gray(canvas: Image.Image, rng: np.random.Generator) -> None:
    canvas.paste(_vary(rng, (150, 150, 152), 14), (0, 0, canvas.width, canvas.width))


_BACKGROUNDS: dict[str, Callable[[Image.Image, np.random.Generator], None]] = {
    "grass": _grass,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "brick": _brick,
    "table": _table,
    "sunset": _sunset,
    "gray": _gray,
}
