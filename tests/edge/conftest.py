"""Fixtures: bundles of the tiny model, exported once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pocketune import Recipe
from pocketune_export.exporter import export_trainable
from tests.edge.handmade import make_bundle

SETTINGS: dict[str, Any] = {
    "instance_prompt": "a photo of sks toy",
    "steps": 6,
    "batch_size": 1,
    "rank": 2,
    "learning_rate": 5e-3,
    "sample_steps": 2,
    "sample_prompts": ("a photo of sks toy",),
    "checkpoint_every": 100,
}


def edge_recipe(**changes: Any) -> Recipe:
    return Recipe.create(**Recipe.relevant(SETTINGS | changes))


@pytest.fixture(scope="session")
def skipping_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks 0-1 (a prefix), 3 and 5 (the last) are skipped; the step trains blocks 2 and 4."""
    out = tmp_path_factory.mktemp("exported") / "skipping"
    export_trainable(recipe=edge_recipe(skip="0-1,3,5"), out=out, model=tiny_folder)
    return out


@pytest.fixture(scope="session")
def whole_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive; no block is skipped, and every step has two photos and two class images."""
    out = tmp_path_factory.mktemp("exported") / "whole.ptb"
    recipe = edge_recipe(batch_size=2, class_prompt="a photo of a toy", class_images=2, prior_loss_weight=0.5)
    export_trainable(recipe=recipe, out=out, model=tiny_folder)
    return out


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made by hand, never to be changed."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "sound")


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


def recipe_of(record: dict[str, Any]) -> Recipe:
    """The recipe of an edge run, as PyTorch's side takes it."""
    return Recipe.model_validate_json(json.dumps(record["recipe"]))
