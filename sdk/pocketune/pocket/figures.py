"""The figures of scenes: what each class, and each toy, is made of.

Every shape is a polygon in a unit frame (x right, y down, both from -0.5 to 0.5), so that one affine map places, turns, flips
and scales a whole figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pocketune.pocket.scenes import Toy

Points = np.ndarray
Rgb = tuple[int, int, int]
INK: Rgb = (30, 28, 34)
PAPER: Rgb = (250, 250, 250)


class Shape(NamedTuple):
    """A polygon of the unit frame, points: (n, 2), and its paint: a role name or a colour."""

    points: Points
    paint: str | Rgb


def ellipse(x: float, y: float, rx: float, ry: float, *, start: float = 0.0, stop: float = 360.0) -> Points:
    """A filled ellipse, or its sector from `start` to `stop` degrees, clockwise from the right."""
    angle = np.deg2rad(np.linspace(start, stop, 29)[: 28 if stop - start == 360 else 29])
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def box(x0: float, y0: float, x1: float, y1: float) -> Points:
    """A rectangle from its upper left to its lower right corner."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def polygon(*corners: tuple[float, float]) -> Points:
    """A polygon by its corners."""
    return np.array(corners)


Figure = tuple[Sequence[Shape], Sequence[Shape]]
"""Body and details; a pattern covers the body only."""


def _cat() -> Figure:
    tail = polygon((0.2, 0.42), (0.42, 0.3), (0.46, 0.02), (0.38, 0.0), (0.35, 0.22), (0.16, 0.32))
    body = [
        Shape(tail, "body"),
        Shape(ellipse(0.0, 0.27, 0.25, 0.23), "body"),
        Shape(polygon((-0.28, -0.12), (-0.27, -0.5), (-0.04, -0.3)), "body"),
        Shape(polygon((0.28, -0.12), (0.27, -0.5), (0.04, -0.3)), "body"),
        Shape(ellipse(0.0, -0.13, 0.3, 0.25), "body"),
    ]
    details = [
        Shape(ellipse(-0.12, -0.16, 0.06, 0.08), PAPER),
        Shape(ellipse(0.12, -0.16, 0.06, 0.08), PAPER),
        Shape(ellipse(-0.12, -0.15, 0.03, 0.06), INK),
        Shape(ellipse(0.12, -0.15, 0.03, 0.06), INK),
        Shape(polygon((-0.05, -0.05), (0.05, -0.05), (0.0, 0.01)), (235, 120, 140)),
    ]
    return body, details


def _car() -> Figure:
    body = [
        Shape(polygon((-0.3, -0.02), (-0.2, -0.26), (0.16, -0.26), (0.3, -0.02)), "body"),
        Shape(box(-0.5, -0.04, 0.5, 0.18), "body"),
    ]
    details = [
        Shape(polygon((-0.23, -0.04), (-0.16, -0.2), (-0.03, -0.2), (-0.03, -0.04)), (190, 225, 240)),
        Shape(polygon((0.03, -0.04), (0.03, -0.2), (0.13, -0.2), (0.22, -0.04)), (190, 225, 240)),
        *(Shape(ellipse(x, 0.19, 0.12, 0.12), INK) for x in (-0.27, 0.27)),
        *(Shape(ellipse(x, 0.19, 0.055, 0.055), (200, 200, 205)) for x in (-0.27, 0.27)),
    ]
    return body, details


def _house() -> Figure:
    body = [
        Shape(box(0.16, -0.45, 0.28, -0.15), "dark"),
        Shape(polygon((-0.5, -0.06), (0.0, -0.5), (0.5, -0.06)), "dark"),
        Shape(box(-0.38, -0.06, 0.38, 0.45), "body"),
    ]
    details = [
        Shape(box(-0.09, 0.14, 0.11, 0.45), (95, 60, 35)),
        Shape(box(-0.3, 0.04, -0.15, 0.2), (250, 235, 150)),
        Shape(box(0.17, 0.04, 0.32, 0.2), (250, 235, 150)),
    ]
    return body, details


def _tree() -> Figure:
    body = [
        Shape(box(-0.08, 0.1, 0.08, 0.5), (110, 72, 42)),
        Shape(ellipse(-0.2, -0.02, 0.22, 0.2), "body"),
        Shape(ellipse(0.2, -0.02, 0.22, 0.2), "body"),
        Shape(ellipse(0.0, -0.22, 0.28, 0.26), "body"),
    ]
    return body, []


def _fish() -> Figure:
    body = [
        Shape(polygon((0.22, 0.0), (0.5, -0.24), (0.44, 0.0), (0.5, 0.24)), "dark"),
        Shape(polygon((-0.12, -0.16), (0.02, -0.36), (0.14, -0.14)), "dark"),
        Shape(ellipse(-0.1, 0.0, 0.38, 0.23), "body"),
    ]
    details = [
        Shape(ellipse(-0.3, -0.05, 0.06, 0.06), PAPER),
        Shape(ellipse(-0.31, -0.05, 0.03, 0.03), INK),
        Shape(polygon((-0.06, 0.02), (0.1, -0.04), (0.1, 0.12)), "dark"),
    ]
    return body, details


def _mug() -> Figure:
    body = [
        Shape(ellipse(0.25, 0.06, 0.2, 0.2), "body"),
        Shape(box(-0.38, -0.3, 0.26, 0.38), "body"),
    ]
    details = [
        Shape(ellipse(0.31, 0.06, 0.075, 0.095), PAPER),
        Shape(ellipse(-0.06, -0.3, 0.32, 0.075), "dark"),
        Shape(ellipse(-0.06, -0.29, 0.26, 0.05), (90, 55, 35)),
    ]
    return body, details


def _robot() -> Figure:
    body = [
        Shape(box(-0.02, -0.5, 0.02, -0.36), "dark"),
        Shape(ellipse(0.0, -0.47, 0.045, 0.045), "dark"),
        Shape(box(-0.4, -0.02, -0.27, 0.24), "dark"),
        Shape(box(0.27, -0.02, 0.4, 0.24), "dark"),
        Shape(box(-0.2, 0.28, -0.06, 0.5), "dark"),
        Shape(box(0.06, 0.28, 0.2, 0.5), "dark"),
        Shape(box(-0.26, -0.05, 0.26, 0.3), "body"),
        Shape(box(-0.2, -0.38, 0.2, -0.08), "body"),
    ]
    details = [
        Shape(box(-0.14, -0.3, -0.03, -0.2), (120, 240, 250)),
        Shape(box(0.03, -0.3, 0.14, -0.2), (120, 240, 250)),
        Shape(box(-0.1, -0.15, 0.1, -0.12), INK),
        Shape(box(-0.13, 0.05, 0.13, 0.18), (225, 225, 230)),
    ]
    return body, details


def _star() -> Figure:
    angle = np.deg2rad(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    return [Shape(np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.03], axis=1), "body")], []


def _boat() -> Figure:
    body = [
        Shape(box(-0.02, -0.48, 0.03, 0.16), (110, 72, 42)),
        Shape(polygon((0.05, -0.44), (0.05, 0.08), (0.42, 0.08)), PAPER),
        Shape(polygon((-0.04, -0.34), (-0.04, 0.08), (-0.32, 0.08)), PAPER),
        Shape(polygon((-0.48, 0.14), (0.48, 0.14), (0.3, 0.42), (-0.3, 0.42)), "body"),
    ]
    return body, []


def _mushroom() -> Figure:
    body = [
        Shape(polygon((-0.13, 0.0), (0.13, 0.0), (0.18, 0.45), (-0.18, 0.45)), (240, 228, 205)),
        Shape(ellipse(0.0, 0.06, 0.46, 0.48, start=180.0, stop=360.0), "body"),
    ]
    details = [Shape(ellipse(x, y, 0.07, 0.055), PAPER) for x, y in ((-0.22, -0.1), (0.05, -0.24), (0.26, -0.06))]
    return body, details


def _rocket() -> Figure:
    body = [
        Shape(polygon((-0.1, 0.32), (0.1, 0.32), (0.0, 0.5)), (250, 170, 40)),
        Shape(polygon((-0.14, 0.08), (-0.34, 0.36), (-0.12, 0.32)), "dark"),
        Shape(polygon((0.14, 0.08), (0.34, 0.36), (0.12, 0.32)), "dark"),
        Shape(polygon((-0.16, 0.34), (-0.18, -0.15), (0.0, -0.5), (0.18, -0.15), (0.16, 0.34)), "body"),
    ]
    details = [Shape(ellipse(0.0, -0.1, 0.09, 0.09), INK), Shape(ellipse(0.0, -0.1, 0.065, 0.065), (160, 220, 245))]
    return body, details


def _duck() -> Figure:
    body = [
        Shape(polygon((-0.34, -0.26), (-0.5, -0.18), (-0.32, -0.12)), (245, 150, 30)),
        Shape(polygon((0.2, 0.1), (0.5, -0.08), (0.4, 0.28)), "body"),
        Shape(ellipse(0.06, 0.2, 0.36, 0.22), "body"),
        Shape(ellipse(-0.18, -0.18, 0.2, 0.2), "body"),
    ]
    details = [
        Shape(ellipse(-0.24, -0.23, 0.045, 0.045), PAPER),
        Shape(ellipse(-0.25, -0.23, 0.025, 0.025), INK),
        Shape(ellipse(0.12, 0.18, 0.17, 0.1), "dark"),
    ]
    return body, details


CLASS_FIGURES: dict[str, Callable[[], Figure]] = {
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


def toy_figure(toy: Toy) -> Figure:
    """The shapes of a toy."""
    w = toy.width
    outlines = {
        "round": ellipse(0.0, 0.05, 0.33 * w, 0.33),
        "box": box(-0.3 * w, -0.24, 0.3 * w, 0.36),
        "drop": np.concatenate([ellipse(0.0, 0.14, 0.33 * w, 0.25, start=-10.0, stop=190.0), polygon((0.0, -0.34))]),
        "tall": np.concatenate(
            [
                ellipse(0.0, -0.12, 0.24 * w, 0.22, start=180.0, stop=360.0),
                ellipse(0.0, 0.22, 0.24 * w, 0.16, start=0.0, stop=180.0),
            ]
        ),
        "hexagon": np.stack(
            [0.36 * w * np.cos(np.arange(6) * np.pi / 3), 0.34 * np.sin(np.arange(6) * np.pi / 3) + 0.05], axis=1
        ),
        "bean": np.concatenate(
            [
                ellipse(-0.06, -0.1, 0.26 * w, 0.22, start=150.0, stop=380.0),
                ellipse(0.08, 0.18, 0.28 * w, 0.2, start=-20.0, stop=170.0),
            ]
        ),
    }
    body = [*_toy_limbs(toy), *_toy_ears(toy), Shape(outlines[toy.body], "body")]
    details: list[Shape] = []
    if toy.belly:
        details.append(Shape(ellipse(0.0, 0.22, 0.15 * w, 0.12), "second"))
    spread = {1: (0.0,), 2: (-0.11, 0.11), 3: (-0.17, 0.0, 0.17)}[toy.eyes]
    radius = toy.eye_radius * (1.2 if toy.eyes == 1 else 0.75 if toy.eyes == 3 else 1.0)
    for x in spread:
        details.append(Shape(ellipse(x * w, -0.06, radius, radius), PAPER))
        details.append(Shape(ellipse(x * w, -0.05, radius * 0.55, radius * 0.55), INK))
    mouths = {
        "smile": ellipse(0.0, 0.09, 0.11, 0.07, start=0.0, stop=180.0),
        "flat": box(-0.09, 0.1, 0.09, 0.13),
        "open": ellipse(0.0, 0.13, 0.05, 0.06),
        "beak": polygon((-0.08, 0.06), (0.08, 0.06), (0.0, 0.17)),
    }
    details.append(Shape(mouths[toy.mouth], (245, 160, 40) if toy.mouth == "beak" else INK))
    return body, details


def _toy_ears(toy: Toy) -> list[Shape]:
    w = toy.width
    shapes: list[Shape] = []
    for side in (-1.0, 1.0):
        x = side * 0.2 * w
        if toy.ears == "round":
            shapes.append(Shape(ellipse(x * 1.15, -0.27, 0.12, 0.12), "second"))
        elif toy.ears == "pointed":
            shapes.append(Shape(polygon((x * 0.5, -0.2), (x * 1.35, -0.48), (x * 1.5, -0.1)), "second"))
        elif toy.ears == "long":
            shapes.append(Shape(ellipse(x * 0.8, -0.34, 0.065, 0.17), "second"))
        elif toy.ears == "antenna":
            shapes.append(Shape(box(x * 0.7 - 0.018, -0.44, x * 0.7 + 0.018, -0.1), "second"))
            shapes.append(Shape(ellipse(x * 0.7, -0.44, 0.055, 0.055), "second"))
        elif toy.ears == "horns":
            shapes.append(Shape(polygon((x * 0.6, -0.2), (x * 1.9, -0.42), (x * 1.3, -0.08)), (245, 235, 205)))
    return shapes


def _toy_limbs(toy: Toy) -> list[Shape]:
    w = toy.width
    shapes: list[Shape] = []
    for side in (-1.0, 1.0):
        if toy.limbs in ("feet", "both"):
            shapes.append(Shape(ellipse(side * 0.15 * w, 0.41, 0.11, 0.07), "second"))
        if toy.limbs in ("arms", "both"):
            shapes.append(Shape(ellipse(side * 0.38 * w, 0.12, 0.09, 0.09), "second"))
        if toy.limbs == "wings":
            shapes.append(
                Shape(polygon((side * 0.2 * w, 0.0), (side * 0.5, -0.18), (side * 0.46, 0.2), (side * 0.2 * w, 0.2)), "second")
            )
    return shapes
