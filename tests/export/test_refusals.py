"""Recipes that a bundle cannot hold are refused with the reason."""

import pytest

from pocketune.errors import RecipeError
from pocketune.recipe import Recipe
from pocketune_export.decisions import check_exportable


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patches": "dynamic"}, "devices cut whole squares"),
        ({"skip": "auto", "cache_dtype": "int8"}, "float32 or bfloat16"),
        ({"gradient": "mixed"}, "one resolution"),
        ({"method": "token"}, "train the denoiser"),
        ({"timestep_low": 500}, "all timesteps"),
        ({"weights": "streamed", "weight_bits": 8}, "a packed copy"),
        ({"optimizer_in_backward": True, "activations": "recomputed"}, "norm of all blocks"),
        ({"vae_tile": 64}, "whole images"),
    ],
)
def test_what_devices_cannot_do_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        check_exportable(Recipe.create(instance_prompt="x", **changes))


def test_plain_recipes_are_exportable() -> None:
    check_exportable(Recipe.create(instance_prompt="x", skip="auto", cache_dtype="bfloat16", draws=3))
    check_exportable(Recipe.create(instance_prompt="x", gradient="zeroth_order"))
    check_exportable(Recipe.create(instance_prompt="x", method="scales", weight_bits=8))


def test_what_changes_no_number_is_exportable() -> None:
    check_exportable(Recipe.create(instance_prompt="x", weights="streamed", activations="on_disk"))
    check_exportable(Recipe.create(instance_prompt="x", weight_bits=4))
