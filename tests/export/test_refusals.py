"""Recipes that a bundle cannot hold are refused with the reason."""

import pytest

from pocketune.errors import PlanError
from pocketune.models.load import ModelFolder
from pocketune.recipe import Recipe
from pocketune_export.exporter import resolution_of


def test_patches_are_refused(tiny_model: ModelFolder) -> None:
    assert resolution_of(tiny_model, Recipe.create(instance_prompt="x")) == 64
    with pytest.raises(PlanError, match="devices cut whole squares"):
        resolution_of(tiny_model, Recipe.create(instance_prompt="x", patches="dynamic"))


@pytest.mark.parametrize("gradient", ["zeroth_order", "mixed"])
def test_other_gradients_are_refused(tiny_model: ModelFolder, gradient: str) -> None:
    with pytest.raises(PlanError, match="its graphs backpropagate"):
        resolution_of(tiny_model, Recipe.create(instance_prompt="x", gradient=gradient))
