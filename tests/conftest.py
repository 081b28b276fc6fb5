"""Fixtures: a tiny SD3 pipeline with random weights, in an ordinary diffusers folder."""

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from pocketune.models.load import ModelFolder
from pocketune.pocket.draw import render
from pocketune.pocket.scenes import random_scene, toy_identity
from tests.tiny_models import build

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches the tests and what they start: a shell's background job would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six joint blocks of width 32 (the first two with dual attention), latents 4 x 8 x 8 for 64-pixel images."""
    return build("sd35", tmp_path_factory.mktemp("models") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> ModelFolder:
    return ModelFolder("tiny-sd3", tiny_folder)


@pytest.fixture(scope="session")
def toy_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three renders of one toy as JPEG files of different sizes."""
    import numpy as np

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for number, size in enumerate(((96, 96), (128, 96), (80, 120))):
        scene = random_scene(rng, toy=toy_identity(5))
        render(scene, size=128).resize(size, Image.Resampling.BILINEAR).save(folder / f"{number}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """The tiny pipeline of an architecture by name, made once."""
    folder = tmp_path_factory.mktemp("pipelines")

    @cache
    def get(name: str) -> ModelFolder:
        return ModelFolder(f"tiny-{name}", build(name, folder / name))

    return get
