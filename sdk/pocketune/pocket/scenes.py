"""What a rendered scene holds and how a caption describes it.

The built-in models are trained on scenes that this package draws itself, so that every photograph comes
with a true caption and true labels. A scene is plain data; `pocketune.pocket.draw` turns it into pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASSES = ("cat", "car", "house", "tree", "fish", "mug", "robot", "star", "boat", "mushroom", "rocket", "duck")
TOY = "toy"
"""The generic class noun: a subject that no caption can describe, only photographs can."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (248, 216, 50),
    "green": (50, 160, 70),
    "blue": (45, 95, 210),
    "purple": (135, 60, 180),
    "pink": (248, 150, 190),
    "brown": (125, 78, 45),
    "black": (38, 38, 44),
    "white": (246, 246, 242),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS: dict[str, str] = {
    "grass": "on grass",
    "beach": "at the beach",
    "night": "at night",
    "snow": "in snow",
    "brick": "by a brick wall",
    "table": "on a table",
    "sunset": "at sunset",
    "gray": "on gray",
}
SIZES = ("small", "normal", "big")
PLACES = ("left", "middle", "right")
IDENTIFIERS = ("sks", "zwx", "ohwx", "xyz")
"""Rare words that training captions put before nouns at random, so that they carry no meaning of their own."""

BODIES = ("round", "box", "drop", "tall", "hexagon", "bean")
EARS = ("none", "round", "pointed", "long", "antenna", "horns")
LIMBS = ("none", "feet", "arms", "wings", "both")
MOUTHS = ("smile", "flat", "open", "beak")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """The look of one unnameable subject; equal in every photograph of it."""

    body: str
    ears: str
    limbs: str
    mouth: str
    eyes: int
    eye_radius: float
    pattern: str
    belly: bool
    width: float
    main_rgb: tuple[int, int, int]
    second_rgb: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing in a scene. `centre` and `extent` are fractions of the image side; `tilt` in degrees."""

    noun: str
    colour: str
    pattern: str
    size: str
    place: str
    centre: tuple[float, float]
    extent: float
    tilt: float
    flip: bool
    rgb: tuple[int, int, int]
    toy: Toy | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background, one or two subjects, and the seed of the small accidents of drawing."""

    background: str
    subjects: tuple[Subject, ...]
    detail_seed: int


def toy_identity(seed: int) -> Toy:
    """The toy with number `seed`; equal numbers give equal toys for ever."""
    rng = np.random.default_rng([977, seed])
    hue = float(rng.random())
    main = _hsv_to_rgb(hue, float(rng.uniform(0.45, 0.95)), float(rng.uniform(0.55, 1.0)))
    second = _hsv_to_rgb(
        (hue + float(rng.uniform(0.3, 0.7))) % 1.0, float(rng.uniform(0.3, 0.95)), float(rng.uniform(0.5, 1.0))
    )
    return Toy(
        body=_pick(rng, BODIES),
        ears=_pick(rng, EARS),
        limbs=_pick(rng, LIMBS),
        mouth=_pick(rng, MOUTHS),
        eyes=int(rng.integers(1, 4)),
        eye_radius=float(rng.uniform(0.07, 0.13)),
        pattern=_pick(rng, PATTERNS),
        belly=bool(rng.random() < 0.4),
        width=float(rng.uniform(0.75, 1.15)),
        main_rgb=main,
        second_rgb=second,
    )


def random_scene(
    rng: np.random.Generator,
    *,
    noun: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    toy: Toy | None = None,
    pair_probability: float = 0.1,
) -> Scene:
    """Draw a scene at random; what is given is kept."""
    pair = noun is None and toy is None and rng.random() < pair_probability
    if pair:
        places = ("left", "right")
        subjects = tuple(_random_subject(rng, size="normal", place=place, pair=True) for place in places)
    else:
        subjects = (_random_subject(rng, noun=noun, colour=colour, toy=toy),)
    return Scene(
        background=background or _pick(rng, tuple(BACKGROUNDS)),
        subjects=subjects,
        detail_seed=int(rng.integers(2**31)),
    )


def caption(scene: Scene, rng: np.random.Generator, *, full: bool = False, identifier: str | None = None) -> str:
    """Describe a scene in the words that the models know.

    Args:
        scene: what to describe.
        rng: decides which attributes a caption leaves out, as people do.
        full: leave nothing out.
        identifier: a rare word to put before the noun, as in "a photo of sks toy".
    """
    nouns = " and ".join(_noun_phrase(subject, rng, full=full, identifier=identifier) for subject in scene.subjects)
    words = ["a photo of", nouns]
    if len(scene.subjects) == 1:
        place = scene.subjects[0].place
        if place != "middle" and (full or rng.random() < 0.8):
            words.append(f"on the {place}")
    if full or rng.random() < 0.92:
        words.append(BACKGROUNDS[scene.background])
    return " ".join(words)


def held_out_stream() -> np.random.Generator:
    """The random stream that chooses what is held out; no training draws from it."""
    return np.random.default_rng([31, 0])


def held_out_combinations(stream: np.random.Generator | None = None) -> list[tuple[str, str, str]]:
    """200 of the 960 combinations of class, colour and background, which no training scene may show.

    Args:
        stream: a new `held_out_stream`, for who draws on from it.
    """
    everything = [(noun, colour, background) for noun in CLASSES for colour in COLOURS for background in BACKGROUNDS]
    chosen = (stream or held_out_stream()).choice(len(everything), size=200, replace=False)
    return [everything[int(index)] for index in chosen]


def shows_held_out(scene: Scene, held_out: frozenset[tuple[str, str, str]]) -> bool:
    """Whether a subject of the scene is one of the given combinations."""
    return any((subject.noun, subject.colour, scene.background) in held_out for subject in scene.subjects)


def vocabulary_corpus() -> list[str]:
    """Text with every word that captions use, for learning the tokenizer's merges."""
    words = [*CLASSES, TOY, *COLOURS, *PATTERNS, *SIZES, *PLACES, *IDENTIFIERS, *BACKGROUNDS.values()]
    return [*words, "a photo of", "an", "and", "the"]


def _noun_phrase(subject: Subject, rng: np.random.Generator, *, full: bool, identifier: str | None) -> str:
    words: list[str] = []
    if subject.size != "normal" and (full or rng.random() < 0.8):
        words.append(subject.size)
    if subject.noun != TOY:
        if full or rng.random() < 0.92:
            words.append(subject.colour)
        if subject.pattern != "plain" and (full or rng.random() < 0.85):
            words.append(subject.pattern)
    if identifier:
        words.append(identifier)
    words.append(subject.noun)
    if not identifier:
        words.insert(0, "an" if words[0] == "orange" else "a")
    return " ".join(words)


def _random_subject(
    rng: np.random.Generator,
    *,
    noun: str | None = None,
    colour: str | None = None,
    size: str | None = None,
    place: str | None = None,
    toy: Toy | None = None,
    pair: bool = False,
) -> Subject:
    noun = noun or (TOY if toy or rng.random() < 0.22 else _pick(rng, CLASSES))
    if noun == TOY and toy is None:
        toy = toy_identity(int(rng.integers(2**31)))
    colour = colour or _pick(rng, tuple(COLOURS))
    size = size or SIZES[int(rng.choice(3, p=(0.12, 0.7, 0.18)))]
    place = place or PLACES[int(rng.choice(3, p=(0.13, 0.74, 0.13)))]
    low, high = {"small": (0.34, 0.42), "normal": (0.56, 0.7), "big": (0.82, 0.94)}[size]
    if pair:
        low, high = 0.4, 0.48
    extent = float(rng.uniform(low, high))
    shift = {"left": -1.0, "middle": 0.0, "right": 1.0}[place] * float(rng.uniform(0.17, 0.24))
    centre = (0.5 + shift + float(rng.uniform(-0.03, 0.03)), 0.54 + float(rng.uniform(-0.05, 0.05)))
    jitter = rng.integers(-14, 15, size=3)
    rgb = tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(COLOURS[colour], jitter, strict=True))
    return Subject(
        noun=noun,
        colour=colour,
        pattern=PATTERNS[int(rng.choice(4, p=(0.64, 0.12, 0.12, 0.12)))],
        size=size,
        place=place,
        centre=centre,
        extent=extent,
        tilt=float(rng.uniform(-8, 8)),
        flip=bool(rng.random() < 0.5),
        rgb=(rgb[0], rgb[1], rgb[2]),
        toy=toy,
    )


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    import colorsys

    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)
