"""Two judges of generated images: which attributes an image shows, and whether two images show the same subject.

Both are small convolutional networks that look at an image at 64 x 64 pixels; they were trained on renders, sharp and softened
(`pocketune.pocket.train_judges`), and ship with what they scored on renders and subjects they never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pocketune.errors import FileFormatError, first_line
from pocketune.jsonfile import read_object
from pocketune.pocket.scenes import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, PLACES, SIZES, TOY

WEIGHTS = Path(__file__).parent / "weights" / "judges"
HEADS: dict[str, tuple[str, ...]] = {
    "noun": (*CLASSES, TOY),
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": tuple(BACKGROUNDS),
    "size": SIZES,
    "place": PLACES,
}
RESERVED_TOYS = 2**31
"""`toy_identity` numbers from here on are held out: `random_scene`, and so every training, draws below it."""
SIDE = 64
EMBEDDING = 64
_CHUNK = 64
_Judge = TypeVar("_Judge", bound=nn.Module)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of any size and mode as float32 (batch, 3, 64, 64) in [-1, 1]; 128 pixels are averaged two by two."""
    small = [np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for image in images]
    pixels = torch.from_numpy(np.stack(small)) if small else torch.zeros(0, SIDE, SIDE, 3, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _trunk() -> nn.Sequential:
    """(batch, 3, 64, 64) to (batch, 96, 8, 8)."""
    return nn.Sequential(
        nn.PixelUnshuffle(2),
        _convolution(12, 24),
        _convolution(24, 48, stride=2),
        _convolution(48, 48),
        _convolution(48, 96, stride=2),
        _convolution(96, 96),
    )


class AttributeClassifier(nn.Module):
    """Reads noun, colour, pattern, background, size and place off an image with one subject."""

    def __init__(self) -> None:
        """Make an untrained classifier of 0.3 M parameters."""
        super().__init__()
        self.trunk = _trunk()
        self.neck = nn.Sequential(_convolution(96, 64, stride=2), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(options)) for name, options in HEADS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits (batch, options) by attribute, in the order of `HEADS`, for pixels (batch, 3, 64, 64) in [-1, 1]."""
        features = self.neck(self.trunk(pixels))
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, images: Sequence[Image.Image]) -> list[dict[str, str | None]]:
        """The most likely value of every attribute of each image; the colour of a toy is None, for captions never name it."""
        rows: list[dict[str, str | None]] = []
        if not images:
            return rows
        for pixels in to_pixels(images).split(_CHUNK):
            best = {name: logits.argmax(dim=1).tolist() for name, logits in self(pixels).items()}
            for index in range(len(pixels)):
                row: dict[str, str | None] = {name: HEADS[name][chosen[index]] for name, chosen in best.items()}
                rows.append(row | {"colour": None} if row["noun"] == TOY else row)
        return rows


class SubjectEmbedder(nn.Module):
    """Maps images of one subject to nearby unit vectors, whatever its place, size, tilt and background."""

    def __init__(self) -> None:
        """Make an untrained embedder of 0.2 M parameters."""
        super().__init__()
        self.trunk = _trunk()
        self.neck = _convolution(96, 192, kernel=1)
        self.projection = nn.Linear(384, EMBEDDING)

    def forward(self, pixels: Tensor) -> Tensor:
        """Unit vectors (batch, 64) for pixels (batch, 3, 64, 64) in [-1, 1]."""
        features = self.neck(self.trunk(pixels))
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return F.normalize(self.projection(pooled), dim=1)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (n, 64), float32; the dot product of two is their cosine similarity."""
        if not images:
            return torch.zeros(0, EMBEDDING)
        return torch.cat([self(pixels) for pixels in to_pixels(images).split(_CHUNK)])


def load_attribute_classifier(folder: Path = WEIGHTS) -> AttributeClassifier:
    """The shipped classifier, or one that `pocketune.pocket.train_judges` wrote, in float32 on the CPU.

    Raises:
        FileFormatError: the folder holds no such weights, or weights of another shape or with other attributes.
    """
    written = {name: tuple(options) for name, options in held_out_measurements(folder).get("heads", {}).items()}
    if written != HEADS:
        msg = f"{folder}/judges.json names attributes other than this version's ({', '.join(HEADS)}). Train the judges again."
        raise FileFormatError(msg)
    with torch.device("meta"):
        model = AttributeClassifier()
    return _filled(model, folder / "attributes.safetensors")


def load_subject_embedder(folder: Path = WEIGHTS) -> SubjectEmbedder:
    """The shipped embedder, or one that `pocketune.pocket.train_judges` wrote, in float32 on the CPU.

    Raises:
        FileFormatError: the folder holds no such weights, or weights of another shape.
    """
    with torch.device("meta"):
        model = SubjectEmbedder()
    return _filled(model, folder / "subjects.safetensors")


def held_out_measurements(folder: Path = WEIGHTS) -> dict[str, Any]:
    """What `judges.json` says: the attributes, the settings of the training, and the scores on held-out renders.

    Raises:
        FileFormatError: the file is missing or is no JSON object.
    """
    path = folder / "judges.json"
    try:
        return read_object(path)
    except FileFormatError as error:
        msg = f"{error} `python -m pocketune.pocket.train_judges --out {folder}` writes it."
        raise FileFormatError(msg) from error


def _filled(model: _Judge, path: Path) -> _Judge:
    """Put the weights of a file, stored in half precision, into a model on the meta device."""
    try:
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
        model.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        msg = f"{path} does not hold the weights of this {type(model).__name__}: {first_line(error)} Train the judges again."
        raise FileFormatError(msg) from error
    return model.eval().requires_grad_(False)
