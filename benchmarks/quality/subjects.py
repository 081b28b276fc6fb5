"""What is personalized: twelve rendered toys that no training has seen, or the folders of the DreamBooth data set."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pocketune.errors import FileFormatError
from pocketune.photos import load_photos
from pocketune.pocket.draw import render
from pocketune.pocket.judges import RESERVED_TOYS
from pocketune.pocket.scenes import BACKGROUNDS, TOY, Scene, Toy, random_scene, toy_identity

IDENTIFIER = "sks"
POCKET_SUBJECTS = 12
PHOTOS_A_SUBJECT = 4
DREAMBOOTH_PROMPTS = "prompts_and_classes.txt"
_LIVE = ("cat", "dog")
_STREAM = 32
_PLACES = ("left", "right")
_TEMPLATE = re.compile(r"^\s*'([^']*\{0\}[^']*\{1\}[^']*)'\.format\(", re.MULTILINE)


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt and the attributes that it asks for, as `AttributeClassifier` names them; none for real photographs."""

    text: str
    asked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BoothSubject:
    """A subject with its photos and the prompts it is asked for in; `toy` where it is a rendered one."""

    name: str
    class_noun: str
    photos: tuple[Image.Image, ...]
    prompts: tuple[AskedPrompt, ...]
    toy: Toy | None = None

    @property
    def instance_prompt(self) -> str:
        """The caption of all photos in training."""
        return f"a photo of {IDENTIFIER} {self.class_noun}"


def pocket_subjects(count: int = POCKET_SUBJECTS) -> list[BoothSubject]:
    """The first `count` of PocketBooth's toys: four photos each on different backgrounds, and ten prompts."""
    return [_pocket_subject(number) for number in range(count)]


def asked_scene(toy: Toy, prompt: AskedPrompt, seed: int) -> Scene:
    """A scene that shows the toy just as the prompt asks: what a perfect generator might paint."""
    rng = np.random.default_rng([_STREAM, 2, seed])
    place = prompt.asked.get("place", "middle")
    while True:
        scene = random_scene(rng, toy=toy, background=prompt.asked.get("background"))
        if scene.subjects[0].place == place:
            return scene


def asks_for_place(text: str) -> bool:
    """Whether a prompt for a rendered toy says where in the picture it is to be."""
    return text.endswith(tuple(f" {TOY} on the {place}" for place in _PLACES))


def dreambooth_subjects(folder: Path) -> list[BoothSubject]:
    """The DreamBooth data set as published: a folder of photos a subject, classes and prompts in one text file.

    Raises:
        FileFormatError: the text file is missing, or names no class or prompt.
        PhotoError: a subject's photos cannot be read.
    """
    path = folder / DREAMBOOTH_PROMPTS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read {path}: {error}. --data wants the `dataset` folder of the DreamBooth repository."
        raise FileFormatError(msg) from error
    head, _, tail = text.partition("Prompts")
    classes = dict(re.findall(r"^([\w-]+),([\w -]+?)\s*$", head, re.MULTILINE))
    classes.pop("subject_name", None)
    objects, _, live = tail.partition("Live Subject Prompts")
    templates = {False: _TEMPLATE.findall(objects), True: _TEMPLATE.findall(live)}
    if not classes or not templates[False]:
        msg = f"{path} should hold lines `subject,class`, then prompts `'a {{0}} {{1}} ...'.format(...)`; either is missing."
        raise FileFormatError(msg)
    subjects = []
    for name, noun in classes.items():
        if not (folder / name).is_dir():
            continue
        chosen = templates[noun in _LIVE] or templates[False]
        prompts = tuple(AskedPrompt(template.format(IDENTIFIER, noun)) for template in chosen)
        photos = tuple(photo.image for photo in load_photos([folder / name]))
        subjects.append(BoothSubject(name=name, class_noun=noun, photos=photos, prompts=prompts))
    if not subjects:
        msg = f"{folder} holds no folder of a subject that {DREAMBOOTH_PROMPTS} names (such as {next(iter(classes))})."
        raise FileFormatError(msg)
    return subjects


def _pocket_subject(number: int) -> BoothSubject:
    toy = toy_identity(RESERVED_TOYS + number)
    rng = np.random.default_rng([_STREAM, 1, number])
    backgrounds = rng.permutation(list(BACKGROUNDS))[:PHOTOS_A_SUBJECT]
    photos = tuple(render(_photo_scene(rng, toy, str(background))) for background in backgrounds)
    return BoothSubject(name=f"toy{number:02d}", class_noun=TOY, photos=photos, prompts=_pocket_prompts(), toy=toy)


def _photo_scene(rng: np.random.Generator, toy: Toy, background: str) -> Scene:
    """As people photograph what they care for: not small in the picture."""
    while True:
        scene = random_scene(rng, toy=toy, background=background)
        if scene.subjects[0].size != "small":
            return scene


def _pocket_prompts() -> tuple[AskedPrompt, ...]:
    start = f"a photo of {IDENTIFIER} {TOY}"
    somewhere = [AskedPrompt(f"{start} {phrase}", {"background": name}) for name, phrase in BACKGROUNDS.items()]
    aside = [AskedPrompt(f"{start} on the {place}", {"place": place}) for place in _PLACES]
    return (*somewhere, *aside)
